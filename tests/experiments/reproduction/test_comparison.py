"""Methods that are compared, runs that fail, and layer weights by label."""

import numpy as np
import pytest
from conftest import HIDDEN

from llama_probe import ProbeConfig, ProbeError
from llama_probe.experiments.reproduction.comparison import candidates_of, group_layers
from llama_probe.experiments.reproduction.methods import HEADS, HeadMethod, downcast_methods


def test_candidates():
    base, labels = ProbeConfig(probe_type="pooling", hidden_size=HIDDEN, num_hidden_layers=3), np.arange(2)
    linear = candidates_of(HEADS["layer-linear"], "layer-linear", base, labels, 5)
    assert [candidate.config.layers for candidate in linear] == [[0], [1], [2], [3]]
    gates = [candidates_of(HEADS["gate"], "gate", base, labels, seed)[0] for seed in (0, 1)]
    assert len({candidate.number for candidate in [*linear, *gates]}) == 6
    assert [candidate.seed for candidate in gates] == [0, 1] and gates[0].config.layers == "all"
    (half,) = candidates_of(HEADS["multimax-half"], "multimax-half", base, labels, 0)
    assert half.config.layers == [0, 2] and half.learning_rate == 5e-3


@pytest.mark.parametrize("hidden_size, values", [(576, ["4", "8", "16", "32", "64"]), (48, ["4", "8", "16"])])
def test_downcasts_can_be_built(hidden_size, values):
    found = downcast_methods(hidden_size)
    assert list(found) == values
    for method in found.values():
        ProbeConfig(hidden_size=hidden_size, num_hidden_layers=2, **method.head)


def test_a_method_that_runs_away_is_named(reproduction, monkeypatch):
    monkeypatch.setitem(HEADS, "gate", HeadMethod.create("gate", learning_rate=1e30))
    with pytest.raises(ProbeError, match=r"gate \(seed 0\) on toxicchat"):
        reproduction(chosen=["gate", "pooling"], seeds=[0], epochs=4).execute()


def test_layer_groups():
    weights = np.array([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.3, 0.7], [0.65, 0.35]])
    labels, given = np.array([0, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 0])
    found = group_layers(weights, labels, given, ["no", "yes"])
    groups = [(group["label"], group["right"], group["rows"], group["weights"]) for group in found["groups"]]
    right, wrong = ("yes", True, 2, [0.2, 0.8]), ("yes", False, 1, [0.65, 0.35])
    assert groups == [("no", True, 2, [0.7, 0.3]), right, wrong]
    distance = {"to_given": pytest.approx(0.05), "to_true": pytest.approx(0.45)}
    assert found["errors"] == [{"label": "yes", "given": "no", "rows": 1, **distance}]
