"""Heads on a simulated accelerator: nothing is mixed with the CPU, and the host rarely waits for the device."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from accelerator import DEVICE, Accelerator, SimTensor
from cases import KINDS
from conftest import make_lm, make_probe, make_prompts, make_tokenizer, padded, with_novelty

from llama_probe import LlamaForProbedGeneration
from llama_probe.serving import reader
from llama_probe.training.head_group import GroupLoss, HeadGroup
from llama_probe.training.loss import ProbeLoss


FOLLOWING = {
    "prompt": {"probe_type": "multimax"},
    "both": {"probe_type": "gate", "token_scope": "all"},
    "reply": {"probe_type": "attentive", "token_scope": "response"},
}


def make_model(forms, dtype=torch.float32, **sizes):
    lm = make_lm(attn_implementation="eager", **sizes).to(dtype)
    return LlamaForProbedGeneration.from_causal_lm(lm, {name: make_probe(**form) for name, form in forms.items()})


@pytest.fixture
def device(no_grad):
    with Accelerator() as device:
        yield device


def on_device(inputs):
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def same(found, expected, tolerance=1e-5):
    """Compare results by name: those of the device are on it, and equal those of the CPU."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert isinstance(tensor, SimTensor), name
        torch.testing.assert_close(
            tensor.cpu(),
            expected[name],
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
        )


def prompts(side="left"):
    ids = make_prompts()
    mask = padded(ids) if side == "left" else padded(ids).flip(1)
    return {"input_ids": ids, "attention_mask": mask}


CALLS = {
    "padding on the left": {},
    "padding on the right": {"side": "right"},
    "chunks": {"prefill_chunk_size": 4},
    "sampling": {"do_sample": True, "top_k": 5},
    "halted before the first token": {"halt_on": {"multimax": {"threshold": 0.5}}},
    "all halted": {"halt_on": {"multimax": {"threshold": 0.0}}, "halt_reply": [5, 6]},
    "a policy": {"halt_on": lambda outputs: [True, False, False]},
    "beams": {"num_beams": 2, "num_return_sequences": 2},
}


@pytest.mark.parametrize("call", CALLS)
def test_generate_is_that_of_the_cpu(device, call):
    asked = {"max_new_tokens": 3, "do_sample": False, **CALLS[call]}
    inputs = prompts(asked.pop("side", "left"))
    model = make_model(KINDS)
    torch.manual_seed(0)
    expected = model.generate(**inputs, **asked)
    model, inputs = make_model(KINDS).to(DEVICE), on_device(inputs)
    torch.manual_seed(0)
    out = model.generate(**inputs, **asked)
    same(out.probe_logits, expected.probe_logits)
    assert torch.equal(out.sequences.cpu(), expected.sequences)
    assert out.probe_labels == expected.probe_labels
    halts = [[halt is not None for halt in each.probe_halts or ()] for each in (out, expected)]
    assert halts[0] == halts[1]


def test_a_reply_is_followed_and_halted(device):
    model, inputs = make_model(FOLLOWING), prompts()
    asked = {"max_new_tokens": 6, "do_sample": False}
    scores = model.generate(**inputs, **asked).probe_token_probabilities["reply"][..., 1]
    asked["halt_on"] = {"reply": {"threshold": float(scores.median()), "label": "LABEL_1"}}
    expected = model.generate(**inputs, **asked)
    assert any(expected.probe_halts)
    out = make_model(FOLLOWING).to(DEVICE).generate(**on_device(inputs), **asked)
    same(out.probe_token_logits, expected.probe_token_logits)
    assert [halt and halt.token for halt in out.probe_halts] == [halt and halt.token for halt in expected.probe_halts]


def test_a_judge_is_asked_about_the_texts_in_the_band(device):
    asked = []

    def judge(texts):
        asked.append(texts)
        return [True] * len(texts)

    inputs = prompts()
    rule = {"gate": {"unsure": (0.0, 1.0), "ask": judge}}
    for where in ("cpu", DEVICE):
        model = make_model({"gate": KINDS["gate"]}).to(where)
        values = inputs if where == "cpu" else on_device(inputs)
        out = model.generate(**values, max_new_tokens=2, halt_on=rule, tokenizer=make_tokenizer())
        assert all(out.probe_halts)
    assert asked[0] == asked[1] and len(asked[0]) == 3


def test_turns_continue_from_a_state(device):
    inputs = {"input_ids": make_prompts()}
    results = []
    for where in ("cpu", DEVICE):
        model = make_model(FOLLOWING).to(where)
        ids = inputs["input_ids"].to(where)
        first = model.generate(ids, max_new_tokens=3, do_sample=False, probe_state=True)
        longer = torch.cat([first.sequences, ids], dim=1)
        again = model.generate(
            longer,
            max_new_tokens=2,
            do_sample=False,
            probe_state=first.probe_state,
            past_key_values=first.past_key_values,
        )
        results.append(again)
    same(results[1].probe_logits, results[0].probe_logits)
    assert results[1].probe_state.input_ids.device.type == "cpu", "what later prompts are compared with is on the host"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(device, dtype):
    inputs = prompts()
    expected = make_model(KINDS, dtype).classify(**inputs)
    out = make_model(KINDS, dtype).to(DEVICE).classify(**on_device(inputs))
    same({n: o.logits for n, o in out.items()}, {n: o.logits for n, o in expected.items()}, 0.03)


def test_classify_texts_and_forward(device):
    texts, tokenizer = ["Well done!", "I hate it.", "a long text, " * 9], make_tokenizer()
    model = make_model(KINDS, vocab_size=260)
    expected = model.classify(texts, tokenizer=tokenizer)
    forward = model(**prompts()).probe_logits
    model = make_model(KINDS, vocab_size=260).to(DEVICE)
    found = model.classify(texts, tokenizer=tokenizer)
    same({n: o.logits for n, o in found.items()}, {n: o.logits for n, o in expected.items()})
    assert [o.labels for o in found.values()] == [o.labels for o in expected.values()]
    same(model(**on_device(prompts())).probe_logits, forward)


def test_heads_on_another_device_than_the_lm(device):
    expected = make_model(KINDS).generate(**prompts(), max_new_tokens=1).probe_logits
    model = make_model(KINDS)
    model.probes.to(DEVICE)
    same(model.generate(**prompts(), max_new_tokens=1).probe_logits, expected)
    model = make_model(KINDS).to(DEVICE)
    model.probes.to("cpu")
    found = model.generate(**on_device(prompts()), max_new_tokens=1).probe_logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def train_a_step() -> None:
    labels, states, mask = torch.tensor([0, 1, 1]), torch.randn(3, 5, 9, 32), torch.ones(3, 9, dtype=torch.long)
    gradients = []
    with Accelerator():
        for where in ("cpu", DEVICE):
            heads = {kind: make_probe(**KINDS[kind]) for kind in ("gate", "multimax", "mha")}
            group = HeadGroup(heads).to(where).eval()  # dropout draws other numbers on each device
            loss = GroupLoss({name: ProbeLoss(head.config) for name, head in heads.items()})
            out = group(hidden_states=states.to(where), attention_mask=mask.to(where))
            loss(out, labels.to(where)).backward()
            gradients.append({name: each.grad for name, each in group.named_parameters() if each.grad is not None})
        same(gradients[1], gradients[0])


def test_a_training_step():
    """In a process of its own: torch counts the devices when the first gradient of a process is computed."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(train_a_step).result()


@pytest.mark.parametrize("budget", [1, 1 << 12, 1 << 30])
def test_groups_of_layers(device, monkeypatch, budget):
    monkeypatch.setattr(reader, "state_budget", lambda device: budget)
    expected = make_model(KINDS).classify(**prompts())
    found = make_model(KINDS).to(DEVICE).classify(**on_device(prompts()))
    same({n: o.logits for n, o in found.items()}, {n: o.logits for n, o in expected.items()})


def test_a_head_abstains(device):
    labels = []
    for where in ("cpu", DEVICE):
        model = LlamaForProbedGeneration.from_causal_lm(
            make_lm(attn_implementation="eager"), {"a": with_novelty(make_probe())}
        ).to(where)
        out = model.generate(make_prompts().to(where), max_new_tokens=1, abstain_at=0.5)
        before = device.reads
        labels.append((out.probe_labels, out.probe_novelty["a"].cpu()))
        assert where == "cpu" or device.reads - before <= 2, "labels with their novelty, and the copy of this test"
    assert labels[0][0] == labels[1][0]
    torch.testing.assert_close(labels[1][1], labels[0][1], rtol=1e-4, atol=1e-4)


class TestReads:
    """The host reads a value of the device only after the device has done all work before it."""

    @pytest.fixture
    def count(self, device):
        def count(heads, **asked):
            model = make_model({name: KINDS[name] for name in heads} or {"gate": {}}).to(DEVICE)
            if not heads:
                model.set_active_probes([])
            values = on_device(prompts())
            device.reads = device.operations = 0
            out = model.generate(**values, max_new_tokens=3, do_sample=False, **asked)
            return device.reads, device.operations, out

        return count

    @pytest.mark.parametrize("heads", [["gate"], ["mha", "multimax", "pooling"], list(KINDS)], ids=len)
    def test_a_call_reads_twice(self, device, count, heads):
        plain, *_ = count([])
        reads, _, out = count(heads)
        assert reads - plain <= 2
        before = device.reads
        assert out.probe_labels and out.probe_probabilities
        assert device.reads - before <= 1, "the labels of all heads come in one copy"

    def test_a_rule_reads_once_more(self, count):
        plain, *_ = count([])
        reads, *_ = count(list(KINDS), halt_on={"gate": {"threshold": 0.99}, "mha": {"threshold": 0.99}})
        assert reads - plain <= 3

    def test_chunks_cost_no_read_each(self, count):
        plain, *_ = count([], prefill_chunk_size=3)
        reads, *_ = count(["gate"], prefill_chunk_size=3)
        assert reads - plain <= 2

    def test_a_row_that_is_halted_costs_no_read_a_token(self, count):
        plain, *_ = count([])
        reads, _, out = count(["gate"], halt_on=lambda outputs: [True, False, False])
        assert out.probe_halts[0] and reads - plain <= 2
