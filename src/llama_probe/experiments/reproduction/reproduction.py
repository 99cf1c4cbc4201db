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
from ...data.texts import LabelledTexts
from ...distributed import claimed
from ...errors import ProbeError
from ...evaluation.resume import same_settings
from ...files import environment
from ...training.options import SWEEP_NAME
from ...training.recipe import Recipe
from ...training.run import TrainingRun
from ...training.sweep import Sweep, read_sweep
from .comparison import Comparison
from .methods import HEADS, downcast_methods
from .options import ReproductionOptions
from .report import write_report
from .workbench import Workbench, file_name, known_source, metric_of


logger = logging.get_logger(__name__)

TEST_SETS = ("xstest", "openai_moderation", "aegis", "beavertails", "advbench")


@dataclass(kw_only=True)
class Reproduction(ReproductionOptions):
    """The whole comparison. Finished parts stay in the output folder and are not done again.

    An output folder is for one backbone, one set of rows and one set of settings.

    Attributes:
        command: the command as typed, for the report.
    """

    bench: Workbench
    command: str = ""
    comparison: Comparison = field(init=False)

    def __post_init__(self):
        super().__post_init__()
        self.comparison = Comparison(self.bench, self.output, self.epochs, self.patience, self.shots)

    def execute(self) -> dict[str, Any]:
        """Do all that is missing, and return the report, which is also written to `report.json`.

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
            settings["sensitivity"] = {"trials": self.trials}
            if self.sweep:
                digest = hashlib.sha256((self.sweep / SWEEP_NAME).read_bytes()).hexdigest()[:16]
                settings["sensitivity"] = {"digest": digest}
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
        comparison, safety = self.comparison, self._safety_source
        tasks = [self.bench.task(source) for source in self.data] if set(self.only) - {"sensitivity"} else []
        if "main" in self.only:
            for task in tasks:
                yield partial(comparison.main, task, self.methods)
        if "ood" in self.only and safety is not None and self._ood_methods:
            task = self.bench.task(safety)
            yield partial(comparison.main, task, [name for name in self._ood_methods if name in HEADS])
            for name in TEST_SETS:
                if (rows := self._test_rows(name)) is not None:
                    yield partial(comparison.out_of_distribution, task, self._ood_methods, name, rows)
        if "downcast" in self.only:
            methods = downcast_methods(find_decoder(self.bench.lm).hidden_size)
            yield partial(comparison.train, self.bench.task(self._primary), methods, "downcast")
        if "layers" in self.only:
            for task in tasks:
                yield partial(comparison.layers, task, self._layered)
        if "sensitivity" in self.only:
            yield partial(comparison.store.once, "sensitivity", self._sensitivity)
        if "few-labels" in self.only:
            for task in tasks:
                yield partial(comparison.few_labels, task, self._trained_kinds)

    def _test_rows(self, test_set: str) -> LabelledTexts | None:
        try:
            rows = self.bench.test_rows(test_set)
        except ProbeError as error:
            logger.warning(f"{test_set} is skipped: {error}")
            return None
        same_settings(self._settings_path(f"test-{test_set}"), {"rows": rows.digest()[:16]})
        return rows

    def _sensitivity(self) -> dict[str, Any]:
        found = self._run_sweep() if self.sweep is None else read_sweep(self.sweep)
        return {"metric": found["metric"], "trials": found["trials"], "kinds": summarize_trials(found["trials"])}

    def _run_sweep(self) -> dict[str, Any]:
        bench = self.bench
        metric = metric_of(known_source(self._primary))
        run = TrainingRun(
            backbone=bench.backbone,
            output=self.output / "sweep",
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
            parts = {name: find(f"{group}/{name}") for name in names}
            return {name: part for name, part in parts.items() if part is not None}

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
                "num_parameters": bench.lm.num_parameters(),
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
    """Summarise the validation metric of each kind over the configurations of a sweep that did not fail (the paper's figure 3).

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
