"""`RowEncoder`: from tables of a user to data sets of prompts or hidden states."""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeGuard

from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..data.disk_states import DiskStates
from ..data.labelled_texts import LabelledTexts, check_labels
from ..data.memory import is_tokenized, rows_in_memory
from ..data.prompts import Place, PromptDataset, PromptFormat
from ..distributed import is_main
from ..errors import ProbeError
from ..heads.configuration import ProbeConfig
from ..heads.rules import PROMPT_FORMATS
from .arguments import ProbeTrainingArguments
from .estimate import decide_caching
from .head_group import HeadGroup
from .rows import TrainingRows


STATES = ".states"  # folder of cached states in that of a run
# By folder. Trainers in one folder share its states until the last trainer is freed, which may be after the next one begins.
_CACHES: weakref.WeakValueDictionary[str, DiskStates] = weakref.WeakValueDictionary()


class RowEncoder:
    """Reads tables with the labels of heads, and turns them into prompts, or into hidden states that are computed once.

    Args:
        group: the heads, whose configs record what the rows tell: names of labels, and the format of prompts.
        tokenizer: that of the backbone, for texts.
        columns: names from the tables to `text`, `label` and the like; see `rows_in_memory`.
    """

    def __init__(
        self,
        group: HeadGroup,
        args: ProbeTrainingArguments,
        tokenizer: PreTrainedTokenizerBase | None,
        columns: Mapping[str, str] | None,
    ):
        self.group = group
        self.args = args
        self.tokenizer = tokenizer
        self.columns = columns

    def is_several(self, data: object) -> TypeGuard[Mapping[str, object]]:
        """Return True for several tables by name, False for a dict of columns."""
        names = {(self.columns or {}).get(name, name) for name in data} if isinstance(data, Mapping) else set()
        return bool(names) and names.isdisjoint(("label", "labels"))

    def __call__(self, name: str, data: object) -> Dataset | None:
        """Return a table as a data set; `name` is for errors."""
        return self.encode(name, self.label(name, data))

    def label(self, name: str, data: object, learned: bool = False) -> LabelledTexts | Dataset | None:
        """Read a table with the labels of the heads. Training rows name the labels of heads that have no names."""
        if data is None or (isinstance(data, Dataset) and not isinstance(data, IterableDataset)):
            return data
        rows = data
        config = self.group.config
        names = list(config.id2label.values())
        if not isinstance(rows, LabelledTexts):
            unnamed = learned and names == list(ProbeConfig(num_labels=len(names)).id2label.values())
            given = None if unnamed else names, config.problem_type
            rows = rows_in_memory(name, data, self.columns, *given, needs_labels=name != "test_dataset")
            if unnamed and len(rows.label_names) == len(names):
                # An alphabetical order does not say which label is flagged.
                flagged = config.flagged if rows.label_names == names else rows.flagged
                self.group.record(id2label=dict(enumerate(rows.label_names)), flagged=flagged)
            rows = rows.renamed(list(self.group.config.id2label.values()))
        if learned:
            check_labels(name, rows)
        return rows

    def encode(self, name: str, rows: LabelledTexts | Dataset | None, learned: bool = False) -> Dataset | None:
        """Return labelled rows as prompts, or as their hidden states. Data sets of the user stay as they are."""
        if not isinstance(rows, LabelledTexts):
            return rows
        lm = self.group.backbone
        if lm is None:
            raise ProbeError(f"{name} has texts or token ids, which need ProbeModel(config, backbone=lm)")
        if is_tokenized(rows):
            dataset = self._tokens_of(rows)
        else:
            dataset = self._prompts_of(name, rows, rows.places if learned else None)
        config = self.group.config
        needed = self._cache.bytes_of(config, self._cache.missing(lm, config, [dataset]))
        if decide_caching(self.args, needed, self._cache.folder):
            dataset = self._cache.dataset(lm, config, dataset)
        return TrainingRows(dataset, replies=self.args.replies if learned else "tokens")

    def _tokens_of(self, rows: LabelledTexts) -> PromptDataset:
        ids = rows.texts
        masks = rows.columns.get("probe_mask")
        lengths = None
        if masks is not None and self.group.config.reads_reply:
            lengths = list(map(sum, masks))
            # Tokens after a reply, such as the end of its turn, are no part of the reply.
            stops = [max((i for i, counts in enumerate(mask) if counts), default=-1) + 1 for mask in masks]
            ids = [row[:stop] for row, stop in zip(ids, stops, strict=True)]
            masks = [mask[:stop] for mask, stop in zip(masks, stops, strict=True)]
        return PromptDataset(ids, _labels_or_none(rows), masks, lengths)

    def _prompts_of(self, name: str, rows: LabelledTexts, places: Sequence[Place | None] | None) -> PromptDataset:
        if self.tokenizer is None:
            raise ProbeError(f"{name} has texts: pass the backbone's tokenizer, processing_class=tokenizer")
        config = self.group.config
        if config.prompt_format not in PROMPT_FORMATS:
            config = config.replace(prompt_format="chat" if self.tokenizer.chat_template else "raw")
        prompts = PromptFormat.from_config(config, self.tokenizer)
        self.group.record(**prompts.config_fields())
        return prompts.encode_for(self.group.config, rows.texts, _labels_or_none(rows), places)

    @cached_property
    def _cache(self) -> DiskStates:
        if self.args.cache_dir is not None:
            return DiskStates(self.args.cache_dir)
        folder = os.path.abspath(Path(self.args.output_dir) / STATES)
        cache = _CACHES.setdefault(folder, DiskStates(folder))
        if is_main():  # now: at the end of the program the ranks may have left their group
            weakref.finalize(cache, shutil.rmtree, folder, ignore_errors=True)
        return cache


def _labels_or_none(rows: LabelledTexts):
    return rows.labels if len(rows.labels) else None
