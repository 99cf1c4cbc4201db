"""`llama-probe reproduce`: the tables of arXiv 2601.13288 for the backbone at hand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from transformers.utils import logging

from ...backbone.decoder import find_decoder
from ...backbone.loading import model_id
from ...data.sources import setting
from ...distributed import claimed
from ...errors import ProbeError
from ...evaluation.resume import same_settings
from ...files import environment
from ...heads import get_probe_type
from ...training.options import SWEEP_NAME
from ...training.recipe import Recipe
from ...training.run import TrainingRun
from ...training.sweep import Sweep, read_sweep
from .comparison import Comparison
from .methods import HEADS, METHODS, check_methods, downcast_methods
from .report import write_report
from .workbench import SAFETY, Workbench, file_name, known_source, metric_of


logger = logging.get_logger(__name__)

PARTS = ("main", "ood", "downcast", "layers", "sensitivity", "few-labels")
DATA = ("toxicchat", "sst2", "emotion", "imdb")
TEST_SETS = ("xstest", "openai_moderation", "aegis", "beavertails", "advbench")


@dataclass
class Reproduction:
    """The whole comparison. Finished parts stay in the output folder and are not done again.

    An output folder is for one backbone, one set of rows and one set of settings. The metadata of a field has its help.

    Attributes:
        data: data sets, see `Workbench.task`. `ood` uses the first safety data set. `downcast` and `sensitivity` use it too, or
            else the first data set.
        methods: some of `METHODS`. Defaults to all.
        only: some of `PARTS`. Defaults to all.
        command: the command as typed, for the report.

    Raises:
        ProbeError: a name is unknown, or a value not allowed.
    """

    bench: Workbench
    output: Path = field(metadata={"help": "Folder for the report, the plots and the heads."})
    data: Sequence[str] = setting(DATA, "Data sets with commas, each NAME or NAME:SPLIT (the split to train on).")
    methods: Sequence[str] | None = setting(
        None,
        "Methods with commas: tfidf, zero-shot, few-shot, prototypes, layer-linear, last-token, muli, multimax-small, "
        "multimax-half, or kinds of head. Default: all.",
    )
    only: Sequence[str] | None = setting(None, f"{', '.join(PARTS)}, with commas. Repeatable. Default: all.")
    epochs: int = setting(6, "Maximum number of epochs of each head.")
    patience: int = setting(3, "Stop a head after this many epochs without gain.")
    shots: int = setting(4, "Examples of each label in few-shot prompts.")
    trials: int = setting(12, "Configurations of the sweep for sensitivity.")
    sweep: Path | None = setting(None, "Folder of a finished sweep to read sensitivity from, instead of a new one.")
    command: str = ""
    comparison: Comparison = field(init=False)

    def __post_init__(self):
        self.methods = check_methods(METHODS if self.methods is None else self.methods)
        for name in self.only or ():
            if name not in PARTS:
                raise ProbeError(f"only={name!r} is not allowed; allowed: {', '.join(PARTS)}")
        if not self.data or len(set(self.data)) != len(self.data):
            raise ProbeError(f"data={','.join(self.data)!r} must name at least one data set, each once")
        for source in self.data:
            known_source(source)
        for name in ("epochs", "patience", "shots", "trials"):
            if (value := getattr(self, name)) < 1:
                raise ProbeError(f"{name}={value} must be at least 1")
        if self.sweep is not None and not (self.sweep / SWEEP_NAME).is_file():
            raise ProbeError(f"sweep={self.sweep} holds no {SWEEP_NAME}: give the folder of a finished sweep")
        ood = self._safety_source and self._ood_methods
        for name, found in {"ood": ood, "layers": self._layered, "few-labels": self._trained_kinds}.items():
            if name in (self.only or ()) and not found:
                raise ProbeError(f"only={name!r} has nothing to do with these data and methods")
        if self.sweep is not None and "sensitivity" not in (self.only or PARTS):
            raise ProbeError(f"sweep={self.sweep} is read for sensitivity: add it to only, or leave sweep out")
        self.only = list(PARTS if self.only is None else self.only)
        self.comparison = Comparison(self.bench, self.output, self.epochs, self.patience, self.shots)

    def execute(self) -> dict[str, Any]:
        """Do all that is missing.

        Returns:
            The report, which is also written to `report.json`.

        Raises:
            ProbeError: anything that the user can mend, before any work is done. Among it: the folder is of other settings, rows
                or another backbone.
        """
        with claimed(self.output):
            self._check_settings()
            try:
                for step in self._steps():
                    write_report(self.output, self.report(), finished=False)
                    step()
            except Exception:
                self.bench.close()  # a KeyboardInterrupt keeps the states for the next run
                raise
            self.bench.close()
            report = self.report()
            write_report(self.output, report)
            return report

    def _check_settings(self) -> None:
        """Compare settings, rows and weights with those of an earlier run in the folder, and write what is new."""
        settings: dict[str, Any] = {"run": self._run_settings}
        searched = [] if self.sweep else [self._primary]
        for source in self.data if set(self.only) - {"sensitivity"} else searched:
            parts = self.bench.task(source).parts
            settings[f"rows-{file_name(source)}"] = {name: rows.digest()[:16] for name, rows in parts.items()}
        if "sensitivity" in self.only:
            digest = self.sweep and hashlib.sha256((self.sweep / SWEEP_NAME).read_bytes()).hexdigest()[:16]
            settings["sensitivity"] = {"digest": digest} if self.sweep else {"trials": self.trials}
        for name, values in settings.items():
            if self._settings_path(name).is_file():
                same_settings(self._settings_path(name), values)
        settings["weights"] = {"weights": self.bench.weights}  # loads the backbone
        for name, values in settings.items():
            same_settings(self._settings_path(name), values)

    @property
    def _run_settings(self) -> dict[str, Any]:
        return {**self.bench.settings, "epochs": self.epochs, "patience": self.patience, "shots": self.shots}

    def _settings_path(self, name: str) -> Path:
        return self.output / "settings" / f"{name}.json"

    def _steps(self) -> Iterator[Callable[[], Any]]:
        comparison, store, safety = self.comparison, self.comparison.store, self._safety_source
        tasks = [self.bench.task(source) for source in self.data] if set(self.only) - {"sensitivity"} else []
        if "main" in self.only:
            for task in tasks:
                yield partial(comparison.main, task, self.methods)
        if "ood" in self.only and safety is not None and self._ood_methods:
            task = self.bench.task(safety)
            yield partial(comparison.main, task, [name for name in self._ood_methods if name in HEADS])
            for name in TEST_SETS:
                if self._at_hand(name):
                    yield partial(comparison.out_of_distribution, task, self._ood_methods, name)
        if "downcast" in self.only:
            methods = downcast_methods(find_decoder(self.bench.lm).hidden_size)
            yield partial(comparison.train, self.bench.task(self._primary), methods, "downcast")
        if "layers" in self.only:
            for task in tasks:
                yield partial(comparison.main, task, self._layered)
                for name in self._layered:
                    work = partial(comparison.layer_groups, task, name)
                    yield partial(store.once, f"layers/{task.name}/{name}", work)
        if "sensitivity" in self.only:
            yield partial(store.once, "sensitivity", self._sensitivity)
        if "few-labels" in self.only:
            for task in tasks:
                yield partial(comparison.few_labels, task, self._trained_kinds)

    @property
    def _safety_source(self) -> str | None:
        return next((source for source in self.data if known_source(source).name in SAFETY), None)

    @property
    def _primary(self) -> str:
        return self._safety_source or self.data[0]

    @property
    def _ood_methods(self) -> list[str]:
        return [name for name in self.methods if name in HEADS or name == "tfidf"]

    @property
    def _layered(self) -> list[str]:
        kinds = {name: method.head["probe_type"] for name, method in HEADS.items()}
        weighted = {name for name, kind in kinds.items() if kind != "pooling" and get_probe_type(kind).reads == "all"}
        return [name for name in self.methods if name in weighted]

    @property
    def _trained_kinds(self) -> list[str]:
        """Trained methods that are a kind of head without changes, for the comparison on few labels."""
        kinds = [name for name, method in HEADS.items() if method.head["probe_type"] == name and not method.convex]
        return [name for name in self.methods if name in kinds]

    def _at_hand(self, test_set: str) -> bool:
        try:
            rows = self.bench.test_rows(test_set)
        except ProbeError as error:
            logger.warning(f"{test_set} is skipped: {error}")
            return False
        same_settings(self._settings_path(f"test-{test_set}"), {"rows": rows.digest()[:16]})
        return True

    def _sensitivity(self) -> dict[str, Any]:
        found = self._run_sweep() if self.sweep is None else read_sweep(self.sweep)
        return {"metric": found["metric"], "trials": found["trials"], "kinds": summarize_trials(found["trials"])}

    def _run_sweep(self) -> dict[str, Any]:
        bench, folder = self.bench, self.output / "sweep"
        metric = metric_of(known_source(self._primary))
        run = TrainingRun(
            backbone=bench.backbone,
            output=folder,
            data=bench.sources(self._primary),
            recipe=Recipe(num_train_epochs=self.epochs, patience=self.patience, metric=metric),
            max_length=bench.max_length,
            dtype=bench.dtype,
            seeds=bench.seeds[:1],
            cache_dir=bench.scratch,
        )
        # Nothing is pruned: the score after one epoch tells the learning rate more than the final score.
        return Sweep(training=run, trials=self.trials, keep=1.0, resume=True).run()

    def report(self) -> dict[str, Any]:
        """Collect the finished parts of `data` and `methods`, also those that this call does not ask for."""
        find = self.comparison.store.find

        def find_all(group: str, names: Iterable[str]) -> dict[str, Any]:
            return {name: find(f"{group}/{name}") for name in names}

        def by_source(group: str, names: Iterable[str]) -> dict[str, Any]:
            return {source: find_all(f"{group}/{file_name(source)}", names) for source in self.data}

        bench, safety, primary, decoder = self.bench, self._safety_source, self._primary, find_decoder(self.bench.lm)
        found: dict[str, Any] = {
            "command": self.command,
            "environment": environment(),
            "settings": self._run_settings,
            "only": list(self.only),
            "backbone": {
                "name": Path(model_id(bench.backbone)).name,
                "num_parameters": sum(parameter.numel() for parameter in bench.lm.parameters()),
                "num_hidden_layers": decoder.num_hidden_layers,
                "hidden_size": decoder.hidden_size,
            },
            "main": by_source("main", self.methods),
            "layers": by_source("layers", self._layered),
            "sensitivity": find("sensitivity"),
            "few_labels": by_source("few-labels", self._trained_kinds),
            "downcast": {
                "data": primary,
                "results": find_all(f"downcast/{file_name(primary)}", downcast_methods(decoder.hidden_size)),
            },
        }
        if safety is not None:
            results = {test: find_all(f"ood/{file_name(safety)}/{test}", self._ood_methods) for test in TEST_SETS}
            found["ood"] = {"trained_on": safety, "results": results}
        return found


def summarize_trials(trials: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Summarise the validation metric of each kind over the configurations of a sweep, as in the paper's figure 3.

    Failed configurations are skipped.

    Returns:
        By kind `trials`, `best`, `median` and `worst` score, and `learning_rate`: Spearman's rank correlation of score and
        learning rate, `None` for fewer than three configurations or equal scores.
    """
    found = {}
    trials = [trial for trial in trials if trial["score"] is not None]
    for kind in sorted({trial["params"]["probe_type"] for trial in trials}):
        own = [trial for trial in trials if trial["params"]["probe_type"] == kind]
        scores = [trial["score"] for trial in own]
        rates = [trial["params"]["learning_rate"] for trial in own]
        related = float(spearmanr(rates, scores).statistic) if len(own) > 2 and len(set(scores)) > 1 else None
        summary = {"trials": len(own), "best": max(scores), "median": float(np.median(scores)), "worst": min(scores)}
        found[kind] = {**summary, "learning_rate": related}
    return found
