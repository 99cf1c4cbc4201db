"""Metrics of a head: an `evaluate.Metric` over scikit-learn that loads without the Hub, and the Trainer's callback."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from sklearn import metrics as sk
from transformers import EvalPrediction

from ..errors import ProbeError
from ..heads.configuration import ProbeConfig
from ..heads.decision import check_numbers, log_odds, predictions, probabilities


# Metrics that rank the rows. They are undefined if all rows have a label, or none.
AREAS = ("auprc", "auroc")
_CLASS_METRICS = ("accuracy", "f1", "precision", "recall", *AREAS)

# Metrics that can choose a head, for each problem type. Larger is better.
METRICS = {
    "single_label_classification": _CLASS_METRICS,
    "multi_label_classification": _CLASS_METRICS,
    "regression": ("r2",),
}


class ProbeMetric(evaluate.Metric):
    """The metrics of `score_logits` as an `evaluate.Metric`.

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


def score_logits(logits: torch.Tensor, labels: np.ndarray, config: ProbeConfig) -> dict[str, float | None]:
    """Return the metrics of a head for logits `[rows, num_labels]` and labels as in `LabelledTexts`.

    Returns:
        Classes: `accuracy`, `f1`, `precision`, `recall`, `auprc` (average precision) and `auroc`; the last two rank the rows by
        `log_odds`. If one of two labels is flagged, they are those of that label. Else they are means over the labels: the
        first three over labels that some row has or is given, the last two over labels that some rows have and others do not
        (None if there are none). A label counts on the rows where it is known.
        Regression: `mse`, `mae` and `r2` (None if all rows have the same value).

    Raises:
        ProbeError: a probability is not a number.
    """
    probs = probabilities(logits.float(), config)
    check_numbers(probs)
    if config.problem_type == "regression":
        values = probs.numpy()
        return {
            "mse": float(sk.mean_squared_error(labels, values)),
            "mae": float(sk.mean_absolute_error(labels, values)),
            "r2": float(sk.r2_score(labels, values)) if np.ptp(labels, axis=0).any() else None,
        }
    truth, predicted = truth_and_predictions(logits, labels, config)
    ranked = ranking_scores(logits, labels, config)
    flagged = config.flagged_index
    met = [flagged] if flagged is not None else np.flatnonzero((truth | predicted).any(axis=0))
    parts = _score_columns(truth[:, met], predicted[:, met], ranked[:, met])
    metrics: dict[str, float | None] = {"accuracy": float((truth == predicted).all(axis=1).mean())}
    for name in _CLASS_METRICS[1:]:
        values = [part[name] for part in parts if part[name] is not None]
        undefined = None if name in AREAS else 0.0
        metrics[name] = float(np.mean(values)) if values else undefined
    return metrics


def has_label(labels: np.ndarray, index: int, config: ProbeConfig) -> np.ndarray:
    """Return a mask `[rows]` of the rows with a label, for labels as in `LabelledTexts`; all rows for regression."""
    if config.problem_type == "regression":
        return np.ones(len(labels), dtype=bool)
    return labels[:, index] > 0 if config.problem_type == "multi_label_classification" else labels == index


def truth_and_predictions(
    logits: torch.Tensor, labels: np.ndarray, config: ProbeConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return true and predicted labels of a head of classes, booleans `[rows, num_labels]`; both False if a label is not known."""
    predicted = predictions(probabilities(logits.float(), config), config).numpy()
    if config.problem_type == "multi_label_classification":
        return labels == 1, predicted & ~np.isnan(labels)
    one_hot = np.eye(config.num_labels, dtype=bool)
    return one_hot[labels.astype(int)], one_hot[predicted]


def ranking_scores(logits: torch.Tensor, labels: np.ndarray, config: ProbeConfig) -> np.ndarray:
    """Return the scores `[rows, num_labels]` that rank rows for AUPRC and AUROC, NaN if a label is not known."""
    scores = log_odds(logits.float(), config).numpy()
    return np.where(np.isnan(labels), np.nan, scores) if labels.ndim == 2 else scores


def label_scores(logits: torch.Tensor, labels: np.ndarray, config: ProbeConfig) -> dict[str, dict[str, Any]]:
    """Score each label of a head of classes against all others; arguments as for `score_logits`.

    Returns:
        By label name: `rows` with the label, `f1`, `precision`, `recall`, `auprc` and `auroc`. The last two are None if
        no row or each row has the label.
    """
    parts = _score_columns(*truth_and_predictions(logits, labels, config), ranking_scores(logits, labels, config))
    return dict(zip(config.id2label.values(), parts, strict=True))


def _score_columns(truth: np.ndarray, predicted: np.ndarray, ranked: np.ndarray) -> list[dict[str, Any]]:
    parts = []
    for positives, flagged, scores in zip(truth.T.astype(int), predicted.T.astype(int), ranked.T, strict=True):
        options = {"average": "binary", "zero_division": 0.0}
        precision, recall, f1 = map(float, sk.precision_recall_fscore_support(positives, flagged, **options)[:3])
        part = {
            "rows": int(positives.sum()),
            "f1": f1,
            "precision": precision,
            "recall": recall,
            **dict.fromkeys(AREAS),
        }
        is_known = ~np.isnan(scores)
        if 0 < part["rows"] < is_known.sum():
            part["auprc"] = float(sk.average_precision_score(positives[is_known], scores[is_known]))
            part["auroc"] = float(sk.roc_auc_score(positives[is_known], scores[is_known]))
        parts.append(part)
    return parts


def confusion(logits: torch.Tensor, labels: np.ndarray, config: ProbeConfig) -> list[list[int]]:
    """Count rows of a single-label head, `[num_labels (true), num_labels (given)]`."""
    truth, predicted = truth_and_predictions(logits, labels, config)
    return (truth.astype(int).T @ predicted.astype(int)).tolist()


def outcomes(logits: torch.Tensor, labels: np.ndarray, config: ProbeConfig) -> dict[str, dict[str, int]]:
    """Count rows in which a head of classes finds a label, misses it, or gives it wrongly, by label name."""
    truth, predicted = truth_and_predictions(logits, labels, config)
    counts = {"found": truth & predicted, "missed": truth & ~predicted, "wrong": ~truth & predicted}
    sums = {name: rows.sum(axis=0).tolist() for name, rows in counts.items()}
    return {label: {name: each[index] for name, each in sums.items()} for index, label in config.id2label.items()}


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
    allowed = METRICS[config.problem_type]
    if metric not in allowed:
        raise ProbeError(f"metric={metric!r} for {config.problem_type} must be one of: {', '.join(allowed)}")
    if score_logits(torch.zeros(len(labels), config.num_labels), labels, config)[metric] is None:
        defined = ", ".join(name for name in allowed if name not in AREAS)
        reason = "all have the same value" if metric == "r2" else f"no label is in some but not all ({defined} work)"
        raise ProbeError(f"{metric} is not defined on the {len(labels)} validation rows: {reason}")


def summarize(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation (n - 1) of each metric over runs, in the shape of one report."""
    summary: dict[str, Any] = {}
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
