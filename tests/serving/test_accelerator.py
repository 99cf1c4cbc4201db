"""Heads on a simulated accelerator: nothing is mixed with the CPU, and the host rarely waits for the device."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from accelerator import DEVICE, Accelerator, SimTensor
from cases import HEAD_TYPES, MARKERS, REPLY, USER
from conftest import make_lm, make_probe, make_prompts, make_tokenizer, padded, with_novelty
from torch.utils.data import StackDataset

from llama_probe import LlamaForProbedGeneration, ProbeTrainer, ProbeTrainingArguments
from llama_probe.serving import reader


FOLLOWING = {
    "prompt": {"probe_type": "multimax"},
    "both": {"probe_type": "gate", "token_scope": "all"},
    "reply": {"probe_type": "multimax", "token_scope": "response"},
}


def make_model(forms=HEAD_TYPES, dtype=torch.float32, **sizes):
    lm = make_lm(attn_implementation="eager", **sizes).to(dtype)
    return LlamaForProbedGeneration.from_causal_lm(lm, {name: make_probe(**form) for name, form in forms.items()})


@pytest.fixture
def device(no_grad):
    with Accelerator() as device:
        yield device


def same(found, expected, tolerance=1e-5):
    """Compare tensors by name: those of the device are on it, and equal those of the CPU."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert isinstance(tensor, SimTensor), name
        torch.testing.assert_close(tensor.cpu(), expected[name], rtol=tolerance, atol=tolerance, equal_nan=True)


def on_both(run, forms=HEAD_TYPES, **options):
    """Return what a function of a model and of a place gives on the CPU and on the device."""
    results = []
    for where in ("cpu", DEVICE):
        torch.manual_seed(0)
        results.append(run(make_model(forms, **options).to(where), where))
    return results


def prompts(where="cpu", side="left"):
    ids = make_prompts()
    mask = padded(ids) if side == "left" else padded(ids).flip(1)
    return {"input_ids": ids.to(where), "attention_mask": mask.to(where)}


def chats(where="cpu"):
    """Prompts of two, three and one turns of the user."""
    values = prompts()
    for row, turns in enumerate(((1, 7), (1, 5, 8), (6,))):
        values["input_ids"][row, list(turns)] = USER
        values["input_ids"][row, [turn + 2 for turn in turns[:-1]]] = REPLY
    return {name: tensor.to(where) for name, tensor in values.items()}


def logits_of(outputs):
    return {name: output.logits for name, output in outputs.items()}


def halts_of(out):
    return [halt and (halt.head, halt.token) for halt in out.probe_halts or ()]


CALLS = {
    "padding on the left": {},
    "padding on the right": {"side": "right"},
    "chunks": {"prefill_chunk_size": 4},
    "halted before the first token": {"halt_on": {"multimax": {"threshold": 0.5}}},
    "all halted": {"halt_on": {"multimax": {"threshold": 0.0}}, "halt_reply": [5, 6]},
    "another judge": {"halt_on": {"multimax": {"unsure": (0, 1), "ask": lambda texts: [True, False, True]}}},
    "beams": {"num_beams": 2, "num_return_sequences": 2},
}


@pytest.mark.parametrize("call", CALLS)
def test_generate_is_that_of_the_cpu(device, call):
    asked = {"max_new_tokens": 3, "do_sample": False, "tokenizer": make_tokenizer(), **CALLS[call]}
    side = asked.pop("side", "left")
    expected, out = on_both(lambda model, where: model.generate(**prompts(where, side), **asked))
    same(out.probe_logits, expected.probe_logits)
    assert torch.equal(out.sequences.cpu(), expected.sequences)
    assert out.probe_labels == expected.probe_labels
    assert halts_of(out) == halts_of(expected)


def test_a_reply_is_followed_and_halted(device):
    asked = {"max_new_tokens": 6, "do_sample": False}
    scores = make_model(FOLLOWING).generate(**prompts(), **asked).probe_token_probabilities["reply"][..., 1]
    asked["halt_on"] = {"reply": {"threshold": float(scores.median()), "label": "LABEL_1"}}
    expected, out = on_both(lambda model, where: model.generate(**prompts(where), **asked), FOLLOWING)
    same(out.probe_token_logits, expected.probe_token_logits)
    assert halts_of(out) == halts_of(expected) and any(expected.probe_halts)


def test_turns_continue_from_a_state(device):
    def two_turns(model, where):
        ids, call = make_prompts().to(where), {"max_new_tokens": 3, "do_sample": False}
        first = model.generate(ids, probe_state=True, **call)
        longer = torch.cat([first.sequences, ids], dim=1)
        return model.generate(longer, probe_state=first.probe_state, cache=first.cache, **call)

    expected, out = on_both(two_turns, FOLLOWING)
    same(out.probe_logits, expected.probe_logits)
    assert out.probe_state.input_ids.device.type == "cpu", "what later prompts are compared with is on the host"


def test_turns_are_judged_one_by_one(device):
    forms = {
        name: {**HEAD_TYPES[name], "token_scope": "user", "turn_markers": MARKERS} for name in ("multimax", "mha")
    }
    run = {"max_new_tokens": 1, "prefill_chunk_size": 5}
    expected, out = on_both(lambda model, where: model.generate(**chats(where), **run), forms)
    same(out.probe_logits, expected.probe_logits)


@pytest.mark.parametrize(
    "dtype, tolerance, budget",
    [(torch.bfloat16, 0.03, 20_000), (torch.float16, 0.03, 1 << 30), (torch.float32, 1e-5, 1)],
    ids=["a few layers", "all layers", "a layer"],
)
def test_classify_in_any_precision(device, monkeypatch, dtype, tolerance, budget):
    monkeypatch.setattr(reader, "state_budget", lambda _: budget)
    expected, found = on_both(lambda model, where: logits_of(model.classify(**prompts(where))), dtype=dtype)
    same(found, expected, tolerance)


def test_classify_texts_and_forward(device):
    texts, tokenizer = ["Well done!", "I hate it.", "a long text, " * 9], make_tokenizer()
    runs = on_both(lambda model, where: model.classify(texts, tokenizer=tokenizer), vocab_size=260)
    same(logits_of(runs[1]), logits_of(runs[0]))
    assert [output.labels for output in runs[1].values()] == [output.labels for output in runs[0].values()]
    expected, found = on_both(lambda model, where: model(**prompts(where)).probe_logits)
    same(found, expected)


def test_heads_on_another_device_than_the_lm(device):
    expected = make_model().generate(**prompts(), max_new_tokens=1).probe_logits
    for lm_place, heads_place in (("cpu", DEVICE), (DEVICE, "cpu")):
        model = make_model().to(lm_place)
        model.probes.to(heads_place)
        found = model.generate(**prompts(lm_place), max_new_tokens=1).probe_logits
        assert {logits.device.type for logits in found.values()} == {heads_place}
        on_cpu = {name: logits.cpu() for name, logits in found.items()}
        torch.testing.assert_close(on_cpu, expected, rtol=1e-5, atol=1e-5)


def train_a_step(folder: str) -> None:
    rows = StackDataset(input_ids=[[1] * 9] * 3, hidden_states=list(torch.randn(3, 5, 9, 32)), labels=[0, 1, 1])
    gradients = []
    with Accelerator():
        for where in ("cpu", DEVICE):
            heads = {head_type: make_probe(**HEAD_TYPES[head_type]) for head_type in ("gate", "multimax", "mha")}
            trainer = ProbeTrainer(heads, ProbeTrainingArguments(folder, use_cpu=True), train_dataset=rows)
            trainer._prepare_inputs = dict  # else they go where the Trainer sees a device
            group, batch = trainer.model.to(where), trainer.data_collator([rows[row] for row in range(3)])
            trainer.training_step(group, {name: tensor.to(where) for name, tensor in batch.items()})
            gradients.append({name: each.grad for name, each in group.named_parameters() if each.grad is not None})
        same(gradients[1], gradients[0])


@pytest.mark.slow
def test_a_training_step(tmp_path):
    """In a process of its own: a process that has computed gradients on a device cannot be forked to compute more."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(train_a_step, str(tmp_path)).result()


def test_a_head_abstains(device):
    def abstain(model, where):
        with_novelty(model.probes["gate"])
        out = model.generate(make_prompts().to(where), max_new_tokens=1, abstain_at=0.5)
        before = device.reads
        labels, novelty = out.probe_labels, out.probe_novelty["gate"].cpu()
        assert where == "cpu" or device.reads - before <= 2, "labels with their novelty, and the copy of this test"
        return labels, novelty

    (labels, novelty), (found_labels, found) = on_both(abstain, {"gate": HEAD_TYPES["gate"]})
    assert found_labels == labels
    torch.testing.assert_close(found, novelty, rtol=1e-4, atol=1e-4)


ONE_IN_THREE = {"halt_on": lambda outputs: [True, False, False]}
TWO_RULES = {"halt_on": {"gate": {"threshold": 0.99}, "mha": {"threshold": 0.99}}}


@pytest.mark.parametrize(
    "heads, asked, reads",
    [
        (list(HEAD_TYPES), {}, 2),
        (list(HEAD_TYPES), TWO_RULES, 3),
        (["gate"], {"prefill_chunk_size": 3}, 2),
        (["gate"], ONE_IN_THREE, 2),
        (["both"], {"halt_on": {"both": {"threshold": 1.0}}}, 3 + 2),
    ],
    ids=["all", "a rule reads once more", "chunks cost none", "a halted row costs none", "once more a token"],
)
def test_reads_that_heads_add_to_a_call(device, heads, asked, reads):
    """The host reads a value of the device only after the device has done all work before it."""
    counts, forms = [], HEAD_TYPES | FOLLOWING
    for names in ([], heads):
        model, values = make_model({name: forms[name] for name in heads}).to(DEVICE), prompts(DEVICE)
        rules = {key: value for key, value in asked.items() if names or key != "halt_on"}
        device.reads = 0
        out = model.generate(**values, max_new_tokens=3, do_sample=False, probes=names, **rules)
        counts.append(device.reads)
    assert counts[1] - counts[0] <= reads
    assert asked != ONE_IN_THREE or out.probe_halts[0]
    before = device.reads
    assert out.probe_labels and out.probe_probabilities
    assert device.reads - before <= 1, "the labels of all heads come in one copy"
