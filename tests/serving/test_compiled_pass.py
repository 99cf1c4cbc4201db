"""What `torch.compile` makes of a pass with heads: one graph, with the scores of the pass that is not compiled."""

import copy
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import HIDDEN, VOCAB, make_lm, make_prompts, padded, probed
from conftest import make_probe as make_probe_of_any_size
from functorch.compile import make_boxed_func
from test_probe import KINDS
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter

from llama_probe import LlamaForProbedGeneration, ProbeError
from llama_probe.backbone.capture import _LISTENING
from llama_probe.heads.rules import TURN_SCOPES
from llama_probe.serving import reader


@pytest.fixture(autouse=True)
def anew(no_grad):
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    assert _LISTENING.on_state is None


LAYERS = 2  # of an LM that is compiled within a second


def make_probe(**changes):
    return make_probe_of_any_size(vocab_size=VOCAB, num_hidden_layers=LAYERS, **changes)


def make_model(dtype=torch.float32, forms=None, **changes):
    """A model with a head of these fields, or with one of each of the forms."""
    forms = {"a": changes} if forms is None else {str(number): form for number, form in enumerate(forms)}
    heads = {name: make_probe(**form) for name, form in forms.items()}
    return LlamaForProbedGeneration.from_causal_lm(make_lm(num_hidden_layers=LAYERS).to(dtype), heads)


def compiled(model):
    return torch.compile(model, backend="eager", fullgraph=True)


def with_compiled_forward(model, backend="eager"):
    """As the documentation of transformers has it."""
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    return model


USER, REPLY = 3, 4
TURNS = {
    "user": {"ids": [USER], "skip": 1},
    "assistant": {"ids": [REPLY], "skip": 0},
    "tool": {"ids": [USER, 5, 6], "skip": 0},
}
FORMS = [
    *({"probe_type": kind} for kind in KINDS),
    {"probe_type": "pooling", "pool": "max"},
    {"probe_type": "mha", "pool": "max"},
    {"probe_type": "mha", "token_scope": "all"},
    {"probe_type": "gate", "layers": [0, 2], "normalize": "rms"},
    {"probe_type": "multimax", "token_scope": "content", "prefix_ids": [make_prompts()[1, 0].item(), REPLY]},
    *({"probe_type": "gate", "token_scope": scope, "turn_markers": TURNS} for scope in TURN_SCOPES),
]


def test_one_graph_gives_the_scores(prompts):
    model = make_model(forms=FORMS)
    mask = padded(prompts)
    mask[1, -3:] = 0
    prompts[:, 3], prompts[1, 1], prompts[2, 5:8] = USER, REPLY, torch.tensor([REPLY, USER, 5])
    expected = model(prompts, attention_mask=mask)
    out = compiled(model)(prompts, attention_mask=mask)
    assert type(out) is type(expected)
    torch.testing.assert_close(out.probe_logits, expected.probe_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.logits, expected.logits)
    assert out.probe_labels == expected.probe_labels


def test_another_length_is_traced_once_and_its_number_is_none():
    model, counter = make_model(probe_type="gate"), CompileCounter()
    run = torch.compile(model, backend=counter, fullgraph=True)
    for length in (7, 8, 9, 12, 60, 150):
        ids = make_prompts(length=length)
        torch.testing.assert_close(run(ids).probe_logits, model(ids).probe_logits, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2


def test_half_precision():
    model = make_model(torch.bfloat16, [{"probe_type": "gate"}, {"probe_type": "mha"}])
    ids = make_prompts(length=140)
    torch.testing.assert_close(compiled(model)(ids).probe_logits, model(ids).probe_logits, rtol=0.02, atol=0.02)


def test_autocast_is_for_the_lm(prompts):
    model = make_model(probe_type="mha")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, out = model(prompts), compiled(model)(prompts)
    assert out.probe_logits["a"].dtype == torch.float32
    torch.testing.assert_close(out.probe_logits, expected.probe_logits, rtol=1e-4, atol=1e-4)


class TestGenerate:
    def test_as_without_compiling(self, prompts):
        model, run = make_model(), with_compiled_forward(make_model())
        for asked in (
            {},
            {"num_beams": 2, "num_return_sequences": 2},
            {"cache_implementation": "static"},
            {"return_dict_in_generate": False},
            {"halt_on": lambda outputs: [True, False, False]},
            {"halt_on": {"a": {"threshold": 0.0}}, "halt_reply": [5, 6]},
        ):
            asked = {"attention_mask": padded(prompts), "max_new_tokens": 2, "do_sample": False, **asked}
            expected, out = model.generate(prompts, **asked), run.generate(prompts, **asked)
            if isinstance(expected, torch.Tensor):
                assert torch.equal(out, expected)
                continue
            assert torch.equal(out.sequences, expected.sequences), asked
            torch.testing.assert_close(out.probe_logits, expected.probe_logits, rtol=1e-5, atol=1e-5)
            halts = [[halt and halt.head for halt in found.probe_halts or ()] for found in (out, expected)]
            assert halts[0] == halts[1]

    def test_graphs_are_those_of_the_plain_model(self):
        counts = []
        for heads in (True, False):
            torch._dynamo.reset()
            model, counter = make_model(), CompileCounter()
            if not heads:
                model.set_active_probes([])
            with_compiled_forward(model, counter)
            for length in (7, 8, 12):
                model.generate(make_prompts(length=length), max_new_tokens=3, do_sample=False)
            counts.append(counter.frame_count)
        assert counts[0] == counts[1]

    def test_what_else_than_scores_is_asked_for_breaks_the_graph_and_is_right(self, prompts):
        """A state to go on from, and heads that follow the reply."""
        model = make_model(probe_type="gate", token_scope="all")
        asked = {"max_new_tokens": 2, "do_sample": False, "probe_state": True}
        expected = model.generate(prompts, **asked)
        model.forward = torch.compile(model.forward, backend="eager")
        out = model.generate(prompts, **asked)
        torch.testing.assert_close(out.probe_logits, expected.probe_logits)
        torch.testing.assert_close(out.probe_token_logits, expected.probe_token_logits, equal_nan=True)
        assert out.probe_state.get_seq_length() == expected.probe_state.get_seq_length()


def test_a_pass_that_goes_on_from_a_cache_is_plain(prompts):
    model = make_model()
    run = compiled(model)
    first = run(prompts, use_cache=True)
    again = run(prompts[:, -1:], cache=first.cache, attention_mask=torch.ones(3, 10, dtype=torch.long))
    assert again.probe_logits is None
    assert first.probe_state is None  # it is kept where probe_state asks for it


def test_heads_come_and_go(prompts):
    model = make_model()
    run = compiled(model)
    run(prompts)
    model.add_probe("b", make_probe(seed=1, probe_type="multimax"))
    torch.testing.assert_close(run(prompts).probe_logits, model(prompts).probe_logits)
    model.delete_probe("a")
    assert run(prompts).probe_logits.keys() == {"b"}
    model.set_active_probes([])
    assert not hasattr(run(prompts), "probe_logits")
    assert isinstance(compiled(make_model())(prompts, return_dict=False)[-1]["a"], torch.Tensor)


def test_a_row_without_a_token_that_counts_has_no_score(prompts):
    """An error over values would break the graph."""
    mask = torch.ones_like(prompts)
    mask[1] = 0
    out = compiled(make_model())(prompts, attention_mask=mask)
    assert out.probe_logits["a"].isnan().all(dim=1).tolist() == [False, True, False]
    with pytest.raises(ProbeError, match="no number for 1 of 3 rows"):
        out.probe_labels  # noqa: B018


def test_an_lm_that_breaks_the_graph_itself(prompts, monkeypatch):
    model = probed({"a": make_probe_of_any_size(num_hidden_layers=1)}, num_hidden_layers=1)
    expected, mlp = model(prompts), model.model.layers[0].mlp
    forward = mlp.forward

    def breaks(x):
        torch._dynamo.graph_break()
        return forward(x)

    monkeypatch.setattr(mlp, "forward", breaks)
    out = torch.compile(model, backend="eager")(prompts)
    torch.testing.assert_close(out.probe_logits, expected.probe_logits)


def test_copies_and_pickles_of_a_compiled_model(prompts):
    """Its layers keep hooks, which are put there once and do nothing in a pass that is not compiled."""
    model = make_model()
    expected = compiled(model)(prompts).probe_logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch._dynamo.reset()
        torch.testing.assert_close(other(prompts).probe_logits, expected)
        torch.testing.assert_close(compiled(other)(prompts).probe_logits, expected)
        assert len(other.model.layers[0]._forward_pre_hooks) == len(other.model.norm._forward_hooks) == 1


@torch.enable_grad()
def test_gradients_are_the_lms_own(prompts):
    model = make_model()
    out = torch.compile(model, backend="aot_eager")(prompts, labels=prompts)
    out.loss.backward()
    assert not out.probe_logits["a"].requires_grad
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    assert all(parameter.grad is None for parameter in model.probes.parameters())


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_with_the_compiler_that_torch_takes_by_itself():
    model, prompts = make_model(probe_type="mha"), make_prompts(length=260)
    model.add_probe("b", make_probe(seed=1, probe_type="multimax"))
    expected = model.generate(prompts, max_new_tokens=1)
    model.compile(fullgraph=True)
    out = model.generate(prompts, max_new_tokens=1)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(out.probe_logits, expected.probe_logits, rtol=1e-4, atol=1e-4)


def test_threads_with_different_heads(prompts):
    """Once it is compiled: torch compiles anew for each thread that waits for another to compile the same."""
    model = make_model()
    model.add_probe("b", make_probe(seed=1, probe_type="gate"))
    expected, found = model(prompts).probe_logits, []
    with_compiled_forward(model)

    def generate(name):
        for _ in range(3):
            out = model.generate(prompts, max_new_tokens=3, do_sample=False, probes=[name])
            found.append((name, out.probe_logits))

    for name in "ab":
        generate(name)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(generate, "abab"))
    assert len(found) == 3 * 6
    for name, logits in found:
        torch.testing.assert_close(logits, {name: expected[name]}, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_torch", [True, False])
def test_beside_a_thread_that_compiles(by_torch, prompts, monkeypatch):
    """What torch says of compiling in general holds for all threads, also for those that run."""
    model = make_model()
    expected = model.generate(prompts, max_new_tokens=3, do_sample=False)
    if by_torch:
        with_compiled_forward(model).generate(prompts, max_new_tokens=3, do_sample=False)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.compiler.is_compiling()
    out = model.generate(prompts, max_new_tokens=3, do_sample=False)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(out.probe_logits, expected.probe_logits, rtol=1e-5, atol=1e-5)
    assert bool(model.model.norm._forward_hooks) == by_torch, "what is not compiled keeps no hooks"


def kept_at_once(model, ids):
    """The most results of operations, as large as a state, that are needed at once in the order in which inductor runs them."""
    from torch._inductor.fx_passes.post_grad import reorder_for_locality  # takes seconds to import, in every worker

    found = []

    def look(module, _):
        reorder_for_locality(module.graph)
        nodes = list(module.graph.nodes)
        last = {used: place for place, node in enumerate(nodes) for used in node.all_input_nodes}
        spans = [
            (place, last.get(node, place))
            for place, node in enumerate(nodes)
            if node.op == "call_function"
            and isinstance(value := node.meta["val"], torch.Tensor)
            and value.numel() >= ids.numel() * HIDDEN
        ]
        found.append(max(sum(first <= place <= end for first, end in spans) for place in range(len(nodes))))
        return make_boxed_func(module.forward)

    torch.compile(model, backend=aot_autograd(fw_compiler=look), fullgraph=True)(
        ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1
    )
    return found[0]


def test_states_are_not_kept_until_the_lm_has_run(monkeypatch):
    monkeypatch.setattr(reader, "state_budget", lambda device: 1)
    deep = 3
    model = probed(num_hidden_layers=deep)
    ids = torch.randint(2, VOCAB, (1, 64))
    plain = kept_at_once(model, ids)
    for kind in ("gate", "mha"):
        model.add_probe(kind, make_probe_of_any_size(vocab_size=VOCAB, num_hidden_layers=deep, probe_type=kind))
    assert kept_at_once(model, ids) <= plain + 2


class TestParts:
    """Of the LM, compiled by themselves with torch's stock settings."""

    def test_layers_one_by_one(self):
        """Prompts of a second length are traced with lengths that are no numbers."""
        model, plain = (make_model(forms=[{"token_scope": "prompt"}, {"token_scope": "all"}]) for _ in range(2))
        for layer in model.model.layers:
            layer.compile(backend="eager")
        for length in (7, 8):
            ids = make_prompts(length=length)
            out, expected = (lm.generate(ids, max_new_tokens=4, do_sample=False) for lm in (model, plain))
            assert torch.equal(out.sequences, expected.sequences)
            torch.testing.assert_close(out.probe_logits, expected.probe_logits)
            torch.testing.assert_close(out.probe_token_logits, expected.probe_token_logits, equal_nan=True)

    def test_a_decoder_that_ran_before_hides_its_states(self, prompts):
        model = make_model()
        model.model.compile(backend="eager")
        model.generate(prompts, max_new_tokens=3, probes=[])
        with pytest.raises(ProbeError, match="skip_nnmodule_hook_guards"):
            model.generate(prompts, max_new_tokens=3)
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            torch._dynamo.reset()
            model.generate(prompts, max_new_tokens=3, probes=[])
            model.generate(prompts, max_new_tokens=3)
