"""Learning curves: more rows help, and a head does not depend on those beside it."""

import numpy as np
import pytest
import torch
from conftest import make_prompts

from llama_probe import ProbeConfig
from llama_probe.data.states import StateCache
from llama_probe.experiments.reproduction.learning_curves import draw_rows, summarize_curve, train_on_few
from llama_probe.heads.match import describe


def test_the_draw():
    labels = np.array([0] * 97 + [1, 2, 2])
    small, large = draw_rows(labels, 5, 0), draw_rows(labels, 50, 0)
    assert set(labels[small]) == {0, 1, 2} and set(small) <= set(large)
    assert len(set(large)) == 50 and (np.diff(large) > 0).all()
    assert not np.array_equal(draw_rows(labels, 50, 1), large)


def test_the_summary():
    values = ((8, 0.2), (16, 0.9), (8, 0.4), (32, 0.1), (32, None))
    found = summarize_curve([{"rows": rows, "auprc": value} for rows, value in values], "auprc")
    assert list(found) == [8, 16, 32] and found[16] == {"mean": 0.9, "std": None} and found[32] is None
    assert found[8] == {"mean": pytest.approx(0.3), "std": pytest.approx(0.02**0.5)}


def test_a_head_does_not_depend_on_those_beside_it(lm, tmp_path, monkeypatch):
    """Its dropout neither."""
    ids, labels = make_prompts(20, 8).tolist(), np.arange(20) % 2
    config = describe(lm, ProbeConfig(probe_type="pooling", num_labels=2))
    data, trained = (StateCache(tmp_path).dataset(lm, config, ids, labels), labels), []
    gate = {"probe_type": "gate", "dropout": 0.3, "layer_dropout": 0.2}

    def keep(probes, *args):
        trained.append(probes[-1])
        return [torch.zeros(20, 2)] * len(probes)

    monkeypatch.setattr("llama_probe.experiments.reproduction.learning_curves.predict_together", keep)
    for heads in ({"gate": gate}, {"pooling": {"probe_type": "pooling"}, "gate": gate}):
        train_on_few(config, data, data, heads, 16, 0)
    alone, beside = (probe.state_dict() for probe in trained)
    assert all(torch.equal(alone[name], beside[name]) for name in alone)
