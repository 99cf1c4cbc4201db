"""Confidence intervals: of shares (Wilson, 1927), and by bootstrap (Efron, 1979) of the metrics of many resamples at once.

A resample draws as many rows as there are, with replacement. A metric depends only on how often each row was drawn, so
the rows are sorted by score once for all resamples, and no resample is written out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from ..heads.configuration import ProbeConfig
from .metrics import ranking_scores, truth_and_predictions


# Maps weights `[resamples, rows]`, how often each row counts, to numbers `[resamples]` or `[resamples, labels]` by name.
# NaN marks a metric that is undefined.
Statistic = Callable[[np.ndarray], dict[str, np.ndarray]]

_BLOCK = 2**18  # weights a block; 2 MiB fit into the processor's cache


def intervals(statistics: Sequence[Statistic], rows: int, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Return a 95 % percentile interval for each number of the statistics, which all see the same resamples of the rows.

    Returns:
        By name `[low, high]`, or a list of these for statistics by label. Resamples in which a metric is undefined do not
        count; it has None if there are no others.
    """
    generator = np.random.default_rng(seed)
    found: dict[str, list[np.ndarray]] = {}
    block = max(1, _BLOCK // rows)
    for start in range(0, resamples, block):
        drawn = (generator.integers(0, rows, rows) for _ in range(min(block, resamples - start)))
        weights = np.stack([np.bincount(numbers, minlength=rows) for numbers in drawn]).astype(np.float64)
        for statistic in statistics:
            for name, values in statistic(weights).items():
                found.setdefault(name, []).append(values)
    return {name: _percentiles(np.concatenate(values)) for name, values in found.items()}


def _percentiles(values: np.ndarray) -> Any:
    if values.ndim == 2:
        return [_percentiles(column) for column in values.T]
    defined = values[~np.isnan(values)]
    return np.quantile(defined, [0.025, 0.975]).tolist() if len(defined) else None


def score_statistic(logits: torch.Tensor, labels: np.ndarray, config: ProbeConfig) -> Statistic:
    """Return a statistic of what `score_logits` gives, and of what `label_scores` gives as `label_*` `[resamples, num_labels]`."""
    if config.problem_type == "regression":
        return _regression_statistic(logits.float().numpy(), labels)
    truth, predicted = truth_and_predictions(logits, labels, config)
    right = (truth == predicted).all(axis=1).astype(np.float64)
    hits, flagged, positive = (x.astype(np.float64) for x in (truth & predicted, predicted, truth))
    ranked = ranking_scores(logits, config)
    rankings = [Ranking(ranked[:, index], truth[:, index]) for index in range(config.num_labels)]

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        tp, given, support = weights @ hits, weights @ flagged, weights @ positive
        counts = {"f1": _ratio(2 * tp, given + support), "precision": _ratio(tp, given), "recall": _ratio(tp, support)}
        areas = dict(zip(("auprc", "auroc"), np.stack([r.areas(weights) for r in rankings], axis=2), strict=True))
        found = {"accuracy": weights @ right / weights.sum(axis=1)}
        if config.flagged_index is not None:
            found |= {name: values[:, config.flagged_index] for name, values in {**counts, **areas}.items()}
        else:
            # A mean leaves out labels that no row has or is given, and areas that are undefined (NaN).
            met = (given + support > 0).sum(axis=1).astype(np.float64)
            found |= {name: _ratio(values.sum(axis=1), met) for name, values in counts.items()}
            means = {name: np.ma.masked_invalid(values).mean(axis=1) for name, values in areas.items()}
            found |= {name: values.filled(np.nan) for name, values in means.items()}
        return found | {f"label_{name}": values for name, values in {**counts, **areas}.items()}

    return statistic


class Ranking:
    """Rows sorted by their `scores` for one label, which the `positive` ones have, for areas under any weights of the rows.

    Rows with the same score count as one step.
    """

    def __init__(self, scores: np.ndarray, positive: np.ndarray):
        self.order = np.argsort(-scores, kind="stable")
        ordered, positive = scores[self.order], positive[self.order].astype(bool)
        changes = np.append(ordered[1:] != ordered[:-1], True)
        last = np.flatnonzero(changes)  # the last row of each score
        step = np.cumsum(changes) - changes  # the number of the score of each row, from 0
        # Recall rises only at the scores of positive rows.
        steps, self.starts = np.unique(step[positive], return_index=True)
        self.positives = self.order[positive]
        self.last, self.before = last[steps], np.append(-1, last)[steps]

    def areas(self, weights: np.ndarray) -> np.ndarray:
        """Return average precision and the area under the ROC curve `[2, resamples]` for weights `[resamples, rows]`.

        They are NaN if all rows that count have the label, or none.
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
        # Count pairs of a positive row above a negative one. Negative rows of the same score count half.
        passed = (flagged - tp + earlier - (tp - new_tp)) / 2
        negatives = rows - positives
        pairs = np.einsum("ij,ij->i", new_tp, negatives[:, None] - passed)
        np.divide(pairs, positives * negatives, out=areas[1], where=defined)
        return areas


def _regression_statistic(values: np.ndarray, targets: np.ndarray) -> Statistic:
    targets = np.asarray(targets, dtype=np.float64).reshape(len(targets), -1)
    errors = np.asarray(values, dtype=np.float64).reshape(targets.shape) - targets
    centred = targets - targets.mean(axis=0)  # keeps the digits of the variance below

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        rows = weights.sum(axis=1, keepdims=True)
        squared = weights @ errors**2 / rows
        variance = weights @ centred**2 / rows - (weights @ centred / rows) ** 2
        # If all rows drawn have one value, the variance is rounding error.
        scale = np.finfo(np.float64).eps * 16 * (centred**2).max(axis=0, initial=0.0)
        unexplained = np.full(squared.shape, np.nan)
        np.divide(squared, variance, out=unexplained, where=variance > scale)
        absolute = weights @ np.abs(errors) / rows
        return {"mse": squared.mean(axis=1), "mae": absolute.mean(axis=1), "r2": (1 - unexplained).mean(axis=1)}

    return statistic


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide; 0 / 0 is 0, as in `score_logits`."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def share_interval(count: int, rows: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of rows (Wilson, 1927)."""
    low, high = binomtest(count, rows).proportion_ci(method="wilson")
    return float(low), float(high)
