"""Temperature and threshold of a head, fitted on validation rows and saved in its config, and how well they do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from sklearn.linear_model import LogisticRegression
from torch.utils.data import Dataset
from transformers.utils import logging

from ..data.batches import counted_lengths
from ..errors import ProbeError
from ..files import JSON
from ..heads.configuration import ProbeConfig
from ..heads.decision import check_numbers, probabilities, probe_loss, threshold_of
from .metrics import known_rows


logger = logging.get_logger(__name__)

# A lower threshold flags nearly all texts that are unlike the fitted rows, a higher threshold next to nothing.
_LOWEST, _HIGHEST = 0.001, 0.999
# A head that gives the flagged label to a larger share of rows that should not be flagged has learned the other label.
_MOST_FLAGGED = 0.9
_SHORT_WINDOWS = 4  # a row of more windows is long
_BINS = 10  # bins of equal width that compare confidence with frequency


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor, config: ProbeConfig) -> float:
    """Return the temperature with the lowest cross-entropy (Guo et al., arXiv 1706.04599), between 0.05 and 20.

    Args:
        logits (`torch.FloatTensor` of shape `[rows, num_labels]`), labels: of validation rows.
    """
    logits = logits.double()

    def loss(log_temperature: float) -> float:
        return float(probe_loss(logits / math.exp(log_temperature), labels, config))

    bounds = math.log(0.05), math.log(20.0)
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-7}).x)


def best_f1_threshold(scores: np.ndarray, positives: np.ndarray) -> float:
    """Return the threshold with the highest F1, halfway to the next lower score; of several such thresholds the lowest.

    Args:
        scores (`[rows]`): probabilities of the positive label.
        positives (`[rows]`): 0 or 1, both of which occur; or how likely each row is positive, for the highest expected F1.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    likely = positives[order]
    f1 = 2 * likely.cumsum() / (np.arange(1, len(ranked) + 1) + likely.sum())  # of the first 1, 2, ... rows
    f1[:-1][ranked[:-1] == ranked[1:]] = -1.0  # no threshold separates equal scores
    best = len(f1) - 1 - int(np.argmax(f1[::-1]))
    return _halfway(ranked[best], ranked[best + 1] if best + 1 < len(ranked) else 0.0)


def expected_f1_threshold(scores: np.ndarray, positives: np.ndarray) -> float:
    """Return the threshold with the highest expected F1; arguments as for `best_f1_threshold`.

    The F1 of the rows jumps from row to row, so with few positives its best threshold is chance. Here a logistic map of the log
    odds (Platt, 1999) gives each row a probability of being positive. The threshold is the best for these probabilities
    (Lipton, Elkan and Narayanaswamy, arXiv 1402.1892).
    """
    bounded = scores.astype(np.float64).clip(1e-7, 1 - 1e-7)
    log_odds = np.log(bounded / (1 - bounded))[:, None]
    log_odds /= log_odds.std() or 1.0  # else the penalty of the fit counts for more, the closer the scores are
    fit = LogisticRegression(C=100.0, max_iter=1000).fit(log_odds, positives)
    return best_f1_threshold(scores, fit.predict_proba(log_odds)[:, 1])


def highest_recall_threshold(scores: np.ndarray, positives: np.ndarray, max_false_positive_rate: float) -> float:
    """Return the threshold with the highest recall that flags at most a share of the negative rows.

    Of several such thresholds it is the highest, halfway to the next lower score. If no positive row can be flagged, the threshold
    is above every score. If too many negative rows have the score 1, the threshold is 1, with a warning. Arguments as for
    `best_f1_threshold`; the rate is at least 0 and below 1.
    """
    limit = highest_unflagged(scores[positives == 0], max_false_positive_rate)
    if limit >= 1:
        logger.warning(
            f"More than {max_false_positive_rate:g} of the rows without the label have a probability of 1: no threshold "
            "keeps to max_false_positive_rate."
        )
        return 1.0
    upper = scores[(positives == 1) & (scores > limit)].min(initial=1.0)
    return _halfway(upper, scores[scores < upper].max())


def highest_unflagged(scores: np.ndarray, rate: float) -> float:
    """Return the highest of the scores `[rows]` that a threshold must not flag if it flags at most a share of them."""
    return np.sort(scores)[::-1][int(rate * len(scores) + 1e-9)]


def check_rates(config: ProbeConfig, rates: Sequence[float], rows: int | None = None) -> None:
    """Raise `ProbeError` unless a head can have a threshold for each rate, fitted on this number of rows."""
    config.need_flagged_index("rates")
    if not rates or not all(0 < rate <= 0.5 for rate in rates) or len(set(rates)) < len(rates):
        raise ProbeError(f"rates={list(rates)} must be different numbers above 0 and at most 0.5")
    least = math.ceil(1 / min(rates) - 1e-9)
    if rows is not None and rows < least:
        raise ProbeError(f"rates={list(rates)}: {min(rates):g} needs at least {least:,} rows, not {rows:,}")


def length_groups(config: ProbeConfig, dataset: Dataset) -> dict[str, np.ndarray] | None:
    """Return the numbers of the `short` rows and of the `long` rows of a data set; None for a head without windows.

    The tokens that count in a short row fill up to 4 windows side by side. A maximum over many windows is larger, so a threshold of
    short rows would flag more long rows than it says.

    Args:
        dataset: a `PromptDataset` or a `StateDataset`.
    """
    if not config.window:
        return None
    is_long = np.array(counted_lengths(config, dataset)) > _SHORT_WINDOWS * config.window
    groups = {"short": np.flatnonzero(~is_long), "long": np.flatnonzero(is_long)}
    return {name: rows for name, rows in groups.items() if len(rows)}


def with_rates(
    config: ProbeConfig,
    logits: torch.Tensor,
    rates: Sequence[float],
    groups: Mapping[str, np.ndarray] | None = None,
) -> ProbeConfig:
    """Return `config` with a named threshold for each share of harmless rows that the head may flag; the first is the head's own.

    Args:
        logits (`torch.FloatTensor` of shape `[rows, 2]`): logits of rows that the flagged label does not fit.
        rates: shares of these rows; see `check_rates`. The threshold for 0.005 has the name `fpr-0.5%`.
        groups: numbers of rows by the name of their group. A threshold keeps to its rate in each group. Of a group with fewer
            rows than 1 / rate no row is flagged. Defaults to one group of all rows.

    Raises:
        ProbeError: most rows get the flagged label, the head reads nothing of them, or a threshold would flag nothing or
            nearly all of other rows.
    """
    check_numbers(logits)
    index = config.need_flagged_index("rates")
    label = config.id2label[index]
    scores = probabilities(logits.float(), config)[:, index].numpy()
    share = float((scores >= 0.5).mean())
    if share > _MOST_FLAGGED:
        raise ProbeError(f"{share:.0%} of the rows get {label!r}, the label to flag: wrong rows, or another --flagged")
    if not scores.any():  # heads of tools give such rows the probability 0
        raise ProbeError(f"token_scope={config.token_scope!r}: the rows hold nothing that the head reads")
    thresholds = {}
    for rate in rates:
        name = f"fpr-{100 * rate:g}%"
        parts = [scores] if groups is None else [scores[rows] for rows in groups.values()]
        limit = max(highest_unflagged(part, rate) for part in parts)
        threshold = _halfway(scores[scores > limit].min(initial=1.0), limit)
        thresholds[name] = threshold
        if not _LOWEST <= threshold <= _HIGHEST:
            flags = "nothing" if threshold > _HIGHEST else "nearly all"
            raise ProbeError(f"{name} gives {label!r} the threshold {threshold:.5f}: it flags {flags} of other rows")
    return config.replace(flagged=[label], threshold=next(iter(thresholds.values())), thresholds=thresholds)


def thresholds_from(
    config: ProbeConfig,
    rates: Sequence[float],
    sources: Sequence[str],
    logits: torch.Tensor,
    groups: Mapping[str, np.ndarray] | None = None,
) -> JSON:
    """Return what `results.json` keeps of the rows and rates that gave a config its thresholds in `with_rates`.

    With `groups` there are `groups`: for each its `rows`, and the share that each threshold flags as `flagged`.
    """
    by_name = dict(zip(config.thresholds, rates, strict=True))
    found = {"flagged": config.flagged[0], "sources": list(sources), "rows": len(logits), "rates": by_name}
    if groups is None:
        return found
    scores = probabilities(logits.float(), config)[:, config.flagged_index].numpy()
    found["groups"] = {}
    for name, rows in groups.items():
        shares = {key: float((scores[rows] >= threshold).mean()) for key, threshold in config.thresholds.items()}
        found["groups"][name] = {"rows": len(rows), "flagged": shares}
    return found


def own_threshold(config: ProbeConfig, index: int) -> float:
    """Return the probability from which a head gives a label; 0.5 if the larger of two probabilities decides."""
    threshold = threshold_of(config, index)
    return 0.5 if threshold is None else threshold


def _halfway(upper: float, lower: float) -> float:
    """Return a threshold that flags the upper and not the lower of two scores."""
    middle = (float(upper) + float(lower)) / 2
    # Heads compare in float32, where the middle of two neighbours may equal the lower neighbour.
    return float(upper) if np.float32(middle) <= np.float32(lower) else middle


_THRESHOLD_RULES = {"expected-f1": expected_f1_threshold, "best-f1": best_f1_threshold}


def check_threshold_rule(config: ProbeConfig, max_false_positive_rate: float | None, threshold_rule: str) -> None:
    """Raise `ProbeError` if the rule or the rate is not allowed, or the head has no threshold."""
    if threshold_rule not in _THRESHOLD_RULES:
        raise ProbeError(f"threshold_rule={threshold_rule!r} must be one of: {', '.join(_THRESHOLD_RULES)}")
    rate = max_false_positive_rate
    if rate is None:
        return
    if config.problem_type != "multi_label_classification":
        config.need_flagged_index(f"max_false_positive_rate={rate!r}")
    if not 0 <= rate < 1:
        raise ProbeError(f"max_false_positive_rate={rate!r} must be at least 0 and below 1")


def calibrate(
    config: ProbeConfig,
    logits: torch.Tensor,
    labels: torch.Tensor,
    max_false_positive_rate: float | None = None,
    threshold_rule: str = "expected-f1",
) -> ProbeConfig:
    """Return `config` with the temperature and the thresholds that suit validation rows.

    Heads that flag one of two labels and multi-label heads get thresholds. Regression heads are returned unchanged. A label
    that no row or each row has keeps the default threshold.

    Args:
        logits (`torch.FloatTensor` of shape `[rows, num_labels]`), labels: of validation rows.
        max_false_positive_rate: choose the highest recall with at most this share of the negative rows flagged, for each
            label by itself. Defaults to the `threshold_rule`.
        threshold_rule: `"expected-f1"` or `"best-f1"`; see `check_threshold_rule`.
    """
    check_numbers(logits)
    if config.problem_type == "regression":
        return config
    temperature = fit_temperature(logits, labels, config)
    config = config.replace(temperature=temperature, threshold=None, thresholds=None)
    probs = probabilities(logits.float(), config).numpy()

    def choose(index: int, default: float | None) -> float | None:
        rows, positives = known_rows(labels.numpy(), index, config)
        if not 0 < positives.sum() < len(positives):
            return default
        if max_false_positive_rate is None:
            return _THRESHOLD_RULES[threshold_rule](probs[rows, index], positives)
        return highest_recall_threshold(probs[rows, index], positives, max_false_positive_rate)

    if config.problem_type == "multi_label_classification":
        return config.replace(threshold=[choose(index, 0.5) for index in range(config.num_labels)])
    index = config.flagged_index
    return config if index is None else config.replace(threshold=choose(index, None))


def reliability(logits: torch.Tensor, labels: np.ndarray, config: ProbeConfig) -> JSON:
    """Compare the confidence of a head with how often it is right (Guo et al., arXiv 1706.04599).

    The confidence is the probability of the flagged one of two labels, of each label of a multi-label head, or else the largest
    probability.

    Returns:
        `error`: expected calibration error with the saved temperature; `error_uncalibrated`: the same at temperature 1;
        `bins`: for each that is not empty, `low`, `high`, `rows`, mean `confidence` and `frequency`.
    """
    error, bins = _error_and_bins(logits, labels, config)
    uncalibrated, _ = _error_and_bins(logits, labels, config.replace(temperature=1.0))
    return {"error": error, "error_uncalibrated": uncalibrated, "bins": bins}


def _error_and_bins(logits: torch.Tensor, labels: np.ndarray, config: ProbeConfig) -> tuple[float, list[JSON]]:
    """Return `error` and `bins` of `reliability`. A multi-label head decides once a row and label, other heads once a row."""
    probs = probabilities(logits.float(), config).double().numpy()
    if config.problem_type == "multi_label_classification":
        is_known = ~np.isnan(labels)
        confidence = probs[is_known]
        holds = labels[is_known] > 0
    elif config.flagged_index is not None:
        confidence = probs[:, config.flagged_index]
        holds = labels == config.flagged_index
    else:
        confidence = probs.max(axis=1)
        holds = probs.argmax(axis=1) == labels
    numbers = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    error = 0.0
    bins = []
    for number in np.unique(numbers).tolist():
        rows = numbers == number
        mean = float(confidence[rows].mean())
        frequency = float(holds[rows].mean())
        error += float(rows.mean()) * abs(mean - frequency)
        bins.append(
            {
                "low": number / _BINS,
                "high": (number + 1) / _BINS,
                "rows": int(rows.sum()),
                "confidence": round(mean, 4),
                "frequency": round(frequency, 4),
            }
        )
    return round(error, 4), bins


def threshold_table(logits: torch.Tensor, labels: np.ndarray, config: ProbeConfig) -> dict[str, list[JSON]]:
    """Return precision and recall at the thresholds 0.1 to 0.9 and the head's own threshold.

    Returns:
        For the flagged one of two labels, or each label of a multi-label head, if some row has the label: by its name a list with
        `threshold`, `precision` (None if nothing is flagged), `recall`, `flagged` (share of all rows), and `saved`, True for the
        head's own threshold. Empty for other heads.
    """
    probs = probabilities(logits.float(), config).numpy()
    tables: dict[str, list[JSON]] = {}
    for index, label in config.id2label.items():
        rows, positive = known_rows(labels, index, config)
        is_judged = config.problem_type == "multi_label_classification" or index == config.flagged_index
        if not is_judged or not positive.any():
            continue
        saved = own_threshold(config, index)
        tables[label] = []
        for threshold in sorted({saved, *(round(0.1 * i, 1) for i in range(1, 10))}):
            flagged = probs[rows, index] >= threshold
            tables[label].append(
                {
                    "threshold": round(threshold, 4),
                    "precision": round(float(positive[flagged].mean()), 4) if flagged.any() else None,
                    "recall": round(float(flagged[positive].mean()), 4),
                    "flagged": round(float(flagged.mean()), 4),
                    "saved": threshold == saved,
                }
            )
    return tables
