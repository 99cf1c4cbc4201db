"""Trains and measures methods side by side on a bench. Each finished result is a part in a store."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ...data.texts import LabelledTexts
from ...errors import ProbeError
from ...evaluation.calibration import BEST_F1
from ...evaluation.metrics import summarize
from ...evaluation.prediction import collect, predict_together, score_batches
from ...evaluation.report import report
from ...files import remove_leftovers, write_atomically
from ...heads.configuration import ProbeConfig
from ...heads.decision import NO_NUMBER_BECAUSE, predictions, probabilities
from ...heads.probe import ProbeModel
from ...training.fitting import fit_classifier
from ...training.learners import Candidate
from ...training.loss import ProbeLoss
from ...training.recipe import Recipe
from ...training.results import decide
from ...training.shared import SharedTraining
from .baselines import SCORERS, SEEDED, score_tfidf
from .learning_curves import SIZES, train_on_few
from .methods import HEADS, HeadMethod
from .workbench import Task, Workbench


logger = logging.get_logger(__name__)

# The threshold is that of the best F1, as usual in comparisons. `llama-probe train` has a steadier one.
_RECIPE = Recipe(threshold_rule=BEST_F1)


class PartStore:
    """Finished parts of a long run, JSON files, so that it can be resumed. A part's name is a path: `main/toxicchat/mha`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def find(self, name: str) -> Any:
        """Return a finished part, or `None` if there is none."""
        path = self._path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def missing(self, group: str, names: Iterable[str]) -> dict[str, str]:
        """Return the names whose parts `GROUP/NAME` are not finished, with their parts."""
        parts = {name: f"{group}/{name}" for name in names}
        return {name: part for name, part in parts.items() if not self._path(part).is_file()}

    def write(self, name: str, part: Any) -> None:
        """Write a finished part atomically."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        write_atomically({path: json.dumps(part, indent=2) + "\n"})

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """Return a finished part. If there is none, write the result of `work` as the part."""
        if not self._path(name).is_file():
            self.write(name, work())
        return self.find(name)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


class Comparison:
    """Methods on a bench, with a store of their results. Each step does what the store lacks.

    `folder` holds the store (`parts`), the trained heads (`heads`) and unfinished work (`training`). `epochs` and `patience`
    are those of every head, `shots` the examples a label of few-shot prompting.
    """

    def __init__(self, bench: Workbench, folder: Path, epochs: int, patience: int, shots: int):
        self.bench, self.folder, self.store = bench, folder, PartStore(folder / "parts")
        self.epochs, self.patience, self.shots = epochs, patience, shots

    def main(self, task: Task, names: Sequence[str]) -> None:
        """Score every method on the validation and test rows of a data set: parts `main/DATA/METHOD`."""
        self.train(task, {name: HEADS[name] for name in names if name in HEADS})
        for name in self.store.missing(f"main/{task.name}", [name for name in names if name in SCORERS]):
            self._baseline(task, name)

    def train(self, task: Task, methods: dict[str, HeadMethod], group: str = "main") -> None:
        """Train heads, all methods and seeds on each pass of the backbone: parts `GROUP/DATA/METHOD`.

        Validation rows choose the best epoch, the layer of methods with one head a layer, temperature and threshold. The test
        rows are scored once, at the end. The heads are saved.
        """
        parts = self.store.missing(f"{group}/{task.name}", methods)
        for name in [name for name in parts if methods[name].convex]:
            self.store.once(parts.pop(name), partial(self._fit, task, name, methods[name], group))
        if not parts:
            return
        seeds, labels = self.bench.seeds, task.parts["train"].labels
        candidates = {
            (name, seed): candidates_of(methods[name], f"{group}/{name}", task.config, labels, seed)
            for name, seed in product(parts, seeds)
        }
        scratch = self._scratch(parts.values())
        logger.warning(f"training {', '.join(parts)} on {task.source}, seeds {', '.join(map(str, seeds))}")
        training = SharedTraining(
            [candidate for several in candidates.values() for candidate in several],
            task.dataset("train"),
            task.dataset("validation"),
            task.metric,
            self.epochs,
            scratch,
            keep=1.0,
            patience=self.patience,
            seed=seeds[0],
        )
        learners = {learner.candidate.number: learner for learner in training.run(resume=True)}
        chosen = {
            key: max((learners[candidate.number] for candidate in several), key=lambda learner: learner.history.best)
            for key, several in candidates.items()
        }
        failed = [f"{name} (seed {seed})" for (name, seed), one in chosen.items() if one.history.status == "failed"]
        if failed:
            raise ProbeError(f"{', '.join(failed)} on {task.source} gives no numbers: {NO_NUMBER_BECAUSE}")
        probes = [learner.probe for learner in chosen.values()]
        logits = [predict_together(probes, task.dataset(part), progress=True) for part in ("validation", "test")]
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in parts}
        for (name, seed), learner, *both in zip(chosen, chosen.values(), *logits, strict=True):
            probe = learner.probe
            probe.config, judged = measure(probe.config, *both, task)
            layer = {"layer": probe.layer_indices[0]} if methods[name].each_layer else {}
            runs[name].append({"seed": seed, "best_epoch": learner.history.best_epoch, **layer, **judged})
            probe.save_pretrained(self._head_folder(group, task, name, seed))
        for name, part in parts.items():
            self.store.write(part, _result(task, runs[name], chosen[name, seeds[0]].probe.num_parameters()))
        shutil.rmtree(scratch, ignore_errors=True)

    def _fit(self, task: Task, name: str, method: HeadMethod, group: str) -> dict[str, Any]:
        """Fit a convex head. Its one run is saved under the first seed."""
        logger.warning(f"fitting {name} on {task.source}")
        probe = ProbeModel(task.config.replace(**method.head))
        probe.bind(self.bench.lm)
        loss = ProbeLoss.create(method.recipe, probe.config, task.parts["train"].labels)
        fitted = fit_classifier(probe, task.dataset("train"), task.dataset("validation"), loss, task.metric)
        (test,) = predict_together([probe], task.dataset("test"), progress=True)
        probe.config, judged = measure(probe.config, fitted.logits, test, task)
        probe.save_pretrained(self._head_folder(group, task, name, self.bench.seeds[0]))
        return _result(task, [{"seed": None, **fitted.facts, **judged}], probe.num_parameters())

    def _baseline(self, task: Task, name: str) -> None:
        part = f"main/{task.name}/{name}"
        scratch, seeds = self._scratch([part]), self.bench.seeds if name in SEEDED else [None]

        def run(seed: int | None) -> dict[str, Any]:
            logger.warning(f"{name} on {task.source}" + ("" if seed is None else f", seed {seed}"))
            scored = SCORERS[name](task, seed, self.shots)
            _, judged = measure(task.labels, scored.validation, scored.test, task)
            return {"run": {"seed": seed, **scored.chosen, **judged}, "num_parameters": scored.num_parameters}

        kept = [PartStore(scratch).once(f"seed-{seed}", partial(run, seed)) for seed in seeds]
        self.store.write(part, _result(task, [each["run"] for each in kept], kept[-1]["num_parameters"]))
        shutil.rmtree(scratch, ignore_errors=True)

    def out_of_distribution(self, task: Task, names: Sequence[str], test_set: str, rows: LabelledTexts) -> None:
        """Score heads and TF-IDF, trained on one data set, on the test rows of another: parts `ood/DATA/SET/METHOD`.

        Label 1 of both is the harmful one. Nothing is fitted on the other set, not even the threshold.
        """
        parts = self.store.missing(f"ood/{task.name}/{test_set}", names)
        if not parts:
            return
        logger.warning(f"{', '.join(parts)}, trained on {task.source}, on {test_set}")
        seeds = {name: self.bench.seeds[: 1 if HEADS[name].convex else None] for name in parts if name in HEADS}
        keys = [(name, seed) for name, several in seeds.items() for seed in several]
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in parts}
        if keys:
            probes = [self.head(task, *key) for key in keys]
            dataset = self.bench.dataset(rows, task.config)
            found = predict_together(probes, dataset, progress=True)
            for (name, seed), probe, logits in zip(keys, probes, found, strict=True):
                runs[name].append({"seed": seed, "test": report(probe.config, logits, rows.labels)})
        if "tfidf" in parts:
            scored = score_tfidf(task, rows.texts)
            config, _ = decide(task.labels, scored.validation, task.parts["validation"].labels, _RECIPE)
            runs["tfidf"].append({"seed": None, "test": report(config, scored.test, rows.labels)})
        for name, part in parts.items():
            summary = {"test": summarize([run["test"] for run in runs[name]])}
            self.store.write(part, {"runs": runs[name], "summary": summary})

    def layers(self, task: Task, names: Sequence[str]) -> None:
        """Average the layer weights of heads on test rows, see `group_layers`: parts `layers/DATA/METHOD`."""
        self.main(task, names)
        for name in names:
            self.store.once(f"layers/{task.name}/{name}", partial(self._layer_groups, task, name))

    def _layer_groups(self, task: Task, name: str) -> dict[str, Any]:
        runs = self.store.find(f"main/{task.name}/{name}")["runs"]
        best = max(runs, key=lambda run: run["validation"][task.metric])["seed"]
        probe, rows = self.head(task, name, best), task.parts["test"]
        batches = score_batches([probe], task.dataset("test"), progress=True, output_attentions=True)
        parts = ((numbers, [output.logits, output.layer_weights]) for numbers, (output,) in batches)
        logits, weights = collect(len(rows), parts)
        given = predictions(probabilities(logits, probe.config), probe.config).numpy()
        groups = group_layers(weights.numpy(), rows.labels, given, rows.label_names)
        return {"seed": best, "layers": probe.layer_indices, **groups}

    def few_labels(self, task: Task, names: Iterable[str]) -> None:
        """Train heads on few rows, as `llama-probe train` would, and score them: parts `few-labels/DATA/NAME`.

        Nothing is chosen, so neither validation nor test rows are looked at during training.
        """
        parts = self.store.missing(f"few-labels/{task.name}", names)
        if not parts:
            return
        logger.warning(f"learning curves of {', '.join(parts)} on {task.source}")
        sets = [(task.dataset(name), task.parts[name].labels) for name in ("train", "test")]
        heads, scratch = {name: HEADS[name].head for name in parts}, self._scratch(parts.values())
        rows = {name: len(part) for name, part in task.parts.items()}
        sizes, points = [size for size in SIZES if size <= rows["train"]] or [rows["train"]], []
        for size, seed in tqdm(list(product(sizes, self.bench.seeds)), desc="learning curves", leave=False):
            work = partial(train_on_few, task.config, *sets, heads, size, seed)
            points += PartStore(scratch).once(f"{size}-rows-seed-{seed}", work)
        for name, part in parts.items():
            curve = [point for point in points if point["head"] == name]
            self.store.write(part, {"metric": task.metric, "rows": rows, "curve": curve})
        shutil.rmtree(scratch, ignore_errors=True)

    def head(self, task: Task, name: str, seed: int) -> ProbeModel:
        """Load a head that `main` has saved."""
        probe = ProbeModel.from_pretrained(self._head_folder("main", task, name, seed))
        probe.bind(self.bench.lm)
        return probe

    def _scratch(self, parts: Iterable[str]) -> Path:
        """Return the folder for unfinished work on some parts."""
        return self.folder / "training" / f"{zlib.crc32(' '.join(parts).encode()):08x}"

    def _head_folder(self, group: str, task: Task, name: str, seed: int) -> Path:
        kept = "" if group == "main" else f"{group}-"
        return self.folder / "heads" / task.name / f"{kept}{name}-seed-{seed}"


def candidates_of(method: HeadMethod, name: str, base: ProbeConfig, labels: np.ndarray, seed: int) -> list[Candidate]:
    """Return the candidates to train on rows of these labels for a seed: one, or one a layer.

    Name and seed give a candidate's number, and with it its dropout. Results do not depend on other methods beside it.
    """
    config = base.replace(**method.head)
    states = range(0, config.num_hidden_layers + 1, method.every)
    if method.every > 1:
        config = config.replace(layers=list(states))
    found = []
    for layer in states if method.each_layer else [None]:
        own = config if layer is None else config.replace(layers=[layer])
        number = zlib.crc32(f"{name}/{layer}/{seed}".encode())
        found.append(Candidate.create(number, own, method.recipe, labels, seed))
    return found


def measure(
    config: ProbeConfig, validation: torch.Tensor, test: torch.Tensor, task: Task
) -> tuple[ProbeConfig, dict[str, Any]]:
    """Fit temperature and threshold on the validation rows, and measure validation and test rows."""
    config, found = decide(config, validation, task.parts["validation"].labels, _RECIPE)
    return config, found | {"test": report(config, test, task.parts["test"].labels, task.slices)}


def group_layers(
    weights: np.ndarray, labels: np.ndarray, given: np.ndarray, names: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Average layer weights `[rows, layers_read]` by label, apart for right and wrong rows.

    Args:
        labels, given (`[rows]`): true and given class.
        names: names of the classes.

    Returns:
        `groups`: for each label that occurs `label`, `right`, `rows` and mean `weights`.
        `errors`: for each pair of a true and a given label with right rows of both, `rows`, and the distances of their mean
        weights to those of the right rows of the given (`to_given`) and of the true label (`to_true`): total variation, 0 to 1.
    """
    right = {label: weights[(labels == label) & (given == label)] for label in range(len(names))}
    groups, errors = [], []
    for label, name in enumerate(names):
        wrong = weights[(labels == label) & (given != label)]
        for rows, is_right in ((right[label], True), (wrong, False)):
            if len(rows):
                mean = [round(float(value), 5) for value in rows.mean(axis=0)]
                groups.append({"label": name, "right": is_right, "rows": len(rows), "weights": mean})
    for label, other in permutations([label for label, rows in right.items() if len(rows)], 2):
        rows = weights[(labels == label) & (given == other)]
        if len(rows):
            far = [np.abs(rows.mean(axis=0) - right[c].mean(axis=0)).sum() / 2 for c in (other, label)]
            distance = {"to_given": round(float(far[0]), 5), "to_true": round(float(far[1]), 5)}
            errors.append({"label": names[label], "given": names[other], "rows": len(rows), **distance})
    return {"groups": groups, "errors": errors}


def _result(task: Task, runs: list[dict[str, Any]], num_parameters: int) -> dict[str, Any]:
    return {
        "num_parameters": num_parameters,
        "rows": {name: len(rows) for name, rows in task.parts.items()},
        "metric": task.metric,
        "runs": runs,
        "summary": {name: summarize([run[name] for run in runs]) for name in ("validation", "test")},
    }
