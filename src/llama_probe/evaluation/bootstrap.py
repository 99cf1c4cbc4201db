"""Confidence intervals: of shares (Wilson, 1927), and of metrics by bootstrap (Efron, 1979), for many resamples at once.

A metric depends only on how often each row was drawn, so the rows are sorted by score once for all resamples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from scipy.stats import binomtest, bootstrap

from ..heads.configuration import ProbeConfig
from .metrics import AREAS, ranking_scores, truth_and_predictions


# A label and a metric; None for the metric of all labels.
Key = tuple[str | None, str]
# Maps weights `[resamples, rows]`, how often each row counts, to metrics `[resamples]`. NaN marks one that is undefined.
Statistic = Callable[[np.ndarray], dict[Key, np.ndarray]]
Interval = list[float] | None

_BLOCK = 2**17  # weights a block; 1 MiB fits into the processor's cache


def intervals(statistic: Statistic, rows: int, resamples: int = 1000, seed: int = 0) -> dict[Key, Interval]:
    """Return a 95 % percentile interval `[low, high]` for each metric of a statistic, from resamples of the rows.

    Resamples in which a metric is undefined do not count. It has None if there are no others.
    """
    keys: list[Key] = []

    def compute(drawn: np.ndarray, axis: int) -> np.ndarray:
        weights = np.stack([np.bincount(numbers, minlength=rows) for numbers in drawn]).astype(np.float64)
        metrics = statistic(weights)
        keys[:] = metrics
        return np.stack(list(metrics.values()))

    places = np.arange(max(rows, 2)) % rows  # SciPy draws from two rows at least
    settings = {"n_resamples": resamples, "batch": max(1, _BLOCK // rows), "method": "percentile", "vectorized": True}
    with warnings.catch_warnings(action="ignore"):  # of undefined metrics
        distribution = bootstrap((places,), compute, rng=seed, **settings).bootstrap_distribution
        limits = np.nanquantile(distribution, [0.025, 0.975], axis=1).T.tolist()
    return {key: None if np.isnan(limit[0]) else limit for key, limit in zip(keys, limits, strict=True)}


def score_statistic(logits: torch.Tensor, labels: np.ndarray, config: ProbeConfig) -> Statistic:
    """Return a statistic of what `score_logits` and, by label, `label_scores` give."""
    if config.problem_type == "regression":
        return _regression_statistic(logits.float().numpy(), labels)
    truth, predicted = truth_and_predictions(logits, labels, config)
    right = (truth == predicted).all(axis=1).astype(np.float64)
    counted = np.concatenate([truth & predicted, predicted, truth], axis=1).astype(np.float64)
    ranked = ranking_scores(logits, labels, config)
    rankings = [Ranking(ranked[:, index], truth[:, index]) for index in range(config.num_labels)]

    def statistic(weights: np.ndarray) -> dict[Key, np.ndarray]:
        tp, predictions, support = np.split(weights @ counted, 3, axis=1)  # [resamples, num_labels] each
        by_label = {
            "f1": _ratio(2 * tp, predictions + support),
            "precision": _ratio(tp, predictions),
            "recall": _ratio(tp, support),
        }
        by_label |= dict(zip(AREAS, np.stack([r.areas(weights) for r in rankings], axis=2), strict=True))
        metrics: dict[Key, np.ndarray] = {(None, "accuracy"): weights @ right / weights.sum(axis=1)}
        for name, values in by_label.items():
            if config.flagged_index is not None:
                metrics[None, name] = values[:, config.flagged_index]
            elif name in AREAS:
                metrics[None, name] = np.nanmean(values, axis=1)
            else:  # a mean leaves out labels that no row has or is given
                metrics[None, name] = _ratio(values.sum(axis=1), (predictions + support > 0).sum(axis=1))
            metrics |= {(label, name): values[:, index] for index, label in config.id2label.items()}
        return metrics

    return statistic


def auroc_interval(scores: np.ndarray, positive: np.ndarray, resamples: int = 1000) -> Interval:
    """Return the 95 % interval of the area under the ROC curve for scores `[rows]` and a mask `[rows]`."""
    ranking = Ranking(scores, positive)
    (interval,) = intervals(
        lambda weights: {(None, "auroc"): ranking.areas(weights)[1]}, len(scores), resamples
    ).values()
    return interval


class Ranking:
    """Rows ranked by their `scores` for one label, which the `positive` ones have, for areas under any weights of the rows.

    Rows with the score NaN do not count.
    """

    def __init__(self, scores: np.ndarray, positive: np.ndarray):
        order = np.argsort(-scores, kind="stable")[: np.count_nonzero(~np.isnan(scores))]
        self.positives, self.negatives = order[positive[order]], order[~positive[order]]
        hits, others = -scores[self.positives], -scores[self.negatives]
        # For each positive row the number of positive rows with at least its score, and of negative ones with more or as much.
        self.hits = np.searchsorted(hits, hits, "right")
        self.above, self.reached = (np.searchsorted(others, hits, side) for side in ("left", "right"))

    def areas(self, weights: np.ndarray) -> np.ndarray:
        """Return average precision and the area under the ROC curve `[2, resamples]` for weights `[resamples, rows]`.

        They are NaN if all rows that count have the label, or none.
        """
        new = weights[:, self.positives]
        tp, fp = _running_totals(new), _running_totals(weights[:, self.negatives])
        positives, negatives = tp[:, -1], fp[:, -1]
        hits, false_hits = tp[:, self.hits], fp[:, self.reached]
        precision = np.einsum("ij,ij->i", new, hits / np.maximum(hits + false_hits, 1))
        # Negative rows of the same score count half.
        pairs = np.einsum("ij,ij->i", new, negatives[:, None] - (false_hits + fp[:, self.above]) / 2)
        areas = np.stack([precision / np.maximum(positives, 1), pairs / np.maximum(positives * negatives, 1)])
        return np.where((positives > 0) & (negatives > 0), areas, np.nan)


def _running_totals(weights: np.ndarray) -> np.ndarray:
    """Return the sums of the first 0, 1, ... n columns of `[resamples, n]`."""
    totals = np.zeros((len(weights), weights.shape[1] + 1))
    np.cumsum(weights, axis=1, out=totals[:, 1:])
    return totals


def _regression_statistic(values: np.ndarray, targets: np.ndarray) -> Statistic:
    targets = np.asarray(targets, dtype=np.float64).reshape(len(targets), -1)
    errors = np.asarray(values, dtype=np.float64).reshape(targets.shape) - targets
    centred = targets - targets.mean(axis=0)  # keeps the digits of the variance below

    def statistic(weights: np.ndarray) -> dict[Key, np.ndarray]:
        rows = weights.sum(axis=1, keepdims=True)
        squared = weights @ errors**2 / rows
        variance = weights @ centred**2 / rows - (weights @ centred / rows) ** 2
        # If all rows drawn have one value, the variance is rounding error.
        variance[variance <= 1e-14 * (centred**2).max(axis=0)] = np.nan
        metrics = {"mse": squared, "mae": weights @ np.abs(errors) / rows, "r2": 1 - squared / variance}
        return {(None, name): each.mean(axis=1) for name, each in metrics.items()}

    return statistic


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide; 0 / 0 is 0, as in `score_logits`."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def share_interval(count: int, rows: int) -> list[float]:
    """Return the 95 % interval of a share of rows (Wilson, 1927)."""
    return list(map(float, binomtest(count, rows).proportion_ci(method="wilson")))
