"""95 % confidence intervals: of shares (Wilson, 1927), and of statistics by bootstrap (Efron, 1979)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import TypeVar

import numpy as np
from scipy.stats import binomtest, bootstrap

from ..files import JSON
from .metrics import Ranking


Name = TypeVar("Name", bound=Hashable)
Interval = list[float] | None

_BLOCK = 2**17  # weights a block; 1 MiB fits into the processor's cache


def intervals(
    statistic: Callable[[np.ndarray], dict[Name, np.ndarray]], rows: int, resamples: int = 1000
) -> dict[Name, Interval]:
    """Return a percentile interval `[low, high]` for each value of a statistic; None if all its values are undefined.

    Args:
        statistic: maps weights `[resamples, rows]`, how often each row counts, to values `[resamples]` by name. NaN is undefined.
    """

    def compute(drawn: np.ndarray, axis: int) -> np.ndarray:
        weights = np.stack([np.bincount(numbers, minlength=rows) for numbers in drawn]).astype(np.float64)
        return np.stack(list(statistic(weights).values()))

    places = np.arange(max(rows, 2)) % rows  # SciPy draws from two rows at least
    settings = {"n_resamples": resamples, "batch": max(1, _BLOCK // rows), "method": "percentile", "vectorized": True}
    with warnings.catch_warnings(action="ignore"):  # of undefined values
        names = list(statistic(np.ones((1, rows))))
        distribution = bootstrap((places,), compute, rng=0, **settings).bootstrap_distribution
        limits = np.nanquantile(distribution, [0.025, 0.975], axis=1).T.tolist()
    return {name: None if np.isnan(limit[0]) else limit for name, limit in zip(names, limits, strict=True)}


def auroc(scores: np.ndarray, positive: np.ndarray, resamples: int = 1000) -> tuple[float | None, Interval]:
    """Return the area under the ROC curve and its interval, for scores `[rows]` and bools `[rows]`: True for rows with the label.

    Both are None if all rows have the label, or none. The interval is None without resamples.
    """
    ranking = Ranking(scores, positive)
    area = float(ranking.areas(np.ones((1, len(scores))))[1, 0])
    if np.isnan(area) or not resamples:
        return None if np.isnan(area) else area, None
    limits = intervals(lambda weights: {"auroc": ranking.areas(weights)[1]}, len(scores), resamples)
    return area, limits["auroc"]


def share_of(holds: np.ndarray) -> JSON:
    """Return the `share` of the rows for which a condition holds, `[rows]` bool, and its `interval`."""
    limits = binomtest(int(holds.sum()), len(holds)).proportion_ci(method="wilson")
    return {"share": float(holds.mean()), "interval": list(map(float, limits))}
