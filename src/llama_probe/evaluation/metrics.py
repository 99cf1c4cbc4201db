"""Metrics of a head: an `evaluate.Metric`, the Trainer's callback, and a statistic for many resamples of the rows at once."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import datasets
import evaluate
import numpy as np
import torch
from transformers import EvalPrediction

from ..errors import ProbeError
from ..files import JSON
from ..heads.configuration import ProbeConfig
from ..heads.decision import check_numbers, log_odds, predictions, probabilities


# Metrics that rank the rows. They are undefined if all rows have a label, or none.
AREAS = ("auprc", "auroc")
# Metrics that can choose a head, of classes and of values. Larger is better.
_CLASS_METRICS, _VALUE_METRICS = ("accuracy", "f1", "precision", "recall", *AREAS), ("r2",)

# A label and a metric; None for the metric of all labels.
Key = tuple[str | None, str]
# Maps weights `[resamples, rows]`, how often each row counts, to metrics `[resamples]`. NaN is undefined.
Statistic = Callable[[np.ndarray], dict[Key, np.ndarray]]


class ProbeMetric(evaluate.Metric):
    """The metrics of `score_logits` as an `evaluate.Metric`, which loads without the Hub.

    Args:
        config (`ProbeConfig`): its problem type, labels, temperature and threshold.
    """

    def __init__(self, config: ProbeConfig, **kwargs):
        self.probe_config = config
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        single = self.probe_config.problem_type == "single_label_classification"
        row = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description="Metrics of a probe head from its logits.",
            citation="",
            inputs_description="predictions: [rows, num_labels] logits; references: class indices, or rows of numbers",
            features=datasets.Features({"predictions": row, "references": datasets.Value("int64") if single else row}),
        )

    def _compute(self, predictions, references) -> dict[str, float | None]:
        return score_logits(torch.tensor(predictions), np.asarray(references), self.probe_config)


def all_scores(statistic: Statistic, rows: int) -> dict[str | None, dict[str, float | None]]:
    """Return the metrics of a `score_statistic` if each row counts once, by label; None if undefined."""
    scores: dict[str | None, dict[str, float | None]] = {}
    for (label, name), (value,) in statistic(np.ones((1, rows))).items():
        scores.setdefault(label, {})[name] = None if np.isnan(value) else float(value)
    return scores


def score_logits(logits: torch.Tensor, labels: np.ndarray, config: ProbeConfig) -> dict[str, float | None]:
    """Return the metrics of a head over all labels; see `score_statistic`."""
    return all_scores(score_statistic(logits, labels, config), len(labels))[None]


def score_statistic(logits: torch.Tensor, labels: np.ndarray, config: ProbeConfig) -> Statistic:
    """Return a statistic for logits `[rows, num_labels]` and labels as in `LabelledTexts`.

    A metric depends only on how often each row counts, so the rows are sorted by score once for all resamples.

    Returns:
        For a head of classes, for each label: `f1`, `precision`, `recall`, and `auprc` (average precision) and `auroc`, which rank
        the rows by `log_odds`. For None: `accuracy`, and the metrics of the flagged one of two labels, or else means over the
        labels. `auprc` and `auroc` leave out labels that all rows or no rows have, the other metrics labels that no row has or
        gets. A label counts on the rows where it is known.
        For a regression, for None: `mse`, `mae`, and `r2`, which is undefined if all rows have the same value.
    """
    check_numbers(probabilities(logits.float(), config))
    if config.problem_type == "regression":
        return _regression_statistic(logits.float().numpy(), labels)
    truth, predicted = truth_and_predictions(logits, labels, config)
    right = (truth == predicted).all(axis=1).astype(np.float64)
    counted = np.concatenate([truth & predicted, predicted, truth], axis=1).astype(np.float64)
    ranked = log_odds(logits.float(), config).numpy()
    ranked = np.where(np.isnan(labels), np.nan, ranked) if labels.ndim == 2 else ranked  # a label that is not known
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
                metrics[None, name] = _ratio(np.nansum(values, axis=1), (~np.isnan(values)).sum(axis=1), np.nan)
            else:
                metrics[None, name] = _ratio(values.sum(axis=1), (predictions + support > 0).sum(axis=1))
            metrics |= {(label, name): values[:, index] for index, label in config.id2label.items()}
        return metrics

    return statistic


class Ranking:
    """Rows ranked by their scores for a label, to compute areas for any weights of the rows.

    Args:
        scores (`[rows]`): a row with the score NaN does not count.
        positive (`[rows]` bool): True if the row has the label.
    """

    def __init__(self, scores: np.ndarray, positive: np.ndarray):
        order = np.argsort(-scores, kind="stable")[: np.count_nonzero(~np.isnan(scores))]
        self.positives, self.negatives = order[positive[order]], order[~positive[order]]
        hits, others = -scores[self.positives], -scores[self.negatives]
        # For each positive row: positive rows with at least its score, negative rows with a larger score, or with at least its score.
        self.hits = np.searchsorted(hits, hits, "right")
        self.above, self.reached = (np.searchsorted(others, hits, side) for side in ("left", "right"))

    def areas(self, weights: np.ndarray) -> np.ndarray:
        """Return average precision and the area under the ROC curve `[2, resamples]` for weights `[resamples, rows]`.

        They are NaN if all rows that count have the label, or none.
        """
        new = weights[:, self.positives]
        # Sums of the first 0, 1, ... n rows.
        tp, fp = (np.pad(part, ((0, 0), (1, 0))).cumsum(axis=1) for part in (new, weights[:, self.negatives]))
        positives, negatives = tp[:, -1], fp[:, -1]
        hits, false_hits = tp[:, self.hits], fp[:, self.reached]
        precision = np.einsum("ij,ij->i", new, hits / np.maximum(hits + false_hits, 1))
        # Negative rows of the same score count half.
        pairs = np.einsum("ij,ij->i", new, negatives[:, None] - (false_hits + fp[:, self.above]) / 2)
        areas = np.stack([precision / np.maximum(positives, 1), pairs / np.maximum(positives * negatives, 1)])
        return np.where((positives > 0) & (negatives > 0), areas, np.nan)


def _regression_statistic(values: np.ndarray, targets: np.ndarray) -> Statistic:
    targets = np.asarray(targets, dtype=np.float64).reshape(len(targets), -1)
    errors = np.asarray(values, dtype=np.float64).reshape(targets.shape) - targets
    centred = targets - targets.mean(axis=0)  # large equal parts would cost digits of the variance

    def statistic(weights: np.ndarray) -> dict[Key, np.ndarray]:
        rows = weights.sum(axis=1, keepdims=True)
        squared = weights @ errors**2 / rows
        variance = weights @ centred**2 / rows - (weights @ centred / rows) ** 2
        # If all drawn rows have one value, the variance is a rounding error.
        variance[variance <= 1e-14 * (centred**2).max(axis=0)] = np.nan
        metrics = {"mse": squared, "mae": weights @ np.abs(errors) / rows, "r2": 1 - squared / variance}
        return {(None, name): values.mean(axis=1) for name, values in metrics.items()}

    return statistic


def _ratio(part: np.ndarray, whole: np.ndarray, undefined: float = 0.0) -> np.ndarray:
    return np.divide(part, whole, out=np.full_like(part, undefined), where=whole > 0)


def known_rows(labels: np.ndarray, index: int, config: ProbeConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the rows where a label is known, and a bool for each of these rows: True if it has the label.

    Labels are as in `LabelledTexts`; all rows of a regression have the label.
    """
    column = labels == index if labels.ndim == 1 else labels[:, index]
    rows = np.flatnonzero(~np.isnan(column))
    return rows, (column[rows] > 0) | (config.problem_type == "regression")


def truth_and_predictions(
    logits: torch.Tensor, labels: np.ndarray, config: ProbeConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return true and predicted labels of a head of classes, `[rows, num_labels]` bool; both are False if a label is not known."""
    predicted = predictions(probabilities(logits.float(), config), config).numpy()
    if config.problem_type == "multi_label_classification":
        return labels == 1, predicted & ~np.isnan(labels)
    one_hot = np.eye(config.num_labels, dtype=bool)
    return one_hot[labels.astype(int)], one_hot[predicted]


def confusion(logits: torch.Tensor, labels: np.ndarray, config: ProbeConfig) -> list[list[int]]:
    """Count rows of a single-label head, `[num_labels (true), num_labels (given)]`."""
    truth, predicted = truth_and_predictions(logits, labels, config)
    return (truth.astype(int).T @ predicted.astype(int)).tolist()


def outcomes(logits: torch.Tensor, labels: np.ndarray, config: ProbeConfig) -> dict[str, dict[str, int]]:
    """Count rows in which a head of classes finds a label, misses it, or gives it wrongly, by label name."""
    truth, predicted = truth_and_predictions(logits, labels, config)
    counts = {"found": truth & predicted, "missed": truth & ~predicted, "wrong": ~truth & predicted}
    sums = {name: rows.sum(axis=0).tolist() for name, rows in counts.items()}
    return {label: {name: rows[index] for name, rows in sums.items()} for index, label in config.id2label.items()}


def compute_metrics(config: ProbeConfig) -> Callable[[EvalPrediction], dict[str, float | None]]:
    """Return the Trainer's `compute_metrics=` for a head with this config. It gives the numbers of a report."""
    metric = ProbeMetric(config)

    def compute(evaluated: EvalPrediction) -> dict[str, float | None]:
        labels = np.asarray(evaluated.label_ids)
        if config.problem_type != "single_label_classification":
            labels = labels.reshape(len(labels), -1)
        return metric.compute(predictions=evaluated.predictions, references=labels)

    return compute


def default_metric(config: ProbeConfig) -> str:
    """Return the metric that chooses a head by default. AUPRC needs no threshold."""
    if config.problem_type == "regression":
        return "r2"
    if config.has_two_labels and config.flagged_index is None:
        return "auroc"  # the same for both labels
    return "auprc" if config.has_two_labels or config.problem_type == "multi_label_classification" else "accuracy"


def check_metric(metric: str, labels: np.ndarray, config: ProbeConfig) -> None:
    """Raise `ProbeError` unless a metric can choose a head by these validation labels."""
    allowed = _VALUE_METRICS if config.problem_type == "regression" else _CLASS_METRICS
    if metric not in allowed:
        raise ProbeError(f"metric={metric!r} for {config.problem_type} must be one of: {', '.join(allowed)}")
    if score_logits(torch.zeros(len(labels), config.num_labels), labels, config)[metric] is None:
        defined = ", ".join(name for name in allowed if name not in AREAS)
        reason = "all have the same value" if metric == "r2" else f"no label is in some but not all ({defined} work)"
        raise ProbeError(f"{metric} is not defined on the {len(labels)} validation rows: {reason}")


def summarize(reports: list[JSON]) -> JSON:
    """Return mean and standard deviation (n - 1) of each metric over runs, in the shape of one report."""
    summary: JSON = {}
    for key, value in reports[0].items():
        values = [item[key] for item in reports]
        if isinstance(value, dict):
            summary[key] = summarize(values)
        elif key == "rows" or None in values:
            summary[key] = value
        else:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            summary[key] = {"mean": statistics.fmean(values), "std": spread}
    return summary
