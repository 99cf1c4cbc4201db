"""Runs that fail, and layer weights by label."""

import numpy as np
import pytest

from llama_probe import ProbeError
from llama_probe.experiments.reproduction.comparison import group_layers
from llama_probe.experiments.reproduction.methods import HEADS, HeadMethod


def test_a_method_that_runs_away_is_named(reproduction, monkeypatch):
    monkeypatch.setitem(HEADS, "gate", HeadMethod({"probe_type": "gate"}, learning_rate=1e30))
    with pytest.raises(ProbeError, match=r"gate \(seed 0\) on toxicchat"):
        reproduction(chosen=["gate", "pooling"], seeds=[0], epochs=4).execute()


def test_layer_groups():
    weights = np.array([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.3, 0.7], [0.65, 0.35]])
    labels, given = np.array([0, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 0])
    found = group_layers(weights, labels, given, ["no", "yes"])
    assert [(g["label"], g["right"], g["rows"]) for g in found["groups"]] == [
        ("no", True, 2), ("yes", True, 2), ("yes", False, 1),
    ]  # fmt: skip
    assert found["groups"][0]["weights"] == [0.7, 0.3] and found["groups"][2]["weights"] == [0.65, 0.35]
    (error,) = found["errors"]
    assert (error["label"], error["given"]) == ("yes", "no")
    assert error["to_given"] == pytest.approx(0.05) and error["to_true"] == pytest.approx(0.45)
