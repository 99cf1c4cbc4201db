"""From labelled files to a head folder: what `llama-probe train` does."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset
from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from .backbones import DEMO, DEMO_NOTE, load_backbone, model_id
from .benchmarks import find_benchmark
from .calibration import calibrate, check_max_false_positive_rate
from .configuration import ProbeConfig
from .data import LabelledTexts, benchmark_splits, read_labelled
from .errors import ProbeError
from .evaluation import inspect_head, predict_logits, report
from .features import PromptDataset, StateCache
from .files import package_version, save_head
from .fingerprint import describe
from .metrics import METRICS, default_metric
from .model_card import CardFacts, write_card
from .plots import write_plots
from .probe import ProbeModel
from .prompts import PromptFormat
from .training import ProbeLoss, balanced_weights, create_trainer, training_arguments


logger = logging.get_logger(__name__)


@dataclass
class DataSources:
    """Where the rows come from.

    Attributes:
        train, eval, test: names of data sets (`NAME` or `NAME:SPLIT`), files, folders or Hub data sets. Where train is
            known by name, `eval` and `test` are its validation and test splits, if it has them and others are not given.
            Without `eval`, `validation_share` of train is held back. `test` is scored once at the end, and nothing is
            chosen by it.
        text_column, label_column, label_names, problem_type: see `read_labelled`.
        slice_columns: columns of the test rows to report by; those of the table where test is known by name.
        max_rows: read at most so many training rows.
        data_dir: local copies of the data sets known by name, see `read_benchmark`.

    Raises:
        ProbeError: `data_dir` has no copy of train, or columns are named where every source has its own.
    """

    train: str
    eval: str | None = None
    test: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    label_names: list[str] | None = None
    problem_type: str | None = None
    validation_share: float = 0.15
    slice_columns: list[str] = field(default_factory=list)
    max_rows: int | None = None
    data_dir: str | os.PathLike | None = None

    def __post_init__(self) -> None:
        known = find_benchmark(self.train)
        if known is not None:
            benchmark, split = known
            others = set(benchmark_splits(benchmark, self.data_dir)) - {split or "train"}
            if self.eval is None and "validation" in others:
                self.eval = f"{benchmark.name}:validation"
            if self.test is None and "test" in others:
                self.test = f"{benchmark.name}:test"
        tested = find_benchmark(self.test) if self.test else None
        if tested is not None and not self.slice_columns:
            self.slice_columns = list(tested[0].slices)
        sources = [source for source in (self.train, self.eval, self.test) if source is not None]
        if all(find_benchmark(source) for source in sources) and self._columns != ("text", "label"):
            raise ProbeError(
                f"{', '.join(sources)} have their own columns; text_column and label_column are for files"
            )

    @property
    def _columns(self) -> tuple[str, str]:
        return self.text_column, self.label_column

    def read(self, seed: int) -> dict[str, LabelledTexts]:
        """Rows of `train`, `validation` and, where given, `test`.

        Raises:
            ProbeError: a source cannot be read, or the parts do not have the same labels.
        """
        parts = {"train": self._read(self.train, "train")}
        if self.max_rows is not None and self.max_rows < len(parts["train"]):
            rows = np.random.default_rng(seed).permutation(len(parts["train"]))[: self.max_rows]
            parts["train"] = parts["train"].select(sorted(rows.tolist()))
        if self.eval is None:
            parts["train"], parts["validation"] = parts["train"].split(self.validation_share, seed)
        else:
            parts["validation"] = self._read(self.eval, "validation", parts["train"])
        if self.test is not None:
            parts["test"] = self._read(self.test, "test", parts["train"])
            if known := find_benchmark(self.test):  # a local copy may lack what the table would slice by
                absent = set(known[0].slices) - set(parts["test"].columns)
                self.slice_columns = [column for column in self.slice_columns if column not in absent]
            for column in self.slice_columns:
                if column not in parts["test"].columns:
                    raise ProbeError(f"{self.test} has no column {column!r} to slice by")
        return parts

    def _read(self, source: str, split: str, like: LabelledTexts | None = None) -> LabelledTexts:
        names = self.label_names if like is None else like.label_names
        kind = self.problem_type if like is None else like.problem_type
        columns = ("text", "label") if find_benchmark(source) else self._columns
        return read_labelled(source, *columns, names, kind, split, self.data_dir)


@dataclass
class Recipe:
    """How a head is trained; the fields of `TrainingArguments` have their names there.

    Attributes:
        max_false_positive_rate: how the threshold is chosen, see `calibrate`.
    """

    learning_rate: float = 3e-4
    num_train_epochs: float = 8
    per_device_train_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    focal_gamma: float = 0.0
    class_weights: str | None = None
    patience: int | None = 3
    metric: str | None = None
    max_false_positive_rate: float | None = None


@dataclass
class Prepared:
    """What a run has before it trains.

    Attributes:
        parts: rows of `train`, `validation` and, where given, `test`. datasets: their prompts or states.
        config: of a head, with all that it records of prompts and backbone.
        metric: the validation metric to choose by.
        lm: the frozen backbone; `None` where the states are cached.
        cache: that goes when the run is over.
    """

    parts: dict[str, LabelledTexts]
    config: ProbeConfig
    metric: str
    datasets: dict[str, Dataset]
    lm: PreTrainedModel | None
    cache: StateCache | None

    def close(self) -> None:
        """Removes cached states that nobody asked to keep."""
        if self.cache is not None:
            self.cache.delete()


@dataclass
class TrainingRun:
    """Trains one head a seed on the same rows, keeps the best by validation, and writes its folder.

    Attributes:
        backbone: `"demo"`, a folder or a Hub id. dtype: of its weights.
        data, recipe: see there.
        head: fields of `ProbeConfig` that say what is built and what it reads.
        prompt_format, system_prompt, max_length: see `PromptFormat`.
        output: the head's folder.
        seeds: one training each. Rows are split by the first.
        cache: keep hidden states on disk while training, so that the backbone runs once. cache_dir: keep them for later.
        resume: go on from the checkpoints of a run that was stopped.
        card: what the card says beyond what was measured.
    """

    backbone: str
    data: DataSources
    output: Path
    head: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)
    prompt_format: str = "chat"
    system_prompt: str | None = None
    max_length: int | None = 512
    dtype: str = "auto"
    seeds: list[int] = field(default_factory=lambda: [0])
    cache: bool = True
    cache_dir: Path | None = None
    resume: bool = False
    card: CardFacts = field(default_factory=CardFacts)

    def execute(self) -> dict[str, Any]:
        """Runs it.

        Returns:
            What is also written to `results.json`: sources, recipe, metrics a seed, their mean and spread, and what
            `inspect_head` finds of the head that is kept.

        Raises:
            ProbeError: anything the user can mend, before the training starts.
        """
        prepared = self.prepare()
        config, parts, metric, datasets = prepared.config, prepared.parts, prepared.metric, prepared.datasets
        loss = self.loss(config, parts["train"])
        checkpoints = self.output / "checkpoints"
        if checkpoints.exists() and not self.resume:
            shutil.rmtree(checkpoints)
        backbone = prepared.lm
        runs = [self._train(seed, config, backbone, parts, datasets, loss, metric, checkpoints) for seed in self.seeds]
        best = max(runs, key=lambda run: run["result"]["validation"][metric])
        results = self.save(best["probe"], prepared, [run["result"] for run in runs], best["result"]["seed"])
        shutil.rmtree(checkpoints, ignore_errors=True)
        prepared.close()
        return results

    def prepare(self) -> Prepared:
        """Reads the rows, loads the backbone, renders the prompts and, with a cache, computes their states.

        Raises:
            ProbeError: anything the user can mend.
        """
        parts = self.data.read(self.seeds[0])
        config = self._config(parts["train"])
        metric = self.recipe.metric or default_metric(config)
        if metric not in METRICS[config.problem_type]:
            raise ProbeError(
                f"metric={metric!r} cannot choose a {config.problem_type} head; allowed: "
                f"{', '.join(METRICS[config.problem_type])}"
            )
        check_max_false_positive_rate(config, self.recipe.max_false_positive_rate)
        self.loss(config, parts["train"])
        lm, tokenizer = load_backbone(self.backbone, self.dtype)
        prompts = PromptFormat.create(tokenizer, self.prompt_format, self.system_prompt, self.max_length)
        config = describe(lm, config.replace(**prompts.config_fields()))
        self.output.mkdir(parents=True, exist_ok=True)
        cache = StateCache(self.cache_dir or self.output / ".states") if self.cache else None
        datasets: dict[str, Dataset] = {}
        for name, rows in parts.items():
            ids = prompts.encode(rows.texts)
            datasets[name] = cache.dataset(lm, config, ids, rows.labels) if cache else PromptDataset(ids, rows.labels)
        passing = cache if self.cache_dir is None else None
        return Prepared(parts, config, metric, datasets, None if cache else lm, passing)

    def save(self, probe: ProbeModel, prepared: Prepared, runs: list[dict[str, Any]], chosen: int) -> dict[str, Any]:
        """Writes the folder of the head that was chosen, with the results of all runs, and returns these."""
        results = self._results(prepared.config, prepared.parts, prepared.metric, runs, chosen)
        shown = "test" if "test" in prepared.parts else "validation"
        found = inspect_head(probe, prepared.datasets[shown], prepared.parts[shown].labels)
        results["inspection"] = {"split": shown, **found}
        probe.results = results
        save_head(probe, self.output)
        write_plots(self.output)
        write_card(self.output)
        return results

    def _config(self, rows: LabelledTexts) -> ProbeConfig:
        return ProbeConfig(
            **{"token_scope": "content", **self.head},
            id2label=dict(enumerate(rows.label_names)),
            problem_type=rows.problem_type,
            base_model_name_or_path=model_id(self.backbone),
        )

    def loss(self, config: ProbeConfig, rows: LabelledTexts) -> ProbeLoss:
        """The loss that the recipe asks for."""
        weights = self.recipe.class_weights
        if weights == "balanced":
            weights = balanced_weights(rows.labels, config)
        elif weights is not None:
            try:
                weights = [float(value) for value in weights.split(",")]
            except ValueError:
                raise ProbeError(f"class_weights={weights!r} must be 'balanced' or numbers with commas") from None
        return ProbeLoss(config, weights, self.recipe.label_smoothing, self.recipe.focal_gamma)

    def _train(self, seed: int, config, backbone, parts, datasets, loss, metric, checkpoints: Path) -> dict[str, Any]:
        set_seed(seed)
        recipe = self.recipe
        probe = ProbeModel(config, backbone=backbone)
        folder = checkpoints / f"seed-{seed}"
        args = training_arguments(
            folder,
            metric,
            seed=seed,
            learning_rate=recipe.learning_rate,
            num_train_epochs=recipe.num_train_epochs,
            per_device_train_batch_size=recipe.per_device_train_batch_size,
            gradient_accumulation_steps=recipe.gradient_accumulation_steps,
            weight_decay=recipe.weight_decay,
        )
        trainer = create_trainer(probe, args, datasets["train"], datasets["validation"], loss, recipe.patience)
        last = get_last_checkpoint(str(folder)) if self.resume and folder.is_dir() else None
        trainer.train(resume_from_checkpoint=last)
        return {
            "probe": probe,
            "result": {"seed": seed, "epochs": trainer.state.epoch, **self.judge(probe, parts, datasets)},
        }

    def judge(
        self, probe: ProbeModel, parts: dict[str, LabelledTexts], datasets: dict[str, Dataset]
    ) -> dict[str, Any]:
        """Fits the head's temperature and threshold on the validation rows, and measures it on these and the test rows."""
        logits = predict_logits(probe, datasets["validation"])
        labels = torch.from_numpy(parts["validation"].labels)
        probe.config = calibrate(probe.config, logits, labels, self.recipe.max_false_positive_rate)
        result = {
            "temperature": probe.config.temperature,
            "threshold": probe.config.threshold,
            "validation": report(probe.config, logits, parts["validation"].labels),
        }
        if "test" in parts:
            slices = {column: parts["test"].columns[column] for column in self.data.slice_columns}
            logits = predict_logits(probe, datasets["test"])
            result["test"] = report(probe.config, logits, parts["test"].labels, slices)
        return result

    def _results(self, config: ProbeConfig, parts, metric: str, runs: list[dict], chosen: int) -> dict[str, Any]:
        sources = {"train": self.data.train, "validation": self.data.eval, "test": self.data.test}
        head = ProbeModel(config)
        card = dataclasses.asdict(self.card)
        if self.backbone == DEMO:
            card["limits"].append(DEMO_NOTE)
        return {
            "backbone": config.base_model_name_or_path,
            "dtype": self.dtype,
            "probe_type": config.probe_type,
            "num_parameters": head.num_parameters(),
            "data": {
                name: {
                    # paths differ from machine to machine; the last two parts say which file it was
                    "source": "/".join(Path(sources[name]).parts[-2:])
                    if sources[name]
                    else f"{self.data.validation_share:.0%} of train",
                    "rows": len(rows),
                }
                for name, rows in parts.items()
            },
            "recipe": dataclasses.asdict(self.recipe) | {"metric": metric},
            "runs": runs,
            "chosen_seed": chosen,
            "summary": {
                name: summarize([run[name] for run in runs]) for name in ("validation", "test") if name in runs[0]
            },
            "card": card,
            "environment": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "llama_probe": package_version(),
            },
        }


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
