"""Metrics of a head: an `evaluate.Metric` over scikit-learn that loads without the Hub, and what the Trainer calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from sklearn import metrics as sk

from ..errors import ProbeError
from ..heads.configuration import ProbeConfig
from ..heads.decision import check_numbers, log_odds, predictions, probabilities


_CLASS_METRICS = ("accuracy", "f1", "precision", "recall", "auprc", "auroc")

# What a head can be chosen by, for each problem type: larger is better.
METRICS = {
    "single_label_classification": _CLASS_METRICS,
    "multi_label_classification": _CLASS_METRICS,
    "regression": ("r2",),
}


class ProbeMetric(evaluate.Metric):
    """Accuracy, F1, precision, recall, AUPRC (average precision) and AUROC of a head's logits: `score_logits`.

    Two labels: F1, precision, recall, AUPRC and AUROC of label 1. More, or several at once: macro averages; a label
    that does not occur is left out of AUPRC and AUROC. Regression: mean squared error, mean absolute error and R2.

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
    """`score` of the probabilities that a head gives with `[rows, num_labels]` logits, ranked by their log odds."""
    logits = logits.float()
    return score(probabilities(logits, config).numpy(), labels, config, log_odds(logits, config).numpy())


def score(
    probs: np.ndarray, labels: np.ndarray, config: ProbeConfig, ranked: np.ndarray | None = None
) -> dict[str, float | None]:
    """The metrics of `ProbeMetric` for `[rows, num_labels]` probabilities and labels as in `LabelledTexts`.

    AUPRC and AUROC rank the rows by `ranked`, such as `log_odds`, or where it is left out by the probabilities.

    F1, precision and recall are those of label 1 of two, else the mean over the labels that some row has or is given. AUPRC and
    AUROC are `None` where no label both occurs and does not, and R2 where all rows have the same value.

    Raises:
        ProbeError: a probability is not a number.
    """
    check_numbers(torch.from_numpy(np.asarray(probs)))
    ranked = probs if ranked is None else ranked
    if config.problem_type == "regression":
        return {
            "mse": float(sk.mean_squared_error(labels, probs)),
            "mae": float(sk.mean_absolute_error(labels, probs)),
            "r2": float(sk.r2_score(labels, probs)) if np.ptp(labels, axis=0).any() else None,
        }
    predicted = predictions(torch.from_numpy(np.asarray(probs)), config).numpy()
    if config.problem_type == "multi_label_classification":
        truth, average, columns = labels.astype(int), "macro", range(config.num_labels)
        one_hot = truth
        if config.num_labels == 1:  # scikit-learn takes one column for two classes
            truth, predicted, average = truth[:, 0], predicted[:, 0].astype(int), "binary"
    else:
        truth, average = labels.astype(int), "binary" if config.num_labels == 2 else "macro"
        one_hot = np.eye(config.num_labels, dtype=int)[truth]
        columns = [1] if config.num_labels == 2 else range(config.num_labels)
    names = {}
    if average == "macro":  # a label that no row has or is given has no F1, and is no part of a mean
        met = np.logical_or(*truth_and_predictions(probs, labels, config)).any(axis=0)
        names = {"labels": np.flatnonzero(met) if met.any() else [0]}
    precision, recall, f1, _ = sk.precision_recall_fscore_support(
        truth, predicted, average=average, zero_division=0.0, **names
    )
    occurring = [c for c in columns if 0 < one_hot[:, c].sum() < len(one_hot)]
    return {
        "accuracy": float(sk.accuracy_score(truth, predicted)),
        "f1": float(f1),
        "precision": float(precision),
        "recall": float(recall),
        "auprc": float(np.mean([sk.average_precision_score(one_hot[:, c], ranked[:, c]) for c in occurring]))
        if occurring
        else None,
        "auroc": float(np.mean([sk.roc_auc_score(one_hot[:, c], ranked[:, c]) for c in occurring]))
        if occurring
        else None,
    }


def truth_and_predictions(probs: np.ndarray, labels: np.ndarray, config: ProbeConfig) -> tuple[np.ndarray, np.ndarray]:
    """Which labels hold, and which the head gives: booleans `[rows, num_labels]` for a head of classes.

    Args:
        probs (`[rows, num_labels]`), labels: as for `score`.
    """
    predicted = predictions(torch.from_numpy(np.asarray(probs)), config).numpy()
    if config.problem_type == "multi_label_classification":
        return labels.astype(bool), predicted
    one_hot = np.eye(config.num_labels, dtype=bool)
    return one_hot[labels.astype(int)], one_hot[predicted]


def label_scores(
    probs: np.ndarray, labels: np.ndarray, config: ProbeConfig, ranked: np.ndarray | None = None
) -> dict[str, dict[str, Any]]:
    """Each label against all others, by name, for a head of classes.

    Args:
        probs, labels, ranked: as for `score`.

    Returns:
        `rows` with the label, `f1`, `precision`, `recall`, `auprc` and `auroc`. The last two are `None` where the label
        holds in no row or in all.
    """
    truth, predicted = (x.astype(int) for x in truth_and_predictions(probs, labels, config))
    ranked, scores = probs if ranked is None else ranked, {}
    for index, name in config.id2label.items():
        holds, scored = truth[:, index], ranked[:, index]
        precision, recall, f1, _ = sk.precision_recall_fscore_support(
            holds, predicted[:, index], average="binary", zero_division=0.0
        )
        defined = 0 < holds.sum() < len(holds)
        scores[name] = {
            "rows": int(holds.sum()),
            "f1": float(f1),
            "precision": float(precision),
            "recall": float(recall),
            "auprc": float(sk.average_precision_score(holds, scored)) if defined else None,
            "auroc": float(sk.roc_auc_score(holds, scored)) if defined else None,
        }
    return scores


def confusion(probs: np.ndarray, labels: np.ndarray, config: ProbeConfig) -> list[list[int]]:
    """Rows of each label by the label that a single-label head gives: `[num_labels (true), num_labels (given)]`."""
    truth, predicted = truth_and_predictions(probs, labels, config)
    return (truth.astype(int).T @ predicted.astype(int)).tolist()


def outcomes(probs: np.ndarray, labels: np.ndarray, config: ProbeConfig) -> dict[str, dict[str, int]]:
    """In how many rows a head of classes finds a label, misses it, or gives it wrongly, by label name."""
    truth, predicted = truth_and_predictions(probs, labels, config)
    return {
        name: {
            "found": int((truth & predicted)[:, index].sum()),
            "missed": int((truth & ~predicted)[:, index].sum()),
            "wrong": int((~truth & predicted)[:, index].sum()),
        }
        for index, name in config.id2label.items()
    }


def compute_metrics(config: ProbeConfig) -> Callable:
    """The Trainer's `compute_metrics=` for a head with this config: an epoch is chosen by the number that is reported of it."""
    metric = ProbeMetric(config)

    def compute(evaluated) -> dict[str, float | None]:
        labels = np.asarray(evaluated.label_ids)
        if config.problem_type != "single_label_classification":
            labels = labels.reshape(len(labels), -1)
        return metric.compute(predictions=evaluated.predictions, references=labels)

    return compute


def default_metric(config: ProbeConfig) -> str:
    """What a head is chosen by: AUPRC for two labels, which needs no threshold; else accuracy, macro F1 or R2."""
    if config.problem_type == "regression":
        return "r2"
    if config.problem_type == "multi_label_classification":
        return "auprc"
    return "auprc" if config.num_labels == 2 else "accuracy"


def check_metric(metric: str, labels: np.ndarray, config: ProbeConfig) -> None:
    """Raises `ProbeError` for a metric by which heads cannot be chosen: not one of the problem's, or without a value on these
    labels."""
    allowed = METRICS[config.problem_type]
    if metric not in allowed:
        raise ProbeError(
            f"metric={metric!r} cannot choose a {config.problem_type} head; allowed: {', '.join(allowed)}"
        )
    anything = np.zeros((len(labels), config.num_labels))
    if score(anything, labels, config)[metric] is None:
        if metric == "r2":
            raise ProbeError(
                f"r2 is not defined on the {len(labels)} validation rows: all have the same value. Give rows with others as well"
            )
        raise ProbeError(
            f"{metric} is not defined on the {len(labels)} validation rows: no label both occurs and does not. Give rows of "
            f"each label, or another metric ({', '.join(name for name in allowed if name not in ('auprc', 'auroc'))})"
        )


def summarize(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1) of each metric over runs, in the shape of one report."""
    summary: dict[str, Any] = {}
    for key, value in reports[0].items():
        values = [item[key] for item in reports]
        if isinstance(value, dict):
            summary[key] = summarize(values)
        elif key == "rows" or None in values:
            summary[key] = value
        else:
            mean = sum(values) / len(values)
            spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
            summary[key] = {"mean": mean, "std": spread}
    return summary
