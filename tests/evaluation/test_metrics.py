"""Metrics and their intervals beside scikit-learn, and cases known by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import MULTI, REGRESSION, make_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from llama_probe import ProbeConfig, ProbeError
from llama_probe.evaluation import metrics as ours
from llama_probe.evaluation.bootstrap import intervals
from llama_probe.evaluation.calibration import best_f1_threshold, calibrate, threshold_table
from llama_probe.evaluation.report import detailed_report
from llama_probe.heads.decision import log_odds, predictions, probabilities


CONFIGS = {
    "two": ProbeConfig(probe_type="gate", id2label={0: "no", 1: "yes"}, threshold=0.4, temperature=3.0),
    "many": ProbeConfig(probe_type="gate", num_labels=4),
    "several": ProbeConfig(probe_type="gate", num_labels=3, threshold=[0.3, 0.5, 0.6], temperature=0.5, **MULTI),
    "one of several": ProbeConfig(probe_type="gate", num_labels=1, **MULTI),
    "value": ProbeConfig(probe_type="gate", **REGRESSION),
    "values": ProbeConfig(probe_type="gate", **REGRESSION | {"num_labels": 2}),
}


def config(**changes):
    return ProbeConfig(probe_type="gate", **changes)


COUNTED, RANKED = ("f1", "precision", "recall"), {"auprc": sk.average_precision_score, "auroc": sk.roc_auc_score}


def by_scikit_learn(config, logits, labels):
    """Return the metrics by label and name; NaN if undefined."""
    if config.problem_type == "regression":
        r2 = float("nan") if (labels == labels[0]).all(axis=0).any() else sk.r2_score(labels, logits)
        errors = sk.mean_squared_error(labels, logits), sk.mean_absolute_error(labels, logits)
        return {(None, "mse"): errors[0], (None, "mae"): errors[1], (None, "r2"): r2}
    truth, predicted = labels, predictions(probabilities(logits, config), config).numpy()
    if config.problem_type == "single_label_classification":
        truth, predicted = (np.eye(config.num_labels)[rows] for rows in (labels, predicted))
    metrics, odds = {(None, "accuracy"): (truth == predicted).all(axis=1).mean()}, log_odds(logits, config).numpy()
    for index, label in config.id2label.items():
        pair, has_both = (truth[:, index], predicted[:, index]), len(set(truth[:, index])) == 2
        for name in COUNTED:
            metrics[label, name] = getattr(sk, f"{name}_score")(*pair, zero_division=0)
        for name, area in RANKED.items():
            metrics[label, name] = area(pair[0], odds[:, index]) if has_both else float("nan")
    occurs = (truth + predicted > 0).any(axis=0)
    for name in (*COUNTED, *RANKED):
        values = np.array([metrics[label, name] for label in config.id2label.values()])
        defined = values[occurs if name in COUNTED else ~np.isnan(values)]
        mean = defined.mean() if len(defined) else 0.0 if name in COUNTED else float("nan")
        metrics[None, name] = mean if config.flagged_index is None else values[config.flagged_index]
    return metrics


@pytest.mark.parametrize("problem", CONFIGS)
@settings(max_examples=4, deadline=None)
@given(rows=st.integers(1, 25), seed=st.integers(0, 10**6), steps=st.integers(2, 50))
def test_weights_count_as_rows_written_out(problem, rows, seed, steps):
    config = CONFIGS[problem]
    logits, labels = make_scores(config, rows, seed, steps)
    drawn = np.random.default_rng(seed).integers(0, rows, (2, rows))
    weights = np.stack([np.bincount(numbers, minlength=rows) for numbers in drawn]).astype(float)
    metrics = ours.score_statistic(logits, labels, config)(weights)
    for index, numbers in enumerate(drawn):
        expected = by_scikit_learn(config, logits[numbers], labels[numbers])
        assert set(metrics) == set(expected)
        for key, value in expected.items():
            np.testing.assert_allclose(metrics[key][index], value, rtol=1e-6, atol=1e-9, err_msg=str(key))


@pytest.mark.parametrize(
    "head, logits, labels",
    [
        (config(), [[0, 25], [0, 18], [0, 22], [0, -3]], [1, 0, 1, 0]),  # three probabilities are 1 in float32
        (config(num_labels=2, **MULTI), [[3, 25], [0, -18]], [[1, 1], [0, 0]]),
        (config(**REGRESSION), [[1], [2]], [1, 4]),
    ],
)
def test_the_trainers_callback_gives_the_numbers_of_a_report(head, logits, labels):
    evaluated = SimpleNamespace(predictions=np.array(logits, np.float32), label_ids=np.array(labels))
    truth = evaluated.label_ids.reshape(len(labels), -1) if head.num_labels == 1 else evaluated.label_ids
    expected = ours.score_logits(torch.from_numpy(evaluated.predictions), truth, head)
    assert ours.compute_metrics(head)(evaluated) == pytest.approx(expected)
    assert expected.get("auroc", 1.0) == 1.0 and expected.get("mse", 2.0) == 2.0


def test_a_label_counts_on_the_rows_where_it_is_known():
    rng = np.random.default_rng(0)
    head, logits = config(num_labels=2, **MULTI), torch.randn(80, 2, generator=torch.Generator().manual_seed(0))
    labels = rng.integers(0, 2, (80, 2)).astype(np.float32)
    labels[:30, 0], labels[50:, 1] = np.nan, np.nan
    one = config(num_labels=1, **MULTI)
    apart = [(logits[30:, :1], labels[30:, :1]), (logits[:50, 1:], labels[:50, 1:])]
    expected = [ours.all_scores(ours.score_statistic(*part, one), len(part[1]))["LABEL_0"] for part in apart]
    scores = ours.all_scores(ours.score_statistic(logits, labels, head), 80)
    assert [scores[name] for name in head.id2label.values()] == [pytest.approx(part) for part in expected]
    report, calibrated = detailed_report(head, logits, labels), calibrate(head, logits, torch.tensor(labels))
    assert report["auroc"] == pytest.approx(np.mean([part["auroc"] for part in expected]))
    low, high = report["labels"]["LABEL_1"]["intervals"]["auroc"]
    assert low < expected[1]["auroc"] < high
    for index, part in enumerate(apart):
        warm = one.replace(temperature=calibrated.temperature)
        alone = best_f1_threshold(probabilities(part[0], warm)[:, 0].numpy(), part[1][:, 0])
        assert calibrate(head, logits, torch.tensor(labels), None, "best-f1").threshold[index] == pytest.approx(alone)
        assert threshold_table(logits, labels, head)[f"LABEL_{index}"] == threshold_table(*part, one)["LABEL_0"]
    assert sum(each["rows"] for each in report["calibration"]["bins"]) == 100


def test_confusion_and_outcomes_by_hand():
    probs = torch.tensor([[0.3, 0.7], [0.6, 0.4], [0.9, 0.1], [0.2, 0.8]])
    assert ours.confusion(probs.log(), np.array([1, 0, 0, 0]), config(threshold=0.35)) == [[1, 2], [0, 1]]
    several = config(num_labels=2, threshold=[0.25, 0.75], **MULTI)
    assert ours.outcomes(probs.logit(), np.array([[1.0, 0], [0, 1], [0, 0], [0, 0]]), several) == {
        "LABEL_0": {"found": 1, "missed": 0, "wrong": 2},
        "LABEL_1": {"found": 0, "missed": 1, "wrong": 1},
    }


@pytest.mark.parametrize(
    "changes, metric",
    [({}, "auprc"), ({"num_labels": 3}, "accuracy"), ({"num_labels": 3, **MULTI}, "auprc"), (REGRESSION, "r2")],
)
def test_what_a_head_is_chosen_by(changes, metric):
    head = config(**changes)
    assert ours.default_metric(head) == metric
    labels = np.arange(6).reshape(-1, 1) % 2 if changes == REGRESSION else np.arange(6) % head.num_labels
    labels = np.eye(3)[labels] if head.problem_type == MULTI["problem_type"] else labels
    ours.check_metric(metric, labels, head)
    with pytest.raises(ProbeError, match="metric='loss'"):
        ours.check_metric("loss", labels, head)
    if metric != "accuracy":  # of rows that are all alike it has no value
        with pytest.raises(ProbeError, match=f"{metric} is not defined"):
            ours.check_metric(metric, labels * 0, head)


def test_numbers_that_are_none_are_refused():
    with pytest.raises(ProbeError, match="no number"):
        ours.score_logits(torch.tensor([[0.5, float("nan")]]), np.array([1]), config())


def test_a_summary_has_the_shape_of_a_report():
    reports = [{"rows": 3, "f1": f1, "auprc": None, "slices": {"a": {"x": {"f1": 1.0}}}} for f1 in (0.4, 0.6, 0.8)]
    found, one = ours.summarize(reports), {"mean": 1, "std": 0}
    assert found.pop("f1") == pytest.approx({"mean": 0.6, "std": 0.2})
    assert found == {"rows": 3, "auprc": None, "slices": {"a": {"x": {"f1": one}}}}
    assert ours.summarize(reports[:1])["f1"] == {"mean": 0.4, "std": 0.0}


def mean_of(values):
    values = np.asarray(values, dtype=float)
    return lambda weights: {"mean": weights @ values / weights.sum(axis=1)}


def test_intervals_by_hand():
    # Two rows, 0 and 1: a resample has the mean 0, 0.5 or 1 in a quarter, a half and a quarter of all draws.
    assert intervals(mean_of([0, 1]), 2)["mean"] == [0.0, 1.0]
    assert intervals(mean_of([3]), 1, resamples=1)["mean"] == [3.0, 3.0]
    # A share of 0.8 of 400 rows has a standard error of 0.02.
    low, high = intervals(mean_of([1] * 320 + [0] * 80), 400, resamples=4000)["mean"]
    assert (low, high) == pytest.approx((0.8 - 1.96 * 0.02, 0.8 + 1.96 * 0.02), abs=0.006)


def test_undefined_resamples_are_left_out():
    head, logits = config(id2label={0: "no", 1: "yes"}, threshold=0.4), torch.tensor([[2.0, 0], [0, 2], [1, 0]])
    limits = intervals(ours.score_statistic(logits, np.array([0, 1, 0]), head), 3, resamples=200)
    assert limits[None, "auprc"] == limits[None, "auroc"] == [1.0, 1.0]
    assert limits["yes", "recall"][0] == 0, "without a positive row recall counts as 0, as in score_logits"
    limits = intervals(ours.score_statistic(logits, np.array([0, 0, 0]), head), 3, resamples=20)
    assert limits[None, "auprc"] is limits["no", "auroc"] is limits["yes", "auroc"] is None
