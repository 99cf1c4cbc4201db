"""Learning curves: which rows are drawn, and that more of them help."""

import numpy as np
import pytest
import torch
from conftest import make_lm, make_prompts

from llama_probe import ProbeConfig, ProbeError
from llama_probe.data.states import PromptDataset
from llama_probe.experiments.reproduction.learning_curves import draw_rows, learning_curves, summarize_curves
from llama_probe.heads.match import describe


KINDS = {"gate": {"probe_type": "gate"}, "attentive": {"probe_type": "attentive"}}


def prompts(rows, seed):
    """Whether token 11 occurs."""
    found, labels = [], []
    for row in range(rows):
        ids = make_prompts(1, 4 + row % 5, seed=1000 * seed + row)[0].tolist()
        ids = [12 if token == 11 else token for token in ids]
        if row % 2:
            ids[row % len(ids)] = 11
        found.append(ids)
        labels.append(row % 2)
    return PromptDataset(found, np.array(labels)), np.array(labels)


def test_more_rows_help():
    lm = make_lm()
    config = describe(lm, ProbeConfig(probe_type="gate"))
    train, test = prompts(96, 1), prompts(40, 2)
    found = learning_curves(config, *train, *test, KINDS, (8, 96, 500), (0, 1), lm)
    assert [(e["rows"], e["seed"], e["head"]) for e in found] == [
        (rows, seed, kind) for rows in (8, 96) for seed in (0, 1) for kind in ("gate", "attentive")
    ], "500 rows there are not"
    mean = {rows: np.mean([e["auprc"] for e in found if e["rows"] == rows]) for rows in (8, 96)}
    assert mean[96] > mean[8] + 0.05
    again = learning_curves(config, *train, *test, KINDS, (8,), (0, 1), lm)
    assert again == found[:4]
    alone = learning_curves(config, *train, *test, {"gate": KINDS["gate"]}, (8,), (0,), lm)
    assert alone[0] == found[0], "a kind does not depend on the others"


def test_the_draw():
    labels = np.array([0] * 97 + [1, 2, 2])
    config = ProbeConfig(num_labels=3)
    small, large = draw_rows(labels, config, 5, 0), draw_rows(labels, config, 50, 0)
    assert set(labels[small]) == {0, 1, 2} and set(small) <= set(large)
    assert len(set(large)) == 50 and (np.diff(large) > 0).all()
    assert not np.array_equal(draw_rows(labels, config, 50, 1), large)
    values = draw_rows(np.random.rand(20, 1), ProbeConfig(num_labels=1, problem_type="regression"), 4, 0)
    assert len(set(values)) == 4


def test_too_few_rows():
    with pytest.raises(ProbeError, match="3 training rows are too few"):
        learning_curves(ProbeConfig(), *prompts(3, 0), *prompts(3, 1), KINDS, (16, 64))


def test_the_summary():
    curves = [
        {"rows": rows, "seed": seed, "head": head, "auprc": value}
        for head, rows, seed, value in (
            ("a", 8, 0, 0.2),
            ("a", 8, 1, 0.4),
            ("a", 16, 0, 0.9),
            ("b", 8, 0, 0.5),
            ("b", 16, 0, 0.6),
        )
    ]
    found = summarize_curves(curves, "auprc")
    assert list(found) == ["a", "b"] and list(found["a"]) == [8, 16]
    assert found["a"][8] == {"mean": pytest.approx(0.3), "std": pytest.approx(0.02**0.5), "runs": 2}
    assert found["b"][16] == {"mean": 0.6, "std": None, "runs": 1}


def test_a_head_does_not_depend_on_those_beside_it(lm, monkeypatch):
    """Its dropout neither."""
    ids, labels = make_prompts(20, 8).tolist(), np.arange(20) % 2
    config = describe(lm, ProbeConfig(probe_type="pooling", num_labels=2))
    data, trained = PromptDataset(ids, labels), []
    gate = {"probe_type": "gate", "dropout": 0.3, "layer_dropout": 0.2}

    def keep(probes, *args):
        trained.append(probes[-1])
        return [torch.zeros(20, 2)] * len(probes)

    monkeypatch.setattr("llama_probe.experiments.reproduction.learning_curves.predict_together", keep)
    for heads in ({"gate": gate}, {"pooling": {"probe_type": "pooling"}, "gate": gate}):
        learning_curves(config, data, labels, data, labels, heads, (16,), (0,), lm)
    alone, beside = (probe.state_dict() for probe in trained)
    assert all(torch.equal(alone[name], beside[name]) for name in alone)
