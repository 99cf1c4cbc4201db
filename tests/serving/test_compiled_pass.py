"""Models with heads under `torch.compile`: the graph breaks at the heads, the scores stay, decoding compiles as the plain LM's does."""

import pytest
import torch
from conftest import VOCAB, make_prompts, padded, probed
from conftest import make_probe as make_probe_of_any_size
from observers import assert_no_hooks
from torch._dynamo.testing import CompileCounter

from llama_probe import ProbeError
from llama_probe.heads import probe_types


@pytest.fixture(autouse=True)
def anew(no_grad):
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


LAYERS = 2  # of an LM that is compiled within a second


def make_probe(**changes):
    return make_probe_of_any_size(**{"vocab_size": VOCAB, "num_hidden_layers": LAYERS, **changes})


def make_model(layers=LAYERS, **heads):
    return probed(heads or {"a": make_probe(num_hidden_layers=layers)}, num_hidden_layers=layers)


def with_compiled_forward(model, backend="eager"):
    """As the documentation of transformers has it."""
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def with_compiled_layers(model):
    """With torch's stock settings."""
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def test_the_scores_of_every_head_type_stay(prompts):
    model = make_model(**{head_type: make_probe(probe_type=head_type) for head_type in probe_types()})
    mask = padded(prompts)
    expected, run = model(prompts, attention_mask=mask), torch.compile(model, backend="eager")
    for _ in range(2):  # traced, and from its graphs
        out = run(prompts, attention_mask=mask)
        assert type(out) is type(expected) and out.probe_labels == expected.probe_labels
        torch.testing.assert_close(out.probe_logits, expected.probe_logits)
        torch.testing.assert_close(out.logits, expected.logits)
    assert_no_hooks(model)


@pytest.mark.parametrize(
    "compiled, asked",
    [
        pytest.param(with_compiled_forward, {"num_beams": 2, "num_return_sequences": 2}, marks=pytest.mark.slow),
        (with_compiled_forward, {"cache_implementation": "static"}),
        (with_compiled_forward, {"halt_on": lambda outputs: [True, False, False], "probe_state": True}),
        (with_compiled_forward, {"halt_on": {"a": {"threshold": 0.0}}, "halt_reply": [5, 6]}),
        pytest.param(with_compiled_layers, {}, marks=pytest.mark.slow),
    ],
)
def test_generate_is_that_of_a_model_that_is_not_compiled(prompts, compiled, asked):
    heads = {"a": make_probe(), "b": make_probe(probe_type="gate", token_scope="all")}
    if "num_beams" in asked:
        del heads["b"]  # follows one reply a prompt
    asked = {"attention_mask": padded(prompts), "max_new_tokens": 3, "do_sample": False, **asked}
    expected = make_model(**heads).generate(prompts, **asked)
    out = compiled(make_model(**heads)).generate(prompts, **asked)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(out.probe_logits, expected.probe_logits)
    torch.testing.assert_close(out.probe_token_logits, expected.probe_token_logits, equal_nan=True)
    halts = [[halt and halt.head for halt in each.probe_halts or ()] for each in (out, expected)]
    assert halts[0] == halts[1]


@pytest.mark.slow
def test_decoding_makes_the_graphs_of_the_plain_model():
    graphs = {}
    for names, lengths in (("a", (7, 8)), ("", (7,))):
        torch._dynamo.reset()
        model, counter = make_model(layers=1), CompileCounter()
        model.set_active_probes(list(names))
        with_compiled_forward(model, counter)
        for length in lengths:
            model.generate(make_prompts(length=length), max_new_tokens=4, do_sample=False)
        graphs[names] = counter.frame_count
    assert 0 < graphs["a"] < graphs[""], "for prompts of any length, but none for the prefill"


def test_heads_come_and_go(prompts):
    model = make_model()
    run = torch.compile(model, backend="eager")
    run(prompts)
    model.add_probe("b", make_probe(seed=1, probe_type="multimax"))
    torch.testing.assert_close(run(prompts).probe_logits, model(prompts).probe_logits)
    model.delete_probe("a")
    assert run(prompts).probe_logits.keys() == {"b"}
    model.set_active_probes([])
    whole = torch.compile(model, backend="eager", fullgraph=True)(prompts)
    assert not hasattr(whole, "probe_logits") and torch.equal(whole.logits, model(prompts).logits)


def test_a_compiled_decoder_that_ran_without_heads_hides_its_states(prompts):
    model = make_model()
    model.model.compile(backend="eager")
    model.generate(prompts, max_new_tokens=1, probes=[])
    with pytest.raises(ProbeError, match="skip_nnmodule_hook_guards"):
        model.generate(prompts, max_new_tokens=3)
