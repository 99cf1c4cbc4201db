"""One backbone, the data sets on which methods are compared, and the hidden states of their rows."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from torch.utils.data import Dataset

from ...backbone.loading import DtypeName, load_backbone, model_id, weights_digest
from ...data.known import BENCHMARKS, Benchmark, find_benchmark
from ...data.prompts import PromptFormat
from ...data.sources import DataSources, setting
from ...data.states import StateCache
from ...data.texts import LabelledTexts, read_labelled
from ...errors import ProbeError
from ...heads.configuration import ProbeConfig
from ...heads.match import describe


# Data sets that are compared by F1 and AUPRC of the flagged label, as in the paper. The others are compared by accuracy.
SAFETY = ("toxicchat", "wildguardmix")


@dataclass
class Workbench:
    """A backbone and the data sets known by name, loaded on first use. The metadata of a field has its help.

    Attributes:
        backbone: `"demo"`, a folder or a Hub id. dtype: dtype of its weights.
        scratch: folder for hidden states that `close` deletes.
        data_dir: local copies of the data sets, see `read_benchmark`.
        seeds: one run of each method a seed. The first one also splits and draws the rows.
    """

    backbone: str
    scratch: Path
    data_dir: str | os.PathLike | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    max_rows: int | None = setting(None, "Use at most this many training, validation and test rows, for a quick look.")
    max_length: int = setting(512, "Cut prompts to this many tokens.")
    dtype: DtypeName = "auto"
    _tasks: dict[str, Task] = field(default_factory=dict, init=False, repr=False)

    @property
    def settings(self) -> dict[str, Any]:
        """All that results depend on, beside the rows and the weights."""
        return {name: getattr(self, name) for name in ("backbone", "dtype", "seeds", "max_rows", "max_length")}

    @cached_property
    def _loaded(self) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
        return load_backbone(self.backbone, self.dtype)

    @property
    def lm(self) -> transformers.PreTrainedModel:
        """The frozen LM."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        """The LM's tokenizer."""
        return self._loaded[1]

    @cached_property
    def weights(self) -> str:
        """A digest of the LM's weights and config. Loads the backbone."""
        return weights_digest(self.lm)[:16]

    @cached_property
    def prompts(self) -> PromptFormat:
        """The LM's chat template, or raw texts if it has none."""
        kind = "chat" if self.tokenizer.chat_template else "raw"
        return PromptFormat.create(self.tokenizer, kind, max_length=self.max_length)

    def dataset(self, rows: LabelledTexts, config: ProbeConfig) -> Dataset:
        """Return the cached states of rows."""
        return StateCache(self.scratch).dataset(self.lm, config, self.prompts.encode(rows.texts), rows.labels)

    def task(self, source: str) -> Task:
        """Return the data set that `NAME` or `NAME:SPLIT` (the split to train on) means, with its rows."""
        if source not in self._tasks:
            benchmark, sources = known_source(source), self.sources(source)
            parts = sources.read(self.seeds[0])
            slices = {name: parts["test"].columns[name] for name in sources.slice_columns}
            self._tasks[source] = Task(self, source, benchmark, parts, slices, metric_of(benchmark))
        return self._tasks[source]

    def test_rows(self, name: str) -> LabelledTexts:
        """Return the test rows of a data set that is only tested on."""
        rows = read_labelled(name, split="test", data_dir=self.data_dir)
        return rows.at_most(self.max_rows, self.seeds[0])

    def sources(self, source: str) -> DataSources:
        """Return the sources of a data set's rows."""
        return DataSources(source, max_rows=self.max_rows, max_eval_rows=self.max_rows, data_dir=self.data_dir)

    def close(self) -> None:
        """Delete the states in `scratch`."""
        shutil.rmtree(self.scratch, ignore_errors=True)


@dataclass
class Task:
    """One data set on the bench: its rows of `train`, `validation` and `test`.

    Attributes:
        slices: columns of the test rows by whose values results are reported.
        metric: metric for choices by validation rows, see `metric_of`.
    """

    bench: Workbench
    source: str
    benchmark: Benchmark
    parts: dict[str, LabelledTexts]
    slices: dict[str, list[Any]]
    metric: str
    _datasets: dict[str, Dataset] = field(default_factory=dict, init=False, repr=False)

    @property
    def name(self) -> str:
        """The source as a part of a file name."""
        return file_name(self.source)

    @cached_property
    def labels(self) -> ProbeConfig:
        """A config with the labels alone: enough to turn the logits of any method into metrics."""
        rows = self.parts["train"]
        return ProbeConfig(probe_type="pooling", id2label=dict(enumerate(rows.label_names)), flagged=rows.flagged)

    @cached_property
    def config(self) -> ProbeConfig:
        """The config of a head, with prompts and backbone. Loads the backbone."""
        base = self.labels.replace(token_scope="last_user", base_model_name_or_path=model_id(self.bench.backbone))
        return describe(self.bench.lm, base.replace(**self.bench.prompts.config_fields()))

    def dataset(self, part: str) -> Dataset:
        """Return the states of `train`, `validation` or `test`."""
        if part not in self._datasets:
            self._datasets[part] = self.bench.dataset(self.parts[part], self.config)
        return self._datasets[part]


def file_name(source: str) -> str:
    """Return `NAME` or `NAME:SPLIT` as a part of a file name."""
    return source.replace(":", "-")


def metric_of(benchmark: Benchmark) -> str:
    """Return the metric for choices: AUPRC for safety data, as it needs no threshold, else accuracy."""
    return "auprc" if benchmark.name in SAFETY else "accuracy"


def known_source(source: str) -> Benchmark:
    """Return the data set that `NAME` or `NAME:SPLIT` means, which has training rows and one label a row."""
    trainable = [
        name
        for name, benchmark in BENCHMARKS.items()
        if "train" in benchmark.splits and benchmark.problem_type == "single_label_classification"
    ]
    found = find_benchmark(source)
    if found is None or found[0].name not in trainable:
        raise ProbeError(f"data={source!r} is not allowed; allowed: {', '.join(trainable)}, each also as NAME:SPLIT")
    return found[0]
