"""Temperature and threshold of a head, fitted on validation rows and saved in its config."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.metrics import precision_recall_curve

from .configuration import ProbeConfig
from .decision import probabilities, probe_loss


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor, config: ProbeConfig) -> float:
    """The temperature with the lowest cross-entropy (Guo et al., arXiv 1706.04599), between 0.05 and 20.

    Args:
        logits (`torch.FloatTensor` of shape `[rows, num_labels]`), labels: of validation rows.
    """
    log_temperature = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    logits = logits.double()
    optimizer = torch.optim.LBFGS([log_temperature], lr=0.5, max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = probe_loss(logits / log_temperature.exp(), labels, config)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(log_temperature.detach().exp().clamp(0.05, 20.0))


def best_f1_threshold(scores: np.ndarray, positives: np.ndarray) -> float:
    """The threshold with the highest F1, halfway to the next lower score so that it is not tied to one row.

    Args:
        scores (`[rows]`): probabilities of the positive label. positives (`[rows]`): 0 or 1.
    """
    precision, recall, thresholds = precision_recall_curve(positives, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(np.argmax(f1[:-1]))
    below = thresholds[best - 1] if best else 0.0
    return float((thresholds[best] + below) / 2)


def calibrate(config: ProbeConfig, logits: torch.Tensor, labels: torch.Tensor) -> ProbeConfig:
    """`config` with the temperature, and where it has two labels or several at once the thresholds, that suit the rows.

    Regression heads come back as they are; so does a threshold whose label does not occur in the rows.
    """
    if config.problem_type == "regression":
        return config
    config = config.replace(temperature=fit_temperature(logits, labels, config), threshold=None)
    probs = probabilities(logits.float(), config).numpy()
    truth = labels.numpy()
    if config.problem_type == "multi_label_classification":
        thresholds = [
            best_f1_threshold(probs[:, i], truth[:, i]) if 0 < truth[:, i].sum() < len(truth) else 0.5
            for i in range(config.num_labels)
        ]
        return config.replace(threshold=thresholds)
    if config.num_labels == 2 and 0 < truth.sum() < len(truth):
        return config.replace(threshold=best_f1_threshold(probs[:, 1], truth))
    return config
