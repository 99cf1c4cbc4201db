"""The data sets of the tables, and the frozen LM that reads them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from llama_probe import ProbeConfig, ProbeModel
from llama_probe.backbone.loading import load_backbone
from llama_probe.data import PromptFormat, find_benchmark
from llama_probe.data.disk_states import DiskStates
from llama_probe.data.labelled_texts import LabelledTexts
from llama_probe.data.row_sources import Source
from llama_probe.evaluation.calibration import calibrate
from llama_probe.evaluation.report import report
from llama_probe.training.recipe import Recipe
from llama_probe.training.recipe_rows import read_rows


# Data sets that are compared by F1 and AUPRC of the flagged label, as in the paper. Other data sets are compared by accuracy.
SAFETY = ("toxicchat", "wildguardmix")


@dataclass
class Bench:
    """A backbone, loaded on first use. The states of its prompts are kept in `cache`."""

    backbone: str
    cache: Path
    data_dir: Path | None = None
    max_rows: int | None = None
    max_length: int = 512
    dtype: str = "auto"

    @cached_property
    def loaded(self):
        """The frozen LM and its tokenizer."""
        return load_backbone(self.backbone, self.dtype)

    @cached_property
    def prompts(self) -> PromptFormat:
        """The LM's chat template, or raw texts if it has none."""
        tokenizer = self.loaded[1]
        return PromptFormat(tokenizer, "chat" if tokenizer.chat_template else "raw", max_length=self.max_length)

    def states(self, config: ProbeConfig, rows: LabelledTexts):
        """Return the cached hidden states of the layers that a head with this config reads."""
        prompts = self.prompts.encode_for(config, rows.texts, rows.labels)
        return DiskStates(self.cache).dataset(self.loaded[0], config, prompts)

    def test_rows(self, name: str) -> LabelledTexts:
        """Return the test rows of a data set that no method learns from."""
        return Source(rows=name, max_rows=self.max_rows).read(data_dir=self.data_dir, split="test")


class Task:
    """A data set, `NAME` or `NAME:SPLIT` (the split to train on), with its rows of `train`, `validation` and `test`."""

    def __init__(self, bench: Bench, source: str):
        self.bench = bench
        self.source = source
        self.benchmark = find_benchmark(source)[0]
        limit = {"max_rows": bench.max_rows}
        recipe = {"train": [source], **limit, "validation": {"folds": 0, **limit}, "test": limit}
        rows = read_rows(Recipe.load(recipe), bench.data_dir)
        self.train = rows.train
        self.validation = rows.validation
        self.test = rows.test
        self.slices = rows.slices
        self.is_safety = self.benchmark.name in SAFETY
        # For choices by validation rows. AUPRC needs no threshold.
        self.metric = "auprc" if self.is_safety else "accuracy"

    @property
    def labels(self) -> ProbeConfig:
        """A config with the labels alone: enough to turn the logits of any method into metrics."""
        names = dict(enumerate(self.train.label_names))
        return ProbeConfig(probe_type="pooling", id2label=names, flagged=self.train.flagged)

    @cached_property
    def config(self) -> ProbeConfig:
        """The config of a head that reads all layers of the last user turn."""
        fields = self.bench.prompts.config_fields()
        return ProbeModel(self.labels.replace(token_scope="last_user", **fields), backbone=self.bench.loaded[0]).config

    def table(self, rows: LabelledTexts) -> dict[str, list]:
        """Return rows as columns for a `ProbeTrainer`."""
        return {"text": rows.texts, "label": [rows.label_names[label] for label in rows.labels]}

    def calibrated(self, logits: torch.Tensor) -> ProbeConfig:
        """Fit temperature and threshold on logits of the validation rows. The threshold is that of the best F1."""
        return calibrate(self.labels, logits, torch.as_tensor(self.validation.labels), threshold_rule="best-f1")

    def best(self, candidates: list[torch.Tensor]) -> int:
        """Return the index of the logits with the best metric on the validation rows."""
        return int(np.argmax([report(self.labels, x, self.validation.labels)[self.metric] for x in candidates]))
