"""Temperature, thresholds and how well they do."""

import numpy as np
import pytest
import torch
from conftest import make_probe
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from llama_probe import ProbeConfig, ProbeError
from llama_probe.data.prompts import PromptDataset
from llama_probe.evaluation.calibration import (
    best_f1_threshold,
    calibrate,
    check_rates,
    check_threshold_rule,
    expected_f1_threshold,
    highest_recall_threshold,
    length_groups,
    reliability,
    threshold_table,
    thresholds_from,
    with_rates,
)
from llama_probe.heads.decision import predictions, probabilities


CONFIG = make_probe(id2label={0: "no", 1: "yes"}, threshold=0.35, temperature=2.0).config
SEVERAL = make_probe(problem_type="multi_label_classification").config
THREE = make_probe(num_labels=3).config
VALUE = make_probe(num_labels=1, problem_type="regression").config
UNFLAGGED = ProbeConfig(id2label={0: "bad", 1: "good"})


def logits_of(probs, temperature: float = 2.0) -> torch.Tensor:
    """Return logits whose calibrated probabilities of label 1 are `probs`."""
    p = torch.tensor(probs, dtype=torch.float64)
    return torch.stack([torch.zeros_like(p), temperature * (p / (1 - p)).log()], dim=1).float()


def f1_at(threshold, scores, positives):
    return f1_score(positives, scores >= threshold, zero_division=0.0)


def test_the_threshold_has_the_best_f1():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 100)
    scores = np.clip(truth * 0.3 + rng.random(100) * 0.7, 0, 1)
    best = f1_at(best_f1_threshold(scores, truth), scores, truth)
    assert best == pytest.approx(max(f1_at(t, scores, truth) for t in scores))
    assert best_f1_threshold(np.array([0.2, 0.8]), np.array([0, 1])) == pytest.approx(0.5)
    apart = (scores > 0.5).astype(int)
    for close in (scores, 0.5 + 1e-3 * (scores - 0.5)):  # the second as at a high temperature
        assert f1_at(expected_f1_threshold(close, apart), close, apart) == 1


def test_the_best_expected_f1_is_twice_its_threshold():
    """It is so if scores are true probabilities. A tenth of the rows are positive."""
    rng = np.random.default_rng(0)
    odds = np.exp(rng.normal(-4, 3, 40_000))
    scores = odds / (1 + odds)
    positives = (rng.random(40_000) < scores).astype(int)
    best = max(f1_at(threshold, scores, positives) for threshold in np.linspace(0.2, 0.6, 21))
    assert expected_f1_threshold(scores[:20_000], positives[:20_000]) == pytest.approx(best / 2, abs=0.02)


@pytest.mark.parametrize("place", [1, 2])
def test_a_threshold_between_neighbours_keeps_them_apart(place):
    """Heads compare in float32, where there may be no number between two scores."""
    scores = [np.float32(1)]
    for _ in range(place):
        scores.append(np.nextafter(scores[-1], np.float32(0)))
    scores, truth = np.array([*scores[-2:], 0.2, 0.1], dtype=np.float32), np.array([1, 0, 0, 0])
    probs = torch.from_numpy(np.stack([1 - scores, scores], axis=1))
    for threshold in (best_f1_threshold(scores, truth), highest_recall_threshold(scores, truth, 0.0)):
        assert predictions(probs, CONFIG.replace(threshold=threshold)).tolist() == [1, 0, 0, 0]


@settings(max_examples=20, deadline=None)
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


def test_calibrate_sets_what_the_problem_has():
    generator = torch.Generator().manual_seed(0)
    logits, on = torch.randn(60, 2, generator=generator), torch.randint(0, 2, (60, 2), generator=generator)
    on[:, 1] = 0
    assert calibrate(SEVERAL, logits, on).threshold[1] == 0.5
    assert calibrate(CONFIG, logits, on[:, 1]).threshold is None
    assert calibrate(VALUE, torch.randn(5, 1), torch.randn(5, 1)) == VALUE
    scores, truth = logits_of([0.1, 0.9, 0.2, 0.8]), torch.tensor([0, 1, 0, 0])
    assert calibrate(CONFIG.replace(thresholds={"fpr-2%": 0.5}), scores, truth).thresholds is None
    unflagged = calibrate(UNFLAGGED, scores, truth)
    assert unflagged.threshold is None and unflagged.flagged is None and unflagged.temperature != 1
    for name, rule in {"expected-f1": expected_f1_threshold, "best-f1": best_f1_threshold}.items():
        fitted = calibrate(CONFIG, scores, truth, threshold_rule=name)
        assert fitted.threshold == rule(probabilities(scores, fitted).numpy()[:, 1], truth.numpy())
    rated = logits_of([0.3, 0.9, 0.2, 0.8]), torch.tensor([1, 1, 0, 0])
    assert calibrate(CONFIG, *rated, 0.5).threshold < 0.5 < calibrate(CONFIG, *rated, 0.0).threshold
    assert highest_recall_threshold(np.array([1.0, 0.3]), np.array([0, 1]), 0.0) == 1, "none keeps to it"
    logits = torch.randn(4000, 3, generator=generator) * 2
    truth = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    for scale in (1, 5):  # the temperature undoes it
        three = calibrate(THREE, logits * scale, truth)
        assert three.threshold is None and three.temperature == pytest.approx(scale, rel=0.1)


def test_thresholds_by_hand():
    table = threshold_table(logits_of([0.05, 0.36, 0.55, 0.92]), np.array([0, 1, 0, 1]), CONFIG)["yes"]
    rows = {row.pop("threshold"): row for row in table}
    assert list(rows) == [0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert rows[0.35] == {"precision": 0.6667, "recall": 1.0, "flagged": 0.75, "saved": True}
    assert rows[0.6] == {"precision": 1.0, "recall": 0.5, "flagged": 0.25, "saved": False}
    nothing = threshold_table(logits_of([0.05, 0.1]), np.array([1, 0]), CONFIG)["yes"][-1]
    assert nothing["precision"] is None and nothing["recall"] == 0
    assert threshold_table(logits_of([0.05, 0.1]), np.array([0, 0]), CONFIG) == {}


def test_reliability_by_hand():
    logits, labels = logits_of([0.12, 0.18, 0.95, 0.95]), np.array([0, 1, 1, 1])
    table = reliability(logits, labels, CONFIG)
    assert table["error"] == pytest.approx((2 * 0.35 + 2 * 0.05) / 4)
    low, high = table["bins"]
    assert low == {"low": 0.1, "high": 0.2, "rows": 2, "confidence": pytest.approx(0.15), "frequency": 0.5}
    assert (high["low"], high["rows"], high["frequency"]) == (0.9, 2, 1.0)
    uncalibrated = reliability(logits, labels, CONFIG.replace(temperature=1))
    assert table["error_uncalibrated"] == uncalibrated["error"] != table["error"]
    logits = torch.tensor([[9.0, 0, 0], [0, 9.0, 0]])
    many = reliability(logits, np.array([0, 2]), THREE)
    assert many["bins"] == [{"low": 0.9, "high": 1.0, "rows": 2, "confidence": 0.9998, "frequency": 0.5}]
    several = reliability(logits[:, :2], np.array([[1, 0], [0, 1]]), SEVERAL)
    assert sum(part["rows"] for part in several["bins"]) == 4


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 19), min_size=20, max_size=60), st.sampled_from([0.05, 0.1, 0.3]))
def test_a_rate_is_kept_to_and_used_up(twentieths, rate):
    assume(np.mean([number >= 10 for number in twentieths]) <= 0.9)  # others are refused
    logits = logits_of([number / 20 for number in twentieths])
    found = with_rates(CONFIG, logits, [rate, 0.5])
    flagged = predictions(probabilities(logits, found), found)
    assert found.threshold == found.thresholds[f"fpr-{100 * rate:g}%"] and flagged.float().mean() <= rate
    scores = probabilities(logits, found)[:, 1]
    assert (scores >= scores[flagged == 0].max()).float().mean() > rate, "one score less, and it is not kept to"
    assert found.thresholds["fpr-50%"] <= found.threshold


def rows_of(lengths):
    return PromptDataset([[5] * length for length in lengths])


def test_a_rate_is_kept_to_in_each_group():
    """A maximum over many windows is larger: long rows have higher scores."""
    assert length_groups(CONFIG, rows_of([1, 2000])) is None, "a head without windows"
    config = CONFIG.replace(window=16)
    scores = [*(0.005 * i for i in range(1, 101)), *(0.5 + 0.02 * i for i in range(1, 21))]
    logits = logits_of(scores)
    groups = length_groups(config, rows_of([64] * 100 + [65] * 20))
    assert {name: rows.tolist() for name, rows in groups.items()} == {
        "short": list(range(100)), "long": list(range(100, 120)),
    }  # fmt: skip
    rated = with_rates(config, logits, [0.1, 0.04], groups)
    assert with_rates(config, logits, [0.1]).threshold < 0.7 < rated.threshold < 0.88
    assert rated.thresholds["fpr-4%"] > 0.9, "of a group of fewer than 25 rows none is flagged"
    found = thresholds_from(rated, [0.1, 0.04], ["a"], logits, groups)
    assert found["groups"] == {
        "short": {"rows": 100, "flagged": {"fpr-10%": 0.0, "fpr-4%": 0.0}},
        "long": {"rows": 20, "flagged": {"fpr-10%": 0.1, "fpr-4%": 0.0}},
    }
    low = with_rates(config, logits.flip(0), [0.1], length_groups(config, rows_of([64] * 20 + [65] * 100)))
    assert low.threshold == rated.threshold, "of the group with the larger threshold, whichever it is"
    assert length_groups(config, rows_of([3, 4])).keys() == {"short"}


def test_either_label_can_be_the_flagged_one():
    """Two heads that differ in the order of their labels alone."""
    config = ProbeConfig(id2label={0: "bad", 1: "good"}, flagged=["bad"], temperature=2.0)
    other = CONFIG.replace(id2label={0: "good", 1: "bad"}, flagged=["bad"])
    logits, labels = logits_of([0.01 * i for i in range(1, 99)]), torch.tensor([0, 0, 1] * 32 + [1, 1])
    fitted = calibrate(config, logits.flip(1), 1 - labels)
    assert fitted.threshold == pytest.approx(calibrate(other, logits, labels).threshold)
    rated = with_rates(config, logits.flip(1), [0.1, 0.02])
    assert rated.thresholds == pytest.approx(with_rates(other, logits, [0.1, 0.02]).thresholds)
    assert fitted.flagged == rated.flagged == ["bad"] and with_rates(CONFIG, logits, [0.1]).flagged == ["yes"]


@pytest.mark.parametrize(
    "refused, words",
    [
        (lambda: check_threshold_rule(CONFIG, None, "f2"), "threshold_rule='f2'"),
        (lambda: check_threshold_rule(CONFIG, 1.0, "best-f1"), "max_false_positive_rate=1.0"),
        (lambda: check_threshold_rule(THREE, 0.1, "best-f1"), "max_false_positive_rate=0.1"),
        (lambda: check_threshold_rule(UNFLAGGED, 0.1, "best-f1"), "max_false_positive_rate=0.1 .* --flagged"),
        (lambda: check_rates(CONFIG, [0.1, 0.1], 100), "rates"),
        (lambda: check_rates(CONFIG, [0.51], 100), "rates"),
        (lambda: check_rates(CONFIG, [0.1, 0.005], 199), "200 rows"),
        (lambda: check_rates(THREE, [0.1], 100), "two labels"),
        (lambda: check_rates(UNFLAGGED, [0.1], 100), r"flagged=\['bad'\].* --flagged bad"),
        # The rows have the flagged label, or the other label is meant.
        (lambda: with_rates(CONFIG, logits_of([0.9999999] * 20), [0.1]), "100%"),
        (lambda: with_rates(CONFIG, logits_of([0.1] * 10 + [0.9995] * 10), [0.1]), "flags nothing"),
        (lambda: with_rates(CONFIG, logits_of([1e-5 * i for i in range(1, 21)]), [0.1]), "flags nearly all"),
        (lambda: with_rates(CONFIG, torch.tensor([[0.0, -1e4]] * 20), [0.1]), "hold nothing"),
    ],
)
def test_rules_and_rates_that_are_refused(refused, words):
    with pytest.raises(ProbeError, match=words):
        refused()
