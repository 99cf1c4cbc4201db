"""The reader: groups of layers by a budget, and tokens that nobody reads."""

from unittest.mock import patch

import pytest
import torch
from conftest import HIDDEN, LAYERS, make_probe
from hypothesis import given, settings
from hypothesis import strategies as st
from test_probe import cases, states_for

from llama_probe.heads.probe import ProbeModel
from llama_probe.serving import reader as module
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
    reader = StateReader(heads, keep=heads if keep else ())
    with patch.object(module, "state_budget", return_value=budget):
        read(reader, states, masks, cuts, repeats)
    for name, found in reader.results().items():
        with torch.no_grad():
            whole = heads[name](hidden_states=states, attention_mask=masks[name]).logits
        torch.testing.assert_close(found.logits, whole, atol=1e-5, rtol=1e-5)


LAYER = 2 * 4 * HIDDEN * 5  # bytes of two fp32 tensors of five tokens


@pytest.mark.parametrize("budget, groups", [(1, [1] * (LAYERS + 1)), (2 * LAYER, [2, 2, 1]), (1 << 30, [LAYERS + 1])])
def test_layers_go_together_as_the_budget_allows(monkeypatch, budget, groups):
    """Two tensors of a group, fp32, fit into the budget. Columns at both ends that no head reads are left out."""
    sizes, step = [], ProbeModel.step

    def count(self, state, layers, x, *args):
        sizes.append((len(layers), x.shape[2]))
        return step(self, state, layers, x, *args)

    monkeypatch.setattr(ProbeModel, "step", count)
    monkeypatch.setattr(module, "state_budget", lambda device: budget)
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[:, :2] = mask[:, -1:] = False
    states = [torch.randn(1, 8, HIDDEN) for _ in range(LAYERS + 1)]
    read(StateReader({"a": make_probe()}), states, {"a": mask}, [8])
    assert sizes == [(size, 5) for size in groups]


def test_a_pass_in_which_nothing_counts_is_not_read(monkeypatch):
    reader = StateReader({"a": make_probe()}, keep=["a"])
    states = [torch.randn(1, 3, HIDDEN) for _ in range(LAYERS + 1)]
    monkeypatch.setattr(ProbeModel, "step", lambda *_: pytest.fail("there is nothing to read"))
    read(reader, states, {"a": torch.zeros(1, 3, dtype=torch.bool)}, [3])
    assert reader.states["a"].joined() is None
