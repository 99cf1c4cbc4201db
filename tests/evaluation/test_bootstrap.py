"""Bootstrap intervals known by hand."""

import numpy as np
import pytest
import torch

from llama_probe import ProbeConfig
from llama_probe.evaluation import bootstrap
from llama_probe.evaluation.bootstrap import intervals
from llama_probe.evaluation.metrics import score_statistic


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
    config, logits = ProbeConfig(id2label={0: "no", 1: "yes"}, threshold=0.4), torch.tensor([[2.0, 0], [0, 2], [1, 0]])
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
