"""`llama-probe reproduce`: the tables of arXiv 2601.13288 for the backbone at hand."""

from __future__ import annotations

import hashlib
import json
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
from ...files import environment, write_atomically
from ...heads import get_probe_type
from ...training.recipe import Recipe
from ...training.run import TrainingRun
from ...training.sweep import SETUP_NAME, SWEEP_NAME, SearchSpace, Sweep, read_sweep
from .comparison import Comparison
from .learning_curves import SIZES
from .methods import check_methods, downcast_methods, head_methods, method_names
from .part_store import differences
from .report import write_report
from .workbench import SAFETY, Task, Workbench, file_name, known_source, metric_of


logger = logging.get_logger(__name__)

PARTS = ("main", "ood", "downcast", "layers", "sensitivity", "few-labels")
DATA = ("toxicchat", "sst2", "emotion", "imdb")
TEST_SETS = ("xstest", "openai_moderation", "aegis", "beavertails", "advbench")

_SETTINGS_NAME = "settings.json"  # what the sweep beside it was made with


@dataclass
class Reproduction:
    """The comparison as a whole. What is finished is kept in the output folder, and not done again.

    Attributes:
        bench: backbone, seeds and rows.
        output: folder for `report.md`, `report.json`, the plots, the trained heads and the finished parts.
        data: data sets, see `Workbench.task`. The first safety data set is the one for `ood`; it, or else the first, is the
            one for `downcast` and `sensitivity`.
        methods: names from `method_names`; all where left out.
        only: some of `PARTS`; all where left out.
        epochs, patience: of heads. shots: examples a label of few-shot prompting.
        trials: configurations of the search for `sensitivity`; 12 where left out.
        sweep: folder of a sweep to read instead.
        command: as it was typed.

    Raises:
        ProbeError: a name is not known, or a value not allowed.
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
        chosen, self.only = self.only is not None, list(PARTS if self.only is None else self.only)
        for name in self.only:
            if name not in PARTS:
                raise ProbeError(f"only={name!r} is not allowed; allowed: {', '.join(PARTS)}")
        if not self.data or len(set(self.data)) != len(self.data):
            raise ProbeError(f"data={','.join(self.data)} must be names of data sets, each once, and at least one")
        for source in self.data:
            known_source(source)
        if self.trials is not None and self.sweep is not None:
            raise ProbeError(
                f"trials={self.trials} is for a search, and sweep={self.sweep} is read instead of one: leave one of them out"
            )
        self.trials = 12 if self.trials is None else self.trials
        if self.trials < 1:
            raise ProbeError(f"trials={self.trials} must be at least 1")
        if self.sweep is not None and not (Path(self.sweep) / SWEEP_NAME).is_file():
            raise ProbeError(f"{self.sweep} holds no {SWEEP_NAME}: give the output folder of a finished sweep")
        if chosen:
            self._check_parts()
        self.comparison = Comparison(self.bench, self.output, self.epochs, self.patience, self.shots)

    def _check_parts(self) -> None:
        """Raises `ProbeError` for a part that was asked for by name and that data or methods leave empty."""
        if "ood" in self.only and self._safety_source is None:
            raise ProbeError(f"ood needs heads trained on one of {', '.join(SAFETY)}: name it in data")
        for name, suited, wanted in (
            ("ood", self._ood_methods, "tfidf or a head"),
            ("layers", self._layered, "a head that weighs layers, such as gate"),
            ("few-labels", self._trained_kinds, "a kind of head that is trained, such as gate"),
        ):
            if name in self.only and not suited:
                raise ProbeError(
                    f"{name} has nothing to do for methods={','.join(self.methods)}: name {wanted} among them"
                )
        if self.sweep is not None and "sensitivity" not in self.only:
            raise ProbeError(
                f"sweep={self.sweep} is read for sensitivity: name that in only as well, or leave sweep out"
            )

    def execute(self) -> dict[str, Any]:
        """Works out what is missing.

        Returns:
            What is also written to `report.json`.

        Raises:
            ProbeError: anything the user can mend, before any work is done; parts made with other settings, or on another
                backbone of the same name, among it.
        """
        if launched():
            raise ProbeError(
                "a reproduction runs in one process, its rows are not divided: start it without torchrun. A sweep that torchrun "
                "has divided can be read with --sweep"
            )
        with claimed(self.output):
            return self._execute()

    def _execute(self) -> dict[str, Any]:
        if set(self.only) - {"sensitivity"}:
            self._check_rows()
        self.report()  # reads all that is finished, and refuses what was made with other settings
        self._check_backbone()
        if "sensitivity" in self.only and self.sweep is None and not self.comparison.store.holds("sensitivity"):
            self._check_sweep()
        try:
            for step in self._steps():
                step()
                write_report(self.output, self.report(), plots=False)
        except Exception:
            self.bench.close()  # a run that is stopped, and may go on, keeps its states
            raise
        self.bench.close()
        report = self.report()
        write_report(self.output, report)
        return report

    def _check_backbone(self) -> None:
        store = self.comparison.store
        store.weights = self.bench.weights
        self.report()  # and now what was made on another backbone of the same name
        if store.holds("backbone") and store.find("backbone", self._backbone_settings).weights is None:
            logger.warning(
                f"{store.folder} was begun by a version that did not note which weights the backbone has: its parts are "
                "taken to be made on those at hand"
            )

    def _check_rows(self) -> None:
        for source in self.data:
            task = self.bench.task(source)
            counts = np.bincount(task.parts["train"].labels, minlength=task.labels.num_labels)
            if "few-shot" in self.methods and "main" in self.only and counts.min() < self.shots:
                name = task.parts["train"].label_names[int(counts.argmin())]
                raise ProbeError(
                    f"{source} has {counts.min()} training rows of the label {name!r}, and few-shot prompting wants "
                    f"{self.shots}: use more rows, or fewer with --shots"
                )
            if "few-labels" in self.only and self._trained_kinds and counts.sum() < min(SIZES):
                raise ProbeError(
                    f"{source} has {counts.sum()} training rows, and few-labels wants {min(SIZES)} at least: use more rows, or "
                    "leave it out with --only"
                )

    def _steps(self) -> Iterator[Any]:
        """What is to be done, in order."""
        comparison, heads = self.comparison, [name for name in self.methods if name in head_methods()]
        yield self._describe_backbone
        if "main" in self.only:
            for source in self.data:
                yield lambda source=source: comparison.main(self.bench.task(source), self.methods)
        if "ood" in self.only and self._safety_source is not None and self._ood_methods:
            safety = self.bench.task(self._safety_source)
            yield lambda: comparison.main(safety, heads)
            for name in TEST_SETS:
                if self._at_hand(name):
                    yield lambda name=name: comparison.out_of_distribution(safety, self._ood_methods, name)
        if "downcast" in self.only:
            yield self._downcast
        if "layers" in self.only:
            for source in self.data:
                yield lambda source=source: self._layers(self.bench.task(source))
        if "sensitivity" in self.only:
            yield self._sensitivity
        if "few-labels" in self.only and self._trained_kinds:
            for source in self.data:
                yield lambda source=source: comparison.few_labels(self.bench.task(source), self._trained_kinds)

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
        """Heads whose weights on the layers are learned."""
        kinds = {name: method.head["probe_type"] for name, method in head_methods().items()}
        weighted = {name for name, kind in kinds.items() if kind != "pooling" and get_probe_type(kind).reads == "all"}
        return [name for name in self.methods if name in weighted]

    @property
    def _trained_kinds(self) -> list[str]:
        """Methods that are a kind of head and no more, and are trained: those that are compared on few labels."""
        heads = head_methods()
        found = [name for name in self.methods if name in heads and heads[name].head["probe_type"] == name]
        return [name for name in found if not heads[name].convex]

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
        if self.comparison.store.find("backbone", self._backbone_settings) is not None:
            return
        start, decoder = time.perf_counter(), find_decoder(self.bench.lm)
        facts = {
            "name": model_id(self.bench.backbone).rstrip("/").split("/")[-1],
            "model_type": decoder.model_type,
            "num_parameters": sum(parameter.numel() for parameter in self.bench.lm.parameters()),
            "num_hidden_layers": decoder.num_hidden_layers,
            "hidden_size": decoder.hidden_size,
        }
        seconds = time.perf_counter() - start
        self.comparison.store.write("backbone", self._backbone_settings, facts, seconds, ["backbone"])

    def _downcast(self) -> None:
        backbone = self.comparison.store.find("backbone", self._backbone_settings).result
        methods = downcast_methods(backbone["hidden_size"])
        self.comparison.train(self.bench.task(self._primary), methods, "downcast")

    def _layers(self, task: Task) -> None:
        self.comparison.main(task, self._layered)
        for name in self._layered:
            self.comparison.layer_groups(task, name)

    @property
    def _sensitivity_settings(self) -> dict[str, Any]:
        if self.sweep is not None:
            digest = hashlib.sha256((Path(self.sweep) / SWEEP_NAME).read_bytes()).hexdigest()
            return {"sweep": Path(self.sweep).name, "digest": digest[:16]}
        rows = self.bench.digests(self._primary)
        own = {"trials": self.trials, "epochs": self.epochs, "patience": self.patience}
        return {**self.bench.settings, "data": self._primary, "rows": rows, **own}

    @property
    def _sweep_settings(self) -> dict[str, Any]:
        return {**self._sensitivity_settings, "weights": self.bench.weights}

    def _sensitivity(self) -> None:
        store, settings = self.comparison.store, self._sensitivity_settings
        if store.find("sensitivity", settings) is not None:
            return
        start = time.perf_counter()
        found = self._run_sweep() if self.sweep is None else read_sweep(Path(self.sweep))
        result = {"metric": found["metric"], "trials": found["trials"], "kinds": summarize_trials(found["trials"])}
        store.write("sensitivity", settings, result, time.perf_counter() - start, ["sensitivity"])

    def _check_sweep(self) -> None:
        """Raises `ProbeError` for a sweep in the output folder, finished or not, that was made with other settings."""
        folder = self.output / "sweep"
        if not any((folder / name).exists() for name in (SETUP_NAME, SWEEP_NAME)):
            return
        path = folder / _SETTINGS_NAME
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        found.setdefault("weights", self.bench.weights)  # earlier versions did not note them
        if told := differences(found, self._sweep_settings):
            raise ProbeError(
                f"{folder} holds a sweep that was made with other settings: {told}. Give those again, or another --output; or "
                "remove the folder to do the sweep anew"
            )

    def _run_sweep(self) -> dict[str, Any]:
        bench, folder = self.bench, self.output / "sweep"
        self._check_sweep()
        if (folder / SWEEP_NAME).is_file():
            return read_sweep(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._sweep_settings, indent=2) + "\n"
        write_atomically({folder / _SETTINGS_NAME: lambda path: path.write_text(text, encoding="utf-8")})
        run = TrainingRun(
            backbone=bench.backbone,
            output=folder,
            data=bench.sources(self._primary),
            recipe=Recipe(
                num_train_epochs=self.epochs, patience=self.patience, metric=metric_of(known_source(self._primary))
            ),
            max_length=bench.max_length,
            dtype=bench.dtype,
            seeds=bench.seeds[:1],
            cache=bench.cache,
            cache_dir=(bench.cache_dir or bench.scratch) if bench.cache else None,
        )
        # Nothing is pruned: a score after one epoch says more of the learning rate than of what the configuration is good for.
        return Sweep(run, SearchSpace(), self.trials, keep=1.0, resume=True).run()

    def report(self) -> dict[str, Any]:
        """All that is finished, also of parts that are not asked for now.

        Raises:
            ProbeError: a part that is asked for was made with other settings.
        """
        comparison, bench, safety = self.comparison, self.bench, self._safety_source
        seconds: dict[str, float] = {}

        def find(name: str, settings: Callable[[], dict[str, Any]]) -> Any:
            if not comparison.store.holds(name):
                return None
            try:
                wanted = settings()
            except ProbeError:  # its rows are not at hand, so it may be one of others
                return None
            try:
                part = comparison.store.find(name, wanted)
            except ProbeError:
                if name.split("/")[0] in (*self.only, "backbone"):
                    raise
                return None
            if part is None:
                return None
            seconds[", ".join(part.together)] = part.seconds
            return part.result

        def find_all(group: str, source: str, names: Iterable[str], **further) -> dict[str, Any]:
            return {
                name: find(f"{group}/{name}", partial(comparison.settings, source, name, **further)) for name in names
            }

        backbone = find("backbone", lambda: self._backbone_settings)
        found: dict[str, Any] = {
            "command": self.command,
            "environment": environment(),
            "settings": {**bench.settings, "epochs": self.epochs, "patience": self.patience, "shots": self.shots},
            "only": list(self.only),
            "backbone": backbone,
            "main": {source: find_all(f"main/{file_name(source)}", source, self.methods) for source in self.data},
            "layers": {source: find_all(f"layers/{file_name(source)}", source, self._layered) for source in self.data},
            "sensitivity": find("sensitivity", lambda: self._sensitivity_settings),
            "few_labels": {
                source: {
                    name: find(
                        f"few-labels/{file_name(source)}/{name}", partial(comparison.few_labels_settings, source, name)
                    )
                    for name in self._trained_kinds
                }
                for source in self.data
            },
        }
        if safety is not None:
            results = {
                test: find_all(f"ood/{file_name(safety)}/{test}", safety, self._ood_methods, test=test)
                for test in TEST_SETS
            }
            found["ood"] = {"trained_on": safety, "results": results}
        if backbone is not None:
            source = self._primary
            results = {
                name: find(f"downcast/{file_name(source)}/{name}", partial(comparison.settings, source, name, method))
                for name, method in downcast_methods(backbone["hidden_size"]).items()
            }
            found["downcast"] = {"data": source, "results": results}
        found["seconds"] = seconds
        return found


def summarize_trials(trials: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How the validation metric of each kind varies over the configurations of a sweep, as in the paper's figure 3; those that
    failed have none.

    Returns:
        By kind `trials`, `best`, `median` and `worst` score, and Spearman's rank correlation of the score with the learning
        rate, `learning_rate`: `None` for fewer than three configurations or where all scores are alike.
    """
    found = {}
    trials = [trial for trial in trials if trial["score"] is not None]
    for kind in sorted({trial["params"]["probe_type"] for trial in trials}):
        own = [trial for trial in trials if trial["params"]["probe_type"] == kind]
        scores = [trial["score"] for trial in own]
        rates = [next(v for k, v in trial["params"].items() if k.endswith("learning_rate")) for trial in own]
        related = float(spearmanr(rates, scores).statistic) if len(own) > 2 and len(set(scores)) > 1 else None
        found[kind] = {
            "trials": len(own),
            "best": max(scores),
            "median": float(np.median(scores)),
            "worst": min(scores),
            "learning_rate": related,
        }
    return found
