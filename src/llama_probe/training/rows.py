"""Rows as training sees them: prompts or states with labels, some cut short, some with weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers import PreTrainedModel

from ..data.prompts import EncodedTexts
from ..data.sources import DataSources
from ..data.states import PromptDataset, StateCache, StateDataset
from ..data.texts import LabelledTexts
from ..heads.configuration import ProbeConfig
from .recipe import Recipe


@dataclass
class TrainingData:
    """Rows with their prompts or states, and the settings that follow from them.

    A context manager: leaving it deletes `cache`, unless the run was interrupted and may resume.

    Attributes:
        parts: rows of `train` and `validation`, and of `test` and `extra` if given.
        datasets: prompts or states of each part.
        reply_lengths: tokens of each reply of each part, for a head that reads replies.
        labels: labels of the rows of `train` and `extra`.
        config: config of the head, with prompts and backbone filled in.
        recipe: recipe without open fields; its `metric` is set.
        lm: the frozen backbone; None if the states are cached.
        cache: states to delete after the run.
        folds: row indices of `train`, a fold each; empty if the validation rows are not those of `train`.
        sources: where the rows come from.
        backbone_weights: digest of the backbone's weights.
    """

    parts: dict[str, LabelledTexts]
    datasets: dict[str, Dataset]
    reply_lengths: dict[str, list[int] | None]
    labels: np.ndarray
    config: ProbeConfig
    recipe: Recipe
    lm: PreTrainedModel | None
    cache: StateCache | None
    folds: list[np.ndarray]
    sources: DataSources
    backbone_weights: str

    def __enter__(self) -> TrainingData:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if self.cache is not None and (kind is None or issubclass(kind, Exception)):
            self.cache.delete()

    def settings(self) -> dict[str, Any]:
        """Return what must be the same if a run is resumed, as JSON values."""
        folds = json.dumps([held.tolist() for held in self.folds])
        return {
            "recipe": asdict(self.recipe),
            # Measured anew by each run; `backbone_weights` tells whether the backbone is the same.
            "head": self.config.to_dict() | {"fingerprint": None},
            "backbone_weights": self.backbone_weights,
            "rows": {name: rows.digest() for name, rows in self.parts.items() if name != "test"},
            "extra_weights": self.sources.extra_weights,
            # No head may be validated on rows that it has learned from.
            "folds": hashlib.sha256(folds.encode()).hexdigest(),
        }

    def novelty_rows(self, logits: torch.Tensor) -> tuple[Dataset, Dataset, torch.Tensor]:
        """Return rows to fit novelty on, rows to calibrate it on (with folds a quarter of `train`), and logits of these.

        Args:
            logits (`[rows, num_labels]`): of the validation rows.
        """
        if not self.folds:
            return self.trained, self.datasets["validation"], logits
        order = np.random.default_rng(0).permutation(len(self.datasets["train"])).tolist()
        held = sorted(order[: len(order) // 4])
        rest = sorted(set(range(len(self.trained))) - set(held))
        return Subset(self.trained, rest), Subset(self.datasets["train"], held), logits[held]

    @property
    def trained(self) -> Dataset:
        """The rows of `train`, then those of `extra`. Replies are cut short at random if the head follows them."""
        parts = {name: self.datasets[name] for name in ("train", "extra") if name in self.datasets}
        if "extra" in parts and self.sources.extra_weights != [1.0]:
            parts["extra"] = WeightedRows(parts["extra"], self.sources.extra_weights)
        rows = ConcatDataset(parts.values())
        if not self.config.reads_reply:
            return rows
        return CutReplies(rows, list(chain.from_iterable(self.reply_lengths[name] for name in parts)))


def as_dataset(
    encoded: EncodedTexts, labels: np.ndarray, config: ProbeConfig, lm: nn.Module, cache: StateCache | None
) -> PromptDataset | StateDataset:
    """Return prompts with labels, or with a cache their hidden states, of what a head with this config reads."""
    if cache is None:
        return PromptDataset(encoded.ids, labels, encoded.masks)
    return cache.dataset(lm, config, encoded.ids, labels, masks=encoded.masks)


def labels_of(dataset: Dataset | LabelledTexts) -> np.ndarray:
    """Return the labels `[rows, ...]` of a data set."""
    found = getattr(dataset, "labels", None)
    return np.stack([dataset[row]["labels"] for row in range(len(dataset))]) if found is None else found


class CutReplies(Dataset):
    """Rows that end with replies of `lengths` tokens; each time, half of them at random are cut within the reply.

    A head that follows a reply scores every prefix of it. Trained on whole replies alone it is sure too early.
    """

    def __init__(self, dataset: Dataset, lengths: Sequence[int]):
        self.dataset, self.lengths = dataset, lengths

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict:
        item = dict(self.dataset[row])
        if torch.rand(()) < 0.5:
            left = int(torch.randint(1, self.lengths[row] + 1, ()))
            stop = len(item["input_ids"]) - self.lengths[row] + left
            for name in ("input_ids", "probe_mask"):
                if name in item:
                    item[name] = item[name][:stop]
            if "hidden_states" in item:
                item["hidden_states"] = item["hidden_states"][:, :stop]
        return item


class WeightedRows(Dataset):
    """Rows with weights in the loss, as `row_weights` of each item. Rows without have weight 1.

    The members of a head use the weights of a row in turn. See `probe_loss`.
    """

    def __init__(self, dataset: Dataset, weights: Sequence[float]):
        self.dataset, self.weights = dataset, list(weights)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict:
        return {**self.dataset[row], "row_weights": self.weights}
