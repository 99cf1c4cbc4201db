"""Temperature, thresholds and how well they do."""

import numpy as np
import pytest
import torch
from conftest import make_probe
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_probe import ProbeConfig, ProbeError
from llama_probe.evaluation.calibration import (
    best_f1_threshold,
    calibrate,
    expected_f1_threshold,
    highest_recall_threshold,
    reliability,
    threshold_table,
)
from llama_probe.heads.decision import predictions, probabilities


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


def f1_at(threshold, scores, positives):
    flagged = scores >= threshold
    return 2 * (flagged & (positives == 1)).sum() / (flagged.sum() + positives.sum())


def test_the_expected_f1_is_steadier():
    """Of rows that are positive as often as their score says, a tenth of them: the best threshold is half the best F1."""
    rng = np.random.default_rng(0)

    def draw(rows):
        odds = np.exp(rng.normal(-4, 3, rows))
        scores = odds / (1 + odds)
        return scores, (rng.random(rows) < scores).astype(int)

    many = draw(200_000)
    best = max(f1_at(threshold, *many) for threshold in np.linspace(0.05, 0.95, 91))
    assert expected_f1_threshold(*draw(20_000)) == pytest.approx(best / 2, abs=0.02)
    rules = (expected_f1_threshold, best_f1_threshold)
    found = [[rule(*rows) for rule in rules] for rows in (draw(300) for _ in range(40))]
    expected, raw = (np.array([f1_at(threshold, *many) for threshold in part]) for part in zip(*found, strict=True))
    assert expected.mean() > raw.mean() + 0.003 and expected.min() > raw.min()
    assert np.std([row[0] for row in found]) < 0.7 * np.std([row[1] for row in found])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.booleans()), min_size=2, max_size=30))
def test_the_expected_f1_at_the_ends(rows):
    """It lies between scores that differ, or below all of them."""
    scores, positives = np.array([score for score, _ in rows]), np.array([int(label) for _, label in rows])
    if 0 < positives.sum() < len(rows):
        threshold = expected_f1_threshold(scores, positives)
        assert 0 <= threshold <= 1 and (threshold not in scores or threshold == 0)
        assert (scores >= threshold).any()


def test_scores_that_tell_all():
    scores = np.linspace(0.01, 0.99, 20)
    positives = (scores > 0.5).astype(int)
    assert f1_at(expected_f1_threshold(scores, positives), scores, positives) == 1


def test_a_rule_that_is_none():
    with pytest.raises(ProbeError, match="threshold_rule='f2' is not known; allowed: expected-f1, best-f1"):
        calibrate(CONFIG, torch.zeros(2, 2), torch.tensor([0, 1]), threshold_rule="f2")


def test_the_rule_is_followed():
    rng = np.random.default_rng(0)
    probs = rng.uniform(0.01, 0.99, 60)
    labels = torch.from_numpy((rng.random(60) < probs).astype(int))
    found = {
        rule: calibrate(CONFIG, logits_of(probs), labels, threshold_rule=rule) for rule in ("expected-f1", "best-f1")
    }
    scores = probabilities(logits_of(probs), found["best-f1"]).numpy()[:, 1]
    assert found["best-f1"].threshold == best_f1_threshold(scores, labels.numpy())
    assert found["expected-f1"].threshold == expected_f1_threshold(scores, labels.numpy())
    assert calibrate(CONFIG, logits_of(probs), labels).threshold == found["expected-f1"].threshold


@pytest.mark.parametrize("place", range(1, 6))
def test_a_threshold_between_neighbours_keeps_them_apart(place):
    """Heads compare in float32, in which there may be no number between two scores."""
    scores = [np.float32(1)]
    for _ in range(place):
        scores.append(np.nextafter(scores[-1], np.float32(0)))
    scores = np.array([*scores[-2:], 0.2, 0.1], dtype=np.float32)
    probs = torch.from_numpy(np.stack([1 - scores, scores], axis=1))
    threshold = best_f1_threshold(scores, np.array([1, 0, 0, 0]))
    assert predictions(probs, CONFIG.replace(threshold=threshold)).tolist() == [1, 0, 0, 0]


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


def test_the_calibration_error_is_that_of_the_rows():
    """Rounded once, at the end, and not put together from what the bins show."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        probs, labels = rng.uniform(0.01, 0.99, 40), rng.integers(0, 2, 40)
        places = np.floor(probs * 10)
        gaps = [abs((probs - labels)[places == place].sum()) for place in range(10)]
        error = reliability(logits_of(probs), labels, CONFIG)["error"]
        assert error == pytest.approx(sum(gaps) / 40, abs=5.1e-5)


def test_reliability_of_several_labels_and_of_many():
    many = make_probe(num_labels=3).config
    logits = torch.tensor([[9.0, 0, 0], [0, 9.0, 0]])
    found = reliability(logits, np.array([0, 2]), many)
    assert found["bins"] == [{"low": 0.9, "high": 1.0, "rows": 2, "confidence": 0.9998, "frequency": 0.5}]
    several = make_probe(problem_type="multi_label_classification").config
    assert sum(part["rows"] for part in reliability(logits[:, :2], np.array([[1, 0], [0, 1]]), several)["bins"]) == 4


SCORES, POSITIVES = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]), np.array([0, 0, 1, 0, 1, 0, 1, 1])


@pytest.mark.parametrize(
    "rate, threshold",
    [
        (0.0, 0.65),  # of the four negative rows none: two of four positive ones
        (0.24, 0.65),
        (0.25, 0.45),  # the row at 0.6: three
        (0.5, 0.25),  # and the one at 0.4: all four
        (0.99, 0.25),  # a lower one would flag more negative rows and no further positive one
    ],
)
def test_the_highest_recall_by_hand(rate, threshold):
    assert highest_recall_threshold(SCORES, POSITIVES, rate) == pytest.approx(threshold)


def test_the_highest_recall_at_the_ends():
    assert highest_recall_threshold(np.array([0.2, 0.6]), np.array([1, 0]), 0.0) == 0.8, "nothing can be flagged"
    assert highest_recall_threshold(np.array([0.6, 0.6]), np.array([1, 0]), 0.5) == 0.8, "both or none"
    assert highest_recall_threshold(np.array([0.2, 0.6]), np.array([0, 1]), 0.0) == pytest.approx(0.4)
    high, low = np.float32(0.5), np.nextafter(np.float32(0.5), np.float32(0))
    chosen = highest_recall_threshold(np.array([high, low]), np.array([1, 0]), 0.0)
    assert torch.tensor([high, low]).ge(chosen).tolist() == [True, False], "also in float32"


def test_a_probability_of_one_cannot_be_kept_out(monkeypatch):
    said = []
    monkeypatch.setattr("llama_probe.evaluation.calibration.logger.warning", said.append)
    assert highest_recall_threshold(np.array([1.0, 0.3]), np.array([0, 1]), 0.0) == 1.0
    assert len(said) == 1 and "no threshold keeps to max_false_positive_rate" in said[0]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=2, max_size=40),
    rate=st.sampled_from([0.0, 0.01, 0.1, 0.25, 0.3, 0.5, 0.9]),
)
def test_no_threshold_has_a_higher_recall(rows, rate):
    scores, positives = np.array([s / 31 for s, _ in rows], dtype=np.float32), np.array([p for _, p in rows])
    if positives.all() or not positives.any():
        return

    def rates(threshold):
        flagged = scores >= threshold
        return flagged[~positives].mean(), flagged[positives].mean()

    false_positives, recall = rates(highest_recall_threshold(scores, positives.astype(int), rate))
    assert false_positives <= rate
    assert recall == max(r for f, r in map(rates, [*scores, 2.0]) if f <= rate)
    assert all(f >= false_positives for f, r in map(rates, scores) if r == recall)


def test_calibrate_keeps_to_the_rate():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 2, (400,), generator=generator)
    logits = torch.randn(400, 2, generator=generator)
    logits[:, 1] += truth * 1.5
    heads = [calibrate(CONFIG, logits, truth, rate) for rate in (0.02, 0.2)]
    for head, rate in zip(heads, (0.02, 0.2), strict=True):
        given = predictions(probabilities(logits, head), head)
        assert rate - 0.01 <= given[truth == 0].float().mean() <= rate
    assert heads[0].temperature == heads[1].temperature == calibrate(CONFIG, logits, truth).temperature
    several = make_probe(problem_type="multi_label_classification").config
    on = torch.stack([truth, 1 - truth], dim=1)
    head = calibrate(several, logits, on, 0.1)
    given = predictions(probabilities(logits, head), head)
    assert all(given[on[:, i] == 0, i].float().mean() <= 0.1 for i in range(2))
    assert len(set(head.threshold)) == 2


@pytest.mark.parametrize(
    "changes, rate, words",
    [
        ({}, 1.0, "at least 0 and below 1"),
        ({}, -0.1, "at least 0 and below 1"),
        ({}, float("nan"), "at least 0 and below 1"),
        ({"num_labels": 3}, 0.1, "needs a head with two labels or a multi-label head; this one has num_labels=3"),
        ({"num_labels": 1, "problem_type": "regression"}, 0.1, "problem_type='regression': leave it out"),
    ],
)
def test_a_rate_that_cannot_be(changes, rate, words):
    config = ProbeConfig(probe_type="gate", **changes)
    with pytest.raises(ProbeError, match=words):
        calibrate(config, torch.zeros(2, config.num_labels), torch.zeros(2), rate)
