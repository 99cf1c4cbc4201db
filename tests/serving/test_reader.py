"""The reader: groups of layers by a budget, and tokens that nobody reads. test_any_call.py draws budgets for the scores."""

import pytest
import torch
from conftest import HIDDEN, LAYERS, make_probe

from llama_probe.heads.probe import ProbeModel
from llama_probe.serving import reader as module
from llama_probe.serving.reader import StateReader


def read(reader, mask):
    reader.begin({"a": mask})
    for layer in range(LAYERS + 1):
        reader.on_state(layer, torch.randn(*mask.shape, HIDDEN))
    reader.end()


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
    read(StateReader({"a": make_probe()}), mask)
    assert sizes == [(size, 5) for size in groups]


def test_a_pass_in_which_nothing_counts_is_not_read(monkeypatch):
    reader = StateReader({"a": make_probe()}, keep=["a"])
    monkeypatch.setattr(ProbeModel, "step", lambda *_: pytest.fail("there is nothing to read"))
    read(reader, torch.zeros(1, 3, dtype=torch.bool))
    assert reader.states["a"].joined() is None
