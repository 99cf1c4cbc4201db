"""The losses that heads learn by, of prompts, of their windows, of whole replies, and of replies by the score after each token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import ProbeError
from ..files import JSON
from ..heads.configuration import ProbeConfig
from ..heads.decision import ProbeOutput, flagged_score, probe_loss, strongest


MONOTONE = "monotone"
# Weight of the windows outside a request. The window with the request has the weight 1.
OUTSIDE_WEIGHT = 1.0


@dataclass
class ProbeLoss:
    """The Trainer's `compute_loss_func=` for heads: cross-entropy with class weights, label smoothing or focal weights.

    Args:
        class_weights: one weight a label; for a multi-label head that of its positives. None: all 1.
        label_smoothing_factor: 0 to below 1.
        focal_gamma: 0 for plain cross-entropy.
        token_loss: `"monotone"`, for the scores of tokens (see `monotone_loss`); None for the score of the whole reply.
    """

    config: ProbeConfig
    class_weights: Sequence[float] | None = None
    label_smoothing_factor: float = 0.0
    focal_gamma: float = 0.0
    token_loss: str | None = None

    def __post_init__(self):
        if self.token_loss is not None:
            needs = f"token_loss={self.token_loss!r}"
            scope = self.config.token_scope
            if not self.config.reads_reply:
                raise ProbeError(f"{needs} needs a head that reads replies, not token_scope={scope!r}")
            if self.config.problem_type != "multi_label_classification":
                self.config.need_flagged_index(needs)
        if self.class_weights is not None and len(self.class_weights) != self.config.num_labels:
            raise ProbeError(f"class_weights has {len(self.class_weights)} values for {self.config.num_labels} labels")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ProbeError(f"label_smoothing_factor={self.label_smoothing_factor} must be at least 0 and below 1")

    @classmethod
    def create(cls, config: ProbeConfig, args: JSON, labels: np.ndarray | None) -> ProbeLoss:
        """Return the loss that training arguments describe. `labels` give balanced class weights."""
        class_weights = args["class_weights"]
        weights = balanced_weights(labels, config) if class_weights == "balanced" else None
        if class_weights not in (None, "balanced"):
            try:
                weights = list(map(float, str(class_weights).strip("[]()").split(",")))
            except ValueError:
                weights = []
            if not any(weights) or not all(0 <= weight < math.inf for weight in weights):
                raise ProbeError(f"class_weights={class_weights!r} must be 'balanced', or numbers from 0, not all 0")
        return cls(config, weights, args["label_smoothing_factor"], args["focal_gamma"], args["token_loss"])

    def __call__(self, outputs: ProbeOutput, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        """Return the mean loss over the rows of all accumulated batches; the Trainer counts their labels."""
        if self.token_loss is not None and outputs.token_logits is not None:
            total = monotone_loss(self, outputs, labels)
        elif outputs.segment_logits is not None:
            total = window_loss(self, outputs, labels)
        else:
            total = self.total(outputs.learned_logits, labels, outputs.row_weights)
        rows = len(labels) if num_items_in_batch is None else num_items_in_batch * len(labels) / labels.numel()
        return total / rows

    def total(self, logits: torch.Tensor, targets: torch.Tensor, row_weights: torch.Tensor | None) -> torch.Tensor:
        """Return the sum of the losses of rows, the mean over the members; see `probe_loss`."""
        return self.of_rows(logits, targets, row_weights).sum(dim=1).mean()

    def of_rows(self, logits: torch.Tensor, targets: torch.Tensor, row_weights: torch.Tensor | None) -> torch.Tensor:
        """Return the losses of rows, `[members, rows]`; see `probe_loss`."""
        weights = None if self.class_weights is None else torch.tensor(self.class_weights)
        settings = weights, self.label_smoothing_factor, self.focal_gamma, "none"
        return probe_loss(logits, targets, self.config, *settings, row_weights=row_weights)


def balanced_weights(labels: np.ndarray, config: ProbeConfig) -> list[float]:
    """Return class weights with mean 1 over the rows; for a multi-label head negatives / positives of each label."""
    if config.problem_type == "multi_label_classification":
        return ((labels == 0).sum(axis=0) / np.maximum((labels == 1).sum(axis=0), 1)).tolist()
    if config.problem_type == "regression":
        raise ProbeError("class_weights must be None for regression")
    counts = np.bincount(labels, minlength=config.num_labels)
    return (len(labels) / (config.num_labels * np.maximum(counts, 1))).tolist()


def monotone_loss(loss: ProbeLoss, outputs: ProbeOutput, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss of the whole replies, and a penalty where the probability falls in harmful or rises in harmless replies.

    The probability begins at 0: a reply is harmless until it does harm (after the anchored temporal consistency of arXiv
    2510.09694). A rule halts at the largest score of a reply, not at the last.

    Returns:
        The sum over the rows of a batch, the mean over the members of a head.
    """
    config = loss.config
    total = loss.total(outputs.token_logits[:, :, -1], labels, outputs.row_weights)
    begun = outputs.token_mask.cumsum(dim=1) > 0  # after the end of a reply its score stays
    probs = flagged_score(outputs.token_logits, config).sigmoid() * begun  # [M, B, R]
    steps = probs.diff(dim=-1, prepend=torch.zeros_like(probs[..., :1]))
    labels = labels.to(probs.device)
    if config.problem_type == "multi_label_classification":
        is_harmful = flagged_score(labels, config)  # [B], NaN if the label is not known
    else:
        is_harmful = (labels == config.flagged_index).to(steps)
    wrong = (steps * (1 - 2 * is_harmful).nan_to_num()[:, None]).relu().sum(dim=-1)  # [M, B]
    if outputs.row_weights is not None:  # [B, weights], which the members of a head use in turn
        weights = outputs.row_weights[:, torch.arange(len(wrong)) % outputs.row_weights.shape[1]]
        wrong = wrong * weights.T.to(wrong)
    return total + wrong.sum(dim=1).mean()


def window_loss(
    loss: ProbeLoss, outputs: ProbeOutput, labels: torch.Tensor, outside_weight: float = OUTSIDE_WEIGHT
) -> torch.Tensor:
    """Return the loss of heads that judge windows, each with a label of its own.

    In a row with a flagged label, the strongest window learns the row's label. Where the place of the request is known, this is the
    strongest window that holds the request, and all windows that have no token of it learn that they have no flagged label. In a row
    without a flagged label all windows learn so. Windows that must not be flagged count by half of their mean loss and half of the
    loss of the strongest. Each member of a head has strongest windows of its own. A row of one window has the loss of a head
    without windows.

    Args:
        outputs: with `segment_logits`, `segment_mask`, `holds_request` and `touches_request`.
        labels: as in `ProbeModel.forward`.
        outside_weight: weight of the windows outside a known request.

    Returns:
        The sum over the rows of a batch, the mean over the members of a head.
    """
    config = loss.config
    exists = outputs.segment_mask  # [B, K]
    logits = outputs.segment_logits.masked_fill(~exists[..., None], 0.0)  # [M, B, K, C]
    weights = outputs.row_weights
    members, _, num_windows, _ = logits.shape
    labels = labels.to(logits.device)
    if config.problem_type == "multi_label_classification":
        is_flagged = labels.nan_to_num().any(dim=1)
        unflagged = labels * 0  # a label that is not known stays NaN
    else:
        is_flagged = labels == config.flagged_index
        unflagged = torch.full_like(labels, 1 - config.flagged_index)
    holds_request = outputs.holds_request & exists
    has_place = is_flagged & holds_request.any(dim=1)

    def of_strongest(windows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss `[M, B]` of the strongest of some windows `[B, K]`."""
        chosen = strongest(logits, config, windows.expand(members, -1, -1))
        return loss.of_rows(chosen, targets, weights)

    own = of_strongest(torch.where(has_place[:, None], holds_request, exists), labels)
    is_negative = torch.where(has_place[:, None], ~outputs.touches_request, ~is_flagged[:, None]) & exists
    count = is_negative.sum(dim=1)
    has_negative = count > 0
    each_weight = None if weights is None else weights.repeat_interleave(num_windows, dim=0)
    each = loss.of_rows(logits.flatten(1, 2), unflagged.repeat_interleave(num_windows, dim=0), each_weight)
    mean = (each.unflatten(1, exists.shape) * is_negative).sum(dim=2) / count.clamp(min=1)  # [M, B]
    hardest = of_strongest(torch.where(has_negative[:, None], is_negative, exists), unflagged)
    others = (mean + hardest) / 2 * has_negative
    return torch.where(is_flagged, own + outside_weight * others, others).sum(dim=1).mean()
