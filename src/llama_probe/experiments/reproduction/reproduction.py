"""`llama-probe reproduce`: the tables of arXiv 2601.13288 for the backbone at hand."""

from __future__ import annotations

import hashlib
import time
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
from ...distributed import claimed, launched
from ...errors import ProbeError
from ...evaluation.resume import same_settings
from ...files import environment
from ...heads import get_probe_type
from ...training.recipe import Recipe
from ...training.run import TrainingRun
from ...training.sweep import SETUP_NAME, SWEEP_NAME, SearchSpace, Sweep, read_sweep
from .comparison import Comparison
from .learning_curves import SIZES
from .methods import check_methods, downcast_methods, head_methods, method_names
from .report import write_report
from .workbench import SAFETY, Task, Workbench, file_name, known_source, metric_of


logger = logging.get_logger(__name__)

PARTS = ("main", "ood", "downcast", "layers", "sensitivity", "few-labels")
DATA = ("toxicchat", "sst2", "emotion", "imdb")
TEST_SETS = ("xstest", "openai_moderation", "aegis", "beavertails", "advbench")


@dataclass
class Reproduction:
    """The whole comparison. Finished parts stay in the output folder and are not done again.

    Attributes:
        output: folder for `report.md`, `report.json`, the plots, the trained heads and the finished parts.
        data: data sets, see `Workbench.task`. `ood` uses the first safety data set. `downcast` and `sensitivity` use it too, or
            else the first data set.
        methods: names from `method_names`. Defaults to all.
        only: some of `PARTS`. Defaults to all.
        epochs, patience: of heads. shots: examples a label of few-shot prompting.
        trials: configurations of the search for `sensitivity`. Defaults to 12.
        sweep: folder of a finished sweep, in place of a search.
        command: the command as typed, for the report.

    Raises:
        ProbeError: a name is unknown, or a value not allowed.
    """

    bench: Workbench
    output: Path
    data: Sequence[str] = DATA
    methods: Sequence[str] | None = None
    only: Sequence[str] | None = None
    epochs: int = 6
    patience: int = 3
    shots: int = 4
    trials: int | None = None
    sweep: Path | None = None
    command: str = ""
    comparison: Comparison = field(init=False)

    def __post_init__(self):
        self.output = Path(self.output)
        self.methods = check_methods(method_names() if self.methods is None else self.methods)
        for name in self.only or ():
            if name not in PARTS:
                raise ProbeError(f"only={name!r} is not allowed; allowed: {', '.join(PARTS)}")
        if not self.data or len(set(self.data)) != len(self.data):
            raise ProbeError(f"data={','.join(self.data)!r} must name at least one data set, each once")
        for source in self.data:
            known_source(source)
        if self.sweep is not None:
            self.sweep = Path(self.sweep)
            if self.trials is not None:
                raise ProbeError(
                    f"trials={self.trials} is for a search, which sweep={self.sweep} replaces: leave one out"
                )
            if not (self.sweep / SWEEP_NAME).is_file():
                raise ProbeError(
                    f"sweep={self.sweep} holds no {SWEEP_NAME}: give the output folder of a finished sweep"
                )
        self.trials = 12 if self.trials is None else self.trials
        if self.trials < 1:
            raise ProbeError(f"trials={self.trials} must be at least 1")
        if self.only is not None:
            self._check_parts()
        self.only = list(PARTS if self.only is None else self.only)
        self.comparison = Comparison(self.bench, self.output, self.epochs, self.patience, self.shots)

    def _check_parts(self) -> None:
        """Refuse parts that were asked for by name and that data or methods leave empty."""
        if "ood" in self.only and self._safety_source is None:
            raise ProbeError(f"only=ood needs one of {', '.join(SAFETY)} in data")
        for name, suited, wanted in (
            ("ood", self._ood_methods, "tfidf or a head"),
            ("layers", self._layered, "a head that weighs layers, such as gate"),
            ("few-labels", self._trained_kinds, "a trained kind of head, such as gate"),
        ):
            if name in self.only and not suited:
                raise ProbeError(f"only={name} needs {wanted} in methods={','.join(self.methods)}")
        if self.sweep is not None and "sensitivity" not in self.only:
            raise ProbeError(f"sweep={self.sweep} is read for sensitivity: add it to only, or leave sweep out")

    def execute(self) -> dict[str, Any]:
        """Do all that is missing.

        Returns:
            The report, which is also written to `report.json`.

        Raises:
            ProbeError: anything that the user can mend, before any work is done. Among it: parts made with other settings, or on
                another backbone of the same name.
        """
        if launched():
            raise ProbeError(
                "reproduce runs in one process: start it without torchrun (--sweep reads a divided sweep)"
            )
        with claimed(self.output):
            if set(self.only) - {"sensitivity"}:
                self._check_rows()
            self.report()  # refuses parts with other settings
            self._check_backbone()
            if "sensitivity" in self.only and self.sweep is None and not self.comparison.store.holds("sensitivity"):
                self._check_sweep()
            try:
                for step in self._steps():
                    step()
                    write_report(self.output, self.report(), plots=False)
            except Exception:
                self.bench.close()  # a KeyboardInterrupt keeps the states for the next run
                raise
            self.bench.close()
            report = self.report()
            write_report(self.output, report)
            return report

    def _check_rows(self) -> None:
        for source in self.data:
            task = self.bench.task(source)
            counts = np.bincount(task.parts["train"].labels, minlength=task.labels.num_labels)
            if "few-shot" in self.methods and "main" in self.only and counts.min() < self.shots:
                name = task.parts["train"].label_names[int(counts.argmin())]
                raise ProbeError(f"{source} has {counts.min()} training rows of {name!r}: use more, or fewer --shots")
            if "few-labels" in self.only and self._trained_kinds and counts.sum() < min(SIZES):
                raise ProbeError(f"{source} has {counts.sum()} training rows, and few-labels needs {min(SIZES)}")

    def _check_backbone(self) -> None:
        store = self.comparison.store
        store.weights = self.bench.weights
        self.report()  # refuses parts of another backbone
        if store.holds("backbone") and store.find("backbone", self._backbone_settings).weights is None:
            logger.warning(
                f"{store.folder} does not say which weights its parts were made on: they are taken to be those at hand"
            )

    def _check_sweep(self) -> None:
        """Refuse a sweep in the output folder that has other settings."""
        folder = self.output / "sweep"
        if (folder / SETUP_NAME).exists() or (folder / SWEEP_NAME).exists():
            self._claim_sweep()

    def _claim_sweep(self) -> None:
        settings = {**self._sensitivity_settings, "weights": self.bench.weights}
        same_settings(self.output / "sweep" / "settings.json", settings, optional=["weights"])

    def _steps(self) -> Iterator[Callable[[], Any]]:
        comparison, safety = self.comparison, self._safety_source
        tasks = [self.bench.task(source) for source in self.data] if set(self.only) - {"sensitivity"} else []
        yield self._describe_backbone
        if "main" in self.only:
            for task in tasks:
                yield partial(comparison.main, task, self.methods)
        if "ood" in self.only and safety is not None and self._ood_methods:
            task = self.bench.task(safety)
            yield partial(comparison.main, task, [name for name in self._ood_methods if name in head_methods()])
            for name in TEST_SETS:
                if self._at_hand(name):
                    yield partial(comparison.out_of_distribution, task, self._ood_methods, name)
        if "downcast" in self.only:
            hidden_size = find_decoder(self.bench.lm).hidden_size
            yield partial(comparison.train, self.bench.task(self._primary), downcast_methods(hidden_size), "downcast")
        if "layers" in self.only:
            for task in tasks:
                yield partial(self._layers, task)
        if "sensitivity" in self.only:
            yield self._sensitivity
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
        return [name for name in self.methods if name in head_methods() or name == "tfidf"]

    @property
    def _layered(self) -> list[str]:
        kinds = {name: method.head["probe_type"] for name, method in head_methods().items()}
        weighted = {name for name, kind in kinds.items() if kind != "pooling" and get_probe_type(kind).reads == "all"}
        return [name for name in self.methods if name in weighted]

    @property
    def _trained_kinds(self) -> list[str]:
        """Trained methods that are a kind of head without changes, for the comparison on few labels."""
        heads = {name: head for name, head in head_methods().items() if head.head["probe_type"] == name}
        return [name for name in self.methods if name in heads and not heads[name].convex]

    def _at_hand(self, test_set: str) -> bool:
        try:
            self.bench.test_rows(test_set)
        except ProbeError as error:
            logger.warning(f"{test_set} is left out: {error}")
            return False
        return True

    @property
    def _backbone_settings(self) -> dict[str, Any]:
        return {name: self.bench.settings[name] for name in ("backbone", "dtype")}

    def _describe_backbone(self) -> None:
        decoder = find_decoder(self.bench.lm)
        facts = {
            "name": model_id(self.bench.backbone).rstrip("/").split("/")[-1],
            "model_type": decoder.model_type,
            "num_parameters": sum(parameter.numel() for parameter in self.bench.lm.parameters()),
            "num_hidden_layers": decoder.num_hidden_layers,
            "hidden_size": decoder.hidden_size,
        }
        self.comparison.store.once("backbone", self._backbone_settings, lambda: facts)

    def _layers(self, task: Task) -> None:
        self.comparison.main(task, self._layered)
        for name in self._layered:
            self.comparison.layer_groups(task, name)

    @property
    def _sensitivity_settings(self) -> dict[str, Any]:
        if self.sweep is not None:
            digest = hashlib.sha256((self.sweep / SWEEP_NAME).read_bytes()).hexdigest()
            return {"sweep": self.sweep.name, "digest": digest[:16]}
        rows = self.bench.digests(self._primary)
        own = {"trials": self.trials, "epochs": self.epochs, "patience": self.patience}
        return {**self.bench.settings, "data": self._primary, "rows": rows, **own}

    def _sensitivity(self) -> None:
        store, settings = self.comparison.store, self._sensitivity_settings
        if store.find("sensitivity", settings) is not None:
            return
        start = time.perf_counter()
        found = self._run_sweep() if self.sweep is None else read_sweep(self.sweep)
        result = {"metric": found["metric"], "trials": found["trials"], "kinds": summarize_trials(found["trials"])}
        store.write("sensitivity", settings, result, time.perf_counter() - start, ["sensitivity"])

    def _run_sweep(self) -> dict[str, Any]:
        bench, folder = self.bench, self.output / "sweep"
        self._claim_sweep()
        if (folder / SWEEP_NAME).is_file():
            return read_sweep(folder)
        metric = metric_of(known_source(self._primary))
        run = TrainingRun(
            backbone=bench.backbone,
            output=folder,
            data=bench.sources(self._primary),
            recipe=Recipe(num_train_epochs=self.epochs, patience=self.patience, metric=metric),
            max_length=bench.max_length,
            dtype=bench.dtype,
            seeds=bench.seeds[:1],
            cache=bench.cache,
            cache_dir=(bench.cache_dir or bench.scratch) if bench.cache else None,
        )
        # Nothing is pruned: the score after one epoch tells the learning rate more than the final score.
        return Sweep(run, SearchSpace(), self.trials, keep=1.0, resume=True).run()

    def report(self) -> dict[str, Any]:
        """Collect all finished parts, also those that this call does not ask for.

        Raises:
            ProbeError: a part that is asked for was made with other settings.
        """
        comparison, bench, safety = self.comparison, self.bench, self._safety_source
        seconds: dict[str, float] = {}

        def find(part: str, settings: Callable[[], dict[str, Any]]) -> Any:
            if not comparison.store.holds(part):
                return None
            try:
                wanted = settings()
            except ProbeError:  # its rows are not at hand
                return None
            try:
                found = comparison.store.find(part, wanted)
            except ProbeError:
                if part.split("/")[0] in (*self.only, "backbone"):
                    raise
                return None
            seconds[", ".join(found.together)] = found.seconds
            return found.result

        def find_all(
            group: str, source: str, names: Iterable[str], settings=comparison.settings, **further
        ) -> dict[str, Any]:
            return {name: find(f"{group}/{name}", partial(settings, source, name, **further)) for name in names}

        backbone = find("backbone", lambda: self._backbone_settings)
        files = {source: file_name(source) for source in self.data}
        found: dict[str, Any] = {
            "command": self.command,
            "environment": environment(),
            "settings": {**bench.settings, "epochs": self.epochs, "patience": self.patience, "shots": self.shots},
            "only": list(self.only),
            "backbone": backbone,
            "main": {source: find_all(f"main/{name}", source, self.methods) for source, name in files.items()},
            "layers": {source: find_all(f"layers/{name}", source, self._layered) for source, name in files.items()},
            "sensitivity": find("sensitivity", lambda: self._sensitivity_settings),
            "few_labels": {
                source: find_all(f"few-labels/{name}", source, self._trained_kinds, comparison.few_labels_settings)
                for source, name in files.items()
            },
        }
        if safety is not None:
            results = {
                test: find_all(f"ood/{files[safety]}/{test}", safety, self._ood_methods, test=test)
                for test in TEST_SETS
            }
            found["ood"] = {"trained_on": safety, "results": results}
        if backbone is not None:
            source = self._primary
            results = {
                name: find(f"downcast/{files[source]}/{name}", partial(comparison.settings, source, name, method))
                for name, method in downcast_methods(backbone["hidden_size"]).items()
            }
            found["downcast"] = {"data": source, "results": results}
        found["seconds"] = seconds
        return found


def summarize_trials(trials: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Summarise the validation metric of each kind over the configurations of a sweep, as in the paper's figure 3.

    Failed configurations are left out.

    Returns:
        By kind `trials`, `best`, `median` and `worst` score, and `learning_rate`: Spearman's rank correlation of score and
        learning rate, `None` for fewer than three configurations or equal scores.
    """
    found = {}
    trials = [trial for trial in trials if trial["score"] is not None]
    for kind in sorted({trial["params"]["probe_type"] for trial in trials}):
        own = [trial for trial in trials if trial["params"]["probe_type"] == kind]
        scores = [trial["score"] for trial in own]
        rates = [next(v for k, v in trial["params"].items() if k.endswith("learning_rate")) for trial in own]
        related = float(spearmanr(rates, scores).statistic) if len(own) > 2 and len(set(scores)) > 1 else None
        summary = {"trials": len(own), "best": max(scores), "median": float(np.median(scores)), "worst": min(scores)}
        found[kind] = {**summary, "learning_rate": related}
    return found
