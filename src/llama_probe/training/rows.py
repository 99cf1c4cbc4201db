"""`TrainingRows`: prompts or states with labels, replies that are cut, weights in the loss, and the heads that learn from a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from ..data.labelled_texts import LabelledTexts


class TrainingRows(Dataset):
    """Rows of a data set that heads learn from.

    Args:
        rows: numbers of rows of the data set, in order; a number may occur again. Defaults to all rows.
        replies: `"cut"`: half of the replies are cut at random each time they are read, because a head that learns from whole
            replies alone is sure too early. `"tokens"`: rows have a `reply_length`, so that heads score tokens of the reply.
            Has no effect on rows without replies.
        row_weights: weights of each of `rows` in the loss, None for 1; see `probe_loss`.
        learned_by (`[rows, heads]`): true for the heads that learn from each of `rows`. Defaults to all heads.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: Sequence[int] | None = None,
        replies: Literal["cut", "tokens"] | None = None,
        row_weights: Sequence[Sequence[float] | None] | None = None,
        learned_by: np.ndarray | None = None,
    ):
        self.dataset = dataset
        self.rows = list(range(len(dataset)) if rows is None else rows)
        self.replies = None if self.reply_lengths is None else replies
        self.row_weights = row_weights
        self.learned_by = learned_by

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> np.ndarray:
        """Labels `[rows, ...]`."""
        return labels_of(self.dataset)[self.rows]

    @property
    def reply_lengths(self) -> list[int] | None:
        """Tokens of the reply of each row; None if the data set does not tell."""
        lengths = getattr(self.dataset, "reply_lengths", None)
        return None if lengths is None else [lengths[row] for row in self.rows]

    def __getitem__(self, place: int) -> dict:
        row = self.rows[place]
        item = dict(self.dataset[row])
        if self.replies == "tokens":
            item["reply_length"] = self.dataset.reply_lengths[row]
        elif self.replies == "cut" and torch.rand(()) < 0.5:
            item = _cut(item, self.dataset.reply_lengths[row])
        if self.row_weights is not None and self.row_weights[place] is not None:
            item["row_weights"] = list(self.row_weights[place])
        if self.learned_by is not None:
            item["learned_by"] = self.learned_by[place]
        return item


def _cut(item: dict, reply_length: int) -> dict:
    left = int(torch.randint(1, reply_length + 1, ()))
    stop = len(item["input_ids"]) - reply_length + left
    cut = {name: item[name][:stop] for name in ("input_ids", "probe_mask") if name in item}
    if "hidden_states" in item:
        cut["hidden_states"] = item["hidden_states"][:, :stop]
    return item | cut


def learners(rows: Sequence[int], heads: Iterable[str], left_out: Mapping[str, Sequence[int]]) -> np.ndarray | None:
    """Return `[rows, heads]`, false for the row numbers that a head leaves out; None if no head leaves any out."""
    if not any(map(len, left_out.values())):
        return None
    return np.stack([~np.isin(rows, list(left_out.get(name, ()))) for name in heads], axis=1)


def labels_of(dataset: Dataset | LabelledTexts) -> np.ndarray:
    """Return the labels `[rows, ...]` of a data set."""
    labels = getattr(dataset, "labels", None)
    return np.stack([dataset[row]["labels"] for row in range(len(dataset))]) if labels is None else labels
