"""Bootstrap intervals beside a slow loop over scikit-learn, and cases known by hand."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_probe import ProbeConfig
from llama_probe.evaluation import bootstrap
from llama_probe.evaluation.bootstrap import intervals, score_statistic
from llama_probe.evaluation.metrics import label_scores, score_logits


MULTI, REGRESSION = {"problem_type": "multi_label_classification"}, {"problem_type": "regression"}
CONFIGS = {
    "two": ProbeConfig(probe_type="gate", id2label={0: "no", 1: "yes"}, threshold=0.4, temperature=3.0),
    "many": ProbeConfig(probe_type="gate", num_labels=4),
    "several": ProbeConfig(probe_type="gate", num_labels=3, threshold=[0.3, 0.5, 0.6], temperature=0.5, **MULTI),
    "one of several": ProbeConfig(probe_type="gate", num_labels=1, **MULTI),
    "value": ProbeConfig(probe_type="gate", num_labels=1, **REGRESSION),
    "values": ProbeConfig(probe_type="gate", num_labels=2, **REGRESSION),
}


def make_rows(config: ProbeConfig, rows: int, seed: int, steps: int) -> tuple[torch.Tensor, np.ndarray]:
    """Return logits on a coarse grid, so that some are equal, and labels that correlate with them."""
    rng = np.random.default_rng(seed)
    shape = (rows, config.num_labels)
    if config.problem_type == "regression":
        return torch.from_numpy(rng.normal(size=shape)).float(), rng.integers(0, 3, shape).astype(float)
    if config.problem_type == "multi_label_classification":
        labels = target = (rng.random(shape) < 0.3).astype(float)
    else:
        labels = rng.integers(0, config.num_labels, rows)
        target = np.eye(config.num_labels)[labels]
    return torch.from_numpy(rng.integers(0, steps, shape) / steps * 4 - 2 + target).float(), labels


def slow(config: ProbeConfig, logits: torch.Tensor, labels: np.ndarray, rows: np.ndarray) -> dict:
    """Return the numbers of scikit-learn for resampled rows, by the keys of `score_statistic`; NaN if undefined."""
    logits, labels = logits[rows], labels[rows]
    with warnings.catch_warnings(action="ignore"):  # R2 of one row
        metrics = {(None, name): value for name, value in score_logits(logits, labels, config).items()}
    if config.problem_type == "regression":
        if (labels == labels[0]).all(axis=0).any():
            metrics[None, "r2"] = None  # scikit-learn gives 0 or 1
    else:
        for label, part in label_scores(logits, labels, config).items():
            metrics |= {(label, name): value for name, value in part.items() if name != "rows"}
    return metrics


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
@pytest.mark.parametrize("kind", CONFIGS)
@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 25), seed=st.integers(0, 10**6), steps=st.integers(2, 50))
def test_weights_count_as_rows_written_out(kind, rows, seed, steps):
    config = CONFIGS[kind]
    logits, labels = make_rows(config, rows, seed, steps)
    drawn = np.random.default_rng(seed).integers(0, rows, (2, rows))
    weights = np.stack([np.bincount(numbers, minlength=rows) for numbers in drawn]).astype(float)
    metrics = score_statistic(logits, labels, config)(weights)
    for index, numbers in enumerate(drawn):
        expected = slow(config, logits, labels, numbers)
        assert set(metrics) == set(expected)
        for key, value in expected.items():
            value = np.array(value, dtype=float)
            np.testing.assert_allclose(metrics[key][index], value, rtol=1e-6, atol=1e-9, err_msg=str(key))


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
    config, logits = CONFIGS["two"], torch.tensor([[2.0, 0], [0, 2], [1, 0]])
    limits = intervals(score_statistic(logits, np.array([0, 1, 0]), config), 3, resamples=200)
    assert limits[None, "auprc"] == limits[None, "auroc"] == [1.0, 1.0]
    assert limits["yes", "recall"][0] == 0, "without a positive row recall counts as 0, as in score_logits"
    limits = intervals(score_statistic(logits, np.array([0, 0, 0]), config), 3, resamples=20)
    assert limits[None, "auprc"] is limits["no", "auroc"] is limits["yes", "auroc"] is None


def test_the_seed_decides(monkeypatch):
    statistic = mean_of(np.random.default_rng(0).normal(size=50))
    first = intervals(statistic, 50, 100, seed=1)
    assert intervals(statistic, 50, 100, seed=2) != first
    monkeypatch.setattr(bootstrap, "_BLOCK", 150)  # three resamples at a time
    assert intervals(statistic, 50, 100, seed=1)["mean"] == pytest.approx(first["mean"])
