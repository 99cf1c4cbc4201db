"""The reader: groups of layers by a budget, tokens that nobody reads, and what it refuses."""

import pytest
import torch
from conftest import HIDDEN, LAYERS, make_probe
from hypothesis import given, settings
from hypothesis import strategies as st
from test_probe import cases, states_for

from llama_probe import ProbeError
from llama_probe.heads.probe import ProbeModel
from llama_probe.serving.reader import StateReader


def read(reader, states, masks, cuts, repeats=1):
    for low, high in zip([0, *cuts], cuts, strict=False):
        reader.begin({name: mask[:, low:high] for name, mask in masks.items()}, last=high == cuts[-1], repeats=repeats)
        for layer, hidden in enumerate(states):
            reader.on_state(layer, hidden[:, low:high].repeat_interleave(repeats, 0))
        reader.end()


@settings(max_examples=80, deadline=None)
@given(cases(), st.integers(1, 20_000), st.integers(1, 3), st.booleans())
def test_any_budget_gives_the_scores_of_the_whole(case, budget, repeats, keep):
    config, mask, cuts, seed = case
    other = mask.clone()
    other[:, 0] = True
    heads = {"a": make_probe(seed, **config), "b": make_probe(seed + 1, **config)}
    states, masks = states_for(config, mask, seed), {"a": mask, "b": other}
    reader = StateReader(heads, keep=heads if keep else (), budget=budget)
    read(reader, states, masks, cuts, repeats)
    for name, found in reader.results().items():
        with torch.no_grad():
            whole = heads[name](hidden_states=states, attention_mask=masks[name]).logits
        torch.testing.assert_close(found.logits, whole, atol=1e-5, rtol=1e-5)


def groups_read(monkeypatch, budget, tokens=8):
    sizes, step = [], ProbeModel.step

    def count(self, state, layers, x, *args):
        sizes.append((len(layers), x.shape[2]))
        return step(self, state, layers, x, *args)

    monkeypatch.setattr(ProbeModel, "step", count)
    reader = StateReader({"a": make_probe()}, budget=budget)
    mask = torch.ones(1, tokens, dtype=torch.bool)
    mask[:, :2] = mask[:, -1:] = False
    states = [torch.randn(1, tokens, HIDDEN) for _ in range(LAYERS + 1)]
    read(reader, states, {"a": mask}, [tokens])
    return sizes


LAYER = 2 * 4 * HIDDEN * 5  # bytes of two fp32 tensors of five tokens


@pytest.mark.parametrize("budget, groups", [(1, [1] * (LAYERS + 1)), (2 * LAYER, [2, 2, 1]), (1 << 30, [LAYERS + 1])])
def test_layers_go_together_as_the_budget_allows(monkeypatch, budget, groups):
    """Two tensors of a group, fp32, fit into the budget. Columns at both ends that no head reads are left out."""
    assert groups_read(monkeypatch, budget) == [(size, 5) for size in groups]


def test_a_pass_in_which_nothing_counts_is_not_read(monkeypatch):
    reader = StateReader({"a": make_probe()}, keep=["a"])
    states = [torch.randn(1, 3, HIDDEN) for _ in range(LAYERS + 1)]
    monkeypatch.setattr(ProbeModel, "step", lambda *_: pytest.fail("there is nothing to read"))
    read(reader, states, {"a": torch.zeros(1, 3, dtype=torch.bool)}, [3])
    assert reader.states["a"].joined() is None


def test_a_state_that_did_not_come():
    reader = StateReader({"a": make_probe()})
    reader.begin({"a": torch.ones(1, 3, dtype=torch.bool)})
    for layer in range(LAYERS):
        reader.on_state(layer, torch.randn(1, 3, HIDDEN))
    with pytest.raises(ProbeError, match=str(LAYERS)):
        reader.end()


def test_a_layer_that_ran_over_fewer_tokens():
    reader = StateReader({"a": make_probe()})
    reader.begin({"a": torch.ones(1, 3, dtype=torch.bool)})
    with pytest.raises(ProbeError, match="state 2"):
        reader.on_state(2, torch.randn(1, 1, HIDDEN))
