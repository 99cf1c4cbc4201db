"""Confidence intervals by bootstrap (Efron, 1979): the metrics of many resamples of the rows at once.

A resample draws as many rows as there are, with replacement. All that a metric needs of it is how often each row was drawn,
so the rows are sorted by score once for all resamples, and no resample is written out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import ProbeError
from ..heads.configuration import ProbeConfig
from .metrics import truth_and_predictions


# From weights `[resamples, rows]`, how often each row counts, to numbers `[resamples]` or `[resamples, labels]` by name;
# NaN where a metric is undefined.
Statistic = Callable[[np.ndarray], dict[str, np.ndarray]]

_BLOCK = 2**18  # weights that are worked on at a time: few enough for the processor's cache


def intervals(
    statistics: Sequence[Statistic], rows: int, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, Any]:
    """Percentile intervals of each number that the statistics give.

    Args:
        statistics: their names differ; all see the same resamples.
        rows: number of rows to resample.
        resamples: number of resamples. Those in which a metric is undefined are left out for this metric.
        seed: the same seed gives the same intervals.
        level: share of the resamples that an interval holds, half of the rest on either side.

    Returns:
        By name `[low, high]`, or a list of these for statistics a label; `None` in place of an interval where the metric
        is undefined in every resample.

    Raises:
        ProbeError: there is nothing to draw or to draw from, or `level` is not between 0 and 1.
    """
    if rows < 1 or resamples < 1 or not 0 < level < 1:
        raise ProbeError(
            f"rows={rows} and resamples={resamples} must be at least 1, and level={level} between 0 and 1"
        )
    generator = np.random.default_rng(seed)
    found: dict[str, list[np.ndarray]] = {}
    block = max(1, _BLOCK // rows)
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        drawn = (generator.integers(0, rows, rows) for _ in range(count))
        weights = np.stack([np.bincount(numbers, minlength=rows) for numbers in drawn]).astype(np.float64)
        for statistic in statistics:
            for name, values in statistic(weights).items():
                found.setdefault(name, []).append(values)
    return {name: _percentiles(np.concatenate(values), level) for name, values in found.items()}


def _percentiles(values: np.ndarray, level: float) -> Any:
    if values.ndim == 2:
        return [_percentiles(column, level) for column in values.T]
    defined = values[~np.isnan(values)]
    if not len(defined):
        return None
    return [float(value) for value in np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])]


def score_statistic(
    probs: np.ndarray, labels: np.ndarray, config: ProbeConfig, ranked: np.ndarray | None = None
) -> Statistic:
    """The metrics of `score` by their names, and those of `label_scores` as `label_*` of shape `[resamples, num_labels]`.

    Args:
        probs (`[rows, num_labels]`): probabilities, or values of a regression head. labels: see `LabelledTexts`. ranked: as for `score`.
    """
    if config.problem_type == "regression":
        return _regression_statistic(probs, labels)
    truth, predicted = truth_and_predictions(probs, labels, config)
    right = (truth == predicted).all(axis=1).astype(np.float64)
    hits, flagged, positive = (x.astype(np.float64) for x in (truth & predicted, predicted, truth))
    ranked = probs if ranked is None else ranked
    rankings = [Ranking(ranked[:, index], truth[:, index]) for index in range(config.num_labels)]
    binary = config.problem_type == "single_label_classification" and config.num_labels == 2

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        tp, given, support = weights @ hits, weights @ flagged, weights @ positive
        areas = np.stack([ranking.areas(weights) for ranking in rankings], axis=2)
        by_label = {
            "f1": _ratio(2 * tp, given + support),
            "precision": _ratio(tp, given),
            "recall": _ratio(tp, support),
            "auprc": areas[0],
            "auroc": areas[1],
        }
        # Labels that no row has or is given have no part in a mean.
        met = (given + support > 0).sum(axis=1).astype(np.float64)
        overall = {
            name: values[:, 1]
            if binary
            else _mean_of_defined(values)
            if name in ("auprc", "auroc")
            else _ratio(values.sum(axis=1), met)
            for name, values in by_label.items()
        }
        accuracy = weights @ right / weights.sum(axis=1)
        return {"accuracy": accuracy, **overall, **{f"label_{name}": values for name, values in by_label.items()}}

    return statistic


class Ranking:
    """Rows in the order of their scores for one label, and what areas that gives under any weights of the rows.

    Args:
        scores (`[rows]`): rows with the same score count as one step. positive (`[rows]`): whether the label holds.
    """

    def __init__(self, scores: np.ndarray, positive: np.ndarray):
        self.order = np.argsort(-scores, kind="stable")
        ordered, positive = scores[self.order], positive[self.order].astype(bool)
        changes = np.append(ordered[1:] != ordered[:-1], True)
        last = np.flatnonzero(changes)  # the last row of each score
        step = np.cumsum(changes) - changes  # the score that each row has, counted from 0
        # Only the scores of positive rows matter: recall rises at these alone.
        steps, self.starts = np.unique(step[positive], return_index=True)
        self.positives = self.order[positive]
        self.last, self.before = last[steps], np.append(-1, last)[steps]

    def areas(self, weights: np.ndarray) -> np.ndarray:
        """Average precision and the area under the ROC curve.

        Args:
            weights (`[resamples, rows]`): how often each row counts.

        Returns:
            `[2, resamples]`; NaN where the label holds in all rows that count, or in none.
        """
        areas = np.full((2, len(weights)), np.nan)
        if not len(self.positives):
            return areas
        new_tp = weights[:, self.positives]
        if len(self.starts) < len(self.positives):
            new_tp = np.add.reduceat(new_tp, self.starts, axis=1)
        tp = np.cumsum(new_tp, axis=1)
        ranked = np.cumsum(weights[:, self.order], axis=1)
        flagged = ranked[:, self.last]
        earlier = np.where(self.before < 0, 0.0, ranked[:, self.before])  # flagged at the score before
        positives, rows = tp[:, -1], ranked[:, -1]
        defined = (positives > 0) & (positives < rows)
        hits = np.einsum("ij,ij->i", new_tp, tp / np.maximum(flagged, 1.0))
        np.divide(hits, positives, out=areas[0], where=defined)
        # Pairs of a positive row above a negative one; negative rows of the same score count half.
        passed = (flagged - tp + earlier - (tp - new_tp)) / 2
        negatives = rows - positives
        pairs = np.einsum("ij,ij->i", new_tp, negatives[:, None] - passed)
        np.divide(pairs, positives * negatives, out=areas[1], where=defined)
        return areas


def _regression_statistic(values: np.ndarray, targets: np.ndarray) -> Statistic:
    targets = np.asarray(targets, dtype=np.float64).reshape(len(targets), -1)
    errors = np.asarray(values, dtype=np.float64).reshape(targets.shape) - targets
    centred = targets - targets.mean(axis=0)  # about 0, so that the difference below loses no digits

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        rows = weights.sum(axis=1, keepdims=True)
        squared = weights @ errors**2 / rows
        variance = weights @ centred**2 / rows - (weights @ centred / rows) ** 2
        # Rows drawn of one value alone: the variance is 0 but for rounding.
        scale = np.finfo(np.float64).eps * 16 * (centred**2).max(axis=0, initial=0.0)
        r2 = np.full(squared.shape, np.nan)
        np.divide(squared, variance, out=r2, where=variance > scale)
        return {
            "mse": squared.mean(axis=1),
            "mae": (weights @ np.abs(errors) / rows).mean(axis=1),
            "r2": (1 - r2).mean(axis=1),
        }

    return statistic


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """0 where there is nothing to divide by, as in `score`."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the labels `[resamples, labels]` that have a number; NaN where none has."""
    defined = ~np.isnan(values)
    mean = np.full(len(values), np.nan)
    count = defined.sum(axis=1)
    return np.divide(np.where(defined, values, 0.0).sum(axis=1), count, out=mean, where=count > 0)
