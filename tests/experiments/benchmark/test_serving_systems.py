"""Every system gives the same tokens, and the logits of its heads."""

import pytest
import torch
from conftest import VOCAB, make_lm, make_probe
from tiny_guards import T5

from llama_probe.experiments.benchmark.models import ModelPlan
from llama_probe.experiments.benchmark.serving_systems import Load, fresh_config, generate, plain_system, systems
from llama_probe.serving.auto import AutoModelForProbedGeneration


CPU = torch.device("cpu")


@pytest.fixture
def model():
    model = AutoModelForProbedGeneration.from_causal_lm(make_lm())
    for kind in ("gate", "mha"):
        model.add_probe(kind, make_probe(probe_type=kind))
    return model


@pytest.fixture
def guards(tmp_path):
    T5.save_pretrained(tmp_path / "guard")
    return [ModelPlan.read(str(tmp_path / "guard"), "auto", True, 20, guards=True)]


@pytest.mark.parametrize("new_tokens", [1, 3])
def test_tokens_and_logits_are_the_same(model, guards, new_tokens):
    load, again = (Load.create(2, 11, new_tokens, VOCAB, CPU) for _ in range(2))
    assert torch.equal(load.input_ids, again.input_ids)
    plain = model._without_probes()
    expected = plain_system(plain).serve(load, None)
    assert expected.shape == (2, 11 + new_tokens)
    scores = model.classify(load.input_ids)
    model.add_probe("tone", make_probe(probe_type="gate", token_scope="response"))
    outputs = {}
    for system in systems(model, plain, 2, True, guards):
        outputs[system.name] = system.serve(load, None)
        assert (system.weight_bytes > 0) == (system.name != "base again")
    # A head of replies has no naive way.
    names = ["base again", "gate", "mha", "tone", "2 x mha", "naive gate", "naive mha", "guard guard"]
    assert list(outputs) == names
    for name in ("gate", "mha"):
        assert set(outputs[name].probe_logits) == {name}
        out, read = outputs[f"naive {name}"]
        torch.testing.assert_close(outputs[name].probe_logits[name], scores[name].logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(read.logits, scores[name].logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(out.sequences, expected) and torch.equal(outputs[name].sequences, expected)
    assert len(outputs["2 x mha"].probe_logits) == 2
    answer, text = outputs["guard guard"]
    assert answer.shape == (2, 2) and torch.equal(text, expected), "the guard's token, then the model's text"


def test_a_reply_has_exactly_as_many_tokens_as_asked():
    """An end-of-sequence token does not end it, and every token is reported."""
    model = make_lm()
    load = Load.create(1, 5, 6, VOCAB, CPU)
    first = generate(model, Load.create(1, 5, 1, VOCAB, CPU))[0, -1]
    model.generation_config.eos_token_id = int(first)
    heard = []
    assert generate(model, load, lambda: heard.append(1)).shape == (1, 11)
    assert len(heard) == 6


@pytest.mark.parametrize(
    "kind, hidden_size, downcast, heads",
    [("mha", 3072, 32, 2), ("mha", 48, 16, 3), ("mha", 37, 1, 1), ("gate", 37, 32, 2)],
)
def test_fresh_heads_fit(kind, hidden_size, downcast, heads):
    config = fresh_config(kind, hidden_size, 3)
    assert (config.downcast, config.num_attention_heads, config.hidden_size) == (downcast, heads, hidden_size)
