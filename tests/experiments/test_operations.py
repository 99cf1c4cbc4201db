"""Heads add few operations to a pass of a model of the demo backbone's sizes, with the choices for an accelerator."""

import pytest
import torch
from conftest import make_lm, with_novelty

from llama_probe.experiments.systems import Systems, count_operations, fresh_config
from llama_probe.heads import probe_types
from llama_probe.serving.auto import AutoModelForProbedGeneration


LAYERS, HIDDEN = 30, 576
# Operations over those of the plain model: one head, eight heads, and a decoding step with a head that follows the reply.
ONE, EIGHT, STEP = 1.03, 1.10, 1.05


@pytest.fixture(scope="module")
def rows():
    narrow = {"intermediate_size": 16, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8}
    lm = make_lm(hidden_size=HIDDEN, num_hidden_layers=LAYERS, **narrow)
    model = AutoModelForProbedGeneration.from_causal_lm(lm.to(torch.bfloat16))
    for kind in probe_types():
        model.add_probe(kind, fresh_config(kind, HIDDEN, LAYERS))
    with_novelty(model.add_probe("multimax-novelty", fresh_config("multimax", HIDDEN, LAYERS)))
    found = count_operations(Systems(model, many=8), (16, 512))
    for name in list(model.probes):
        model.delete_probe(name)
    for kind in probe_types():
        model.add_probe(f"{kind}-reply", fresh_config(kind, HIDDEN, LAYERS, token_scope="response"))
    found += count_operations(Systems(model), (16,))
    return {(row["system"], row["tokens"]): row for row in found}


@pytest.mark.parametrize("tokens", [16, 512])
@pytest.mark.parametrize("kind, limit", [*((kind, ONE) for kind in probe_types()), ("8 x mha", EIGHT)])
def test_operations_of_the_pass_over_the_prompt(rows, kind, limit, tokens):
    assert 1 < rows[kind, tokens]["prefill_ratio"] <= limit
    assert rows[kind, tokens]["step_ratio"] == 1, "a head of the prompt costs nothing in a reply"


@pytest.mark.parametrize("kind", probe_types())
def test_operations_of_a_step_that_a_head_follows(rows, kind):
    assert 1 < rows[f"{kind}-reply", 16]["step_ratio"] <= STEP


@pytest.mark.parametrize("tokens", [16, 512])
def test_novelty_adds_few_operations(rows, tokens):
    novel, plain = rows["multimax-novelty", tokens], rows["multimax", tokens]
    assert 0 < novel["prefill"] - plain["prefill"] <= 3  # one is a cast from bf16
    assert novel["prefill_ratio"] <= ONE
