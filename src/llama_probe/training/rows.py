"""Rows as a training sees them: all that a run has before it trains, some of them cut short, some that count for less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.states import StateCache
    from ..data.texts import LabelledTexts
    from ..heads.configuration import ProbeConfig
    from ..heads.probe import ProbeModel


@dataclass
class Prepared:
    """What a run has before it trains.

    Attributes:
        parts: rows of `train`, `validation` and, where given, `test` and `extra`. datasets: their prompts or states.
        reply_lengths: the tokens of their replies, for a head that reads these.
        config: of a head, with all that it records of prompts and backbone.
        metric: the validation metric to choose by.
        lm: the frozen backbone; `None` where the states are cached.
        head: untrained, with what its kind needs of the backbone beside states.
        cache: that goes when the run is over.
        folds: rows of train that take turns as validation rows; none where the validation rows are others.
        extra_weights: see `DataSources`.
        backbone_weights: digest of the backbone, by which a run that goes on knows it: its name may have become another's.
    """

    parts: dict[str, LabelledTexts]
    config: ProbeConfig
    metric: str
    datasets: dict[str, Dataset]
    reply_lengths: dict[str, list[int] | None]
    lm: PreTrainedModel | None
    head: ProbeModel
    cache: StateCache | None
    folds: list[np.ndarray] = field(default_factory=list)
    extra_weights: list[float] = field(default_factory=lambda: [1.0])
    backbone_weights: str = ""

    @property
    def trained(self) -> Dataset:
        """The rows of train, then the extra ones; for a head that follows replies, some of these cut short."""
        names = [name for name in ("train", "extra") if name in self.datasets]
        parts = {name: self.datasets[name] for name in names}
        if "extra" in parts and self.extra_weights != [1.0]:
            parts["extra"] = WeightedRows(parts["extra"], self.extra_weights)
        rows = ConcatDataset(parts.values())
        if not self.config.reads_reply:
            return rows
        return CutReplies(rows, list(chain.from_iterable(self.reply_lengths[name] for name in names)))

    def close(self) -> None:
        """Removes cached states that nobody asked to keep."""
        if self.cache is not None:
            self.cache.delete()


class CutReplies(Dataset):
    """Rows that end with replies, of which every other one, by chance, is seen cut short: for heads that follow a reply.

    Such a head is asked after every token; trained on whole replies alone, it is sure of itself after the first few.

    Args:
        dataset: a `PromptDataset` or a `StateDataset`.
        lengths: tokens of each reply.
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
    """Rows that count for more or less than others in a loss: as items, with `row_weights`; see `probe_loss`.

    Args:
        dataset: a `PromptDataset` or a `StateDataset`.
        weights: what each row counts for, where others count for 1; of several, the members of a head take turns.
    """

    def __init__(self, dataset: Dataset, weights: Sequence[float]):
        self.dataset, self.weights = dataset, list(weights)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict:
        return {**self.dataset[row], "row_weights": self.weights}
