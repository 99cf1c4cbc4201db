"""The loss that heads learn by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import ProbeError
from ..files import JSON
from ..heads.configuration import ProbeConfig
from ..heads.decision import ProbeOutput, probe_loss
from .token_loss import TOKEN_LOSSES


@dataclass
class ProbeLoss:
    """The Trainer's `compute_loss_func=` for heads: cross-entropy with class weights, label smoothing or focal weights.

    Args:
        class_weights: one weight a label; for a multi-label head that of its positives. None: all 1.
        label_smoothing: 0 to below 1.
        focal_gamma: 0 for plain cross-entropy.
        token_loss: one of `TOKEN_LOSSES`, for the scores of tokens; None for the score of the whole reply.
    """

    config: ProbeConfig
    class_weights: Sequence[float] | None = None
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0
    token_loss: str | None = None

    def __post_init__(self):
        if self.token_loss is not None:
            needs, scope = f"token_loss={self.token_loss!r}", self.config.token_scope
            if not self.config.reads_reply:
                raise ProbeError(f"{needs} needs a head that reads replies, not token_scope={scope!r}")
            if self.config.problem_type != "multi_label_classification":
                self.config.need_flagged_index(needs)
        if self.class_weights is not None and len(self.class_weights) != self.config.num_labels:
            raise ProbeError(f"class_weights has {len(self.class_weights)} values for {self.config.num_labels} labels")
        if not 0 <= self.label_smoothing < 1:
            raise ProbeError(f"label_smoothing={self.label_smoothing} must be at least 0 and below 1")

    @classmethod
    def create(cls, config: ProbeConfig, args: JSON, labels: np.ndarray | None) -> ProbeLoss:
        """Build the loss that training arguments describe. Balanced class weights are those of `labels`."""
        class_weights = args["class_weights"]
        weights = balanced_weights(labels, config) if class_weights == "balanced" else None
        if class_weights not in (None, "balanced"):
            try:
                weights = [float(value) for value in class_weights.split(",")]
            except ValueError:
                weights = []
            if not any(weights) or not all(0 <= weight < math.inf for weight in weights):
                raise ProbeError(f"class_weights={class_weights!r} must be 'balanced', or numbers from 0, not all 0")
        return cls(config, weights, args["label_smoothing_factor"], args["focal_gamma"], args["token_loss"])

    def __call__(self, outputs: ProbeOutput, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        """Return the mean loss over the rows of all accumulated batches; the Trainer counts their labels."""
        weights = None if self.class_weights is None else torch.tensor(self.class_weights)
        settings = self.config, weights, self.label_smoothing, self.focal_gamma, "sum"
        if self.token_loss is None or outputs.token_logits is None:
            total = probe_loss(outputs.learned_logits, labels, *settings, row_weights=outputs.row_weights)
        else:
            total = TOKEN_LOSSES[self.token_loss](outputs, labels, settings)
        rows = len(labels) if num_items_in_batch is None else num_items_in_batch * len(labels) / labels.numel()
        return total / rows


def balanced_weights(labels: np.ndarray, config: ProbeConfig) -> list[float]:
    """Return class weights with mean 1 over the rows; for a multi-label head negatives / positives of each label."""
    if config.problem_type == "multi_label_classification":
        return ((labels == 0).sum(axis=0) / np.maximum((labels == 1).sum(axis=0), 1)).tolist()
    if config.problem_type == "regression":
        raise ProbeError("class_weights must be None for regression")
    counts = np.bincount(labels, minlength=config.num_labels)
    return (len(labels) / (config.num_labels * np.maximum(counts, 1))).tolist()
