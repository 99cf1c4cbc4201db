"""Temperature, thresholds and how well they do."""

import numpy as np
import pytest
import torch
from conftest import make_probe
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_probe.calibration import reliability, threshold_table
from llama_probe.decision import predictions, probabilities


CONFIG = make_probe(id2label={0: "no", 1: "yes"}, threshold=0.35, temperature=2.0).config


def logits_of(probs, temperature: float = 2.0) -> torch.Tensor:
    """Logits whose calibrated probabilities of label 1 are `probs`."""
    p = torch.tensor(probs, dtype=torch.float64)
    return torch.stack([torch.zeros_like(p), temperature * (p / (1 - p)).log()], dim=1).float()


def test_thresholds_by_hand():
    table = threshold_table(logits_of([0.05, 0.36, 0.55, 0.92]), np.array([0, 1, 0, 1]), CONFIG)["yes"]
    rows = {row["threshold"]: row for row in table}
    assert list(rows) == [0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert [row["threshold"] for row in table if row["saved"]] == [0.35]
    assert (rows[0.35]["precision"], rows[0.35]["recall"], rows[0.35]["flagged"]) == (0.6667, 1.0, 0.75)
    assert (rows[0.4]["precision"], rows[0.4]["recall"]) == (0.5, 0.5)
    assert (rows[0.6]["precision"], rows[0.6]["recall"]) == (1.0, 0.5)
    nothing = threshold_table(logits_of([0.05, 0.1]), np.array([1, 0]), CONFIG)["yes"][-1]
    assert nothing["precision"] is None and nothing["recall"] == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 0.99), st.booleans()), min_size=1, max_size=40))
def test_the_saved_threshold_is_what_the_head_does(rows):
    logits, labels = logits_of([p for p, _ in rows]), np.array([int(label) for _, label in rows])
    table = threshold_table(logits, labels, CONFIG)
    if not labels.any():
        assert table == {}
        return
    saved = next(row for row in table["yes"] if row["saved"])
    flagged = predictions(probabilities(logits, CONFIG), CONFIG).numpy() == 1
    assert saved["flagged"] == pytest.approx(flagged.mean(), abs=1e-4)
    assert saved["recall"] == pytest.approx(flagged[labels == 1].mean(), abs=1e-4)
    recalls = [row["recall"] for row in table["yes"]]
    assert recalls == sorted(recalls, reverse=True)


def test_reliability_by_hand():
    found = reliability(logits_of([0.12, 0.18, 0.95, 0.95]), np.array([0, 1, 1, 1]), CONFIG)
    low, high = found["bins"]
    assert (low["low"], low["rows"], low["confidence"], low["frequency"]) == (0.1, 2, pytest.approx(0.15), 0.5)
    assert (high["low"], high["rows"], high["frequency"]) == (0.9, 2, 1.0)
    assert found["error"] == pytest.approx((2 * 0.35 + 2 * 0.05) / 4, abs=1e-3)
    assert found["error_uncalibrated"] != found["error"]


def test_reliability_of_several_labels_and_of_many():
    many = make_probe(num_labels=3).config
    logits = torch.tensor([[9.0, 0, 0], [0, 9.0, 0]])
    found = reliability(logits, np.array([0, 2]), many)
    assert found["bins"] == [{"low": 0.9, "high": 1.0, "rows": 2, "confidence": 0.9998, "frequency": 0.5}]
    several = make_probe(problem_type="multi_label_classification").config
    assert sum(part["rows"] for part in reliability(logits[:, :2], np.array([[1, 0], [0, 1]]), several)["bins"]) == 4
