"""Trains and judges methods side by side on a bench; each finished result is a part in a store."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ...data.texts import LabelledTexts
from ...errors import ProbeError
from ...evaluation.calibration import BEST_F1, calibrate
from ...evaluation.metrics import summarize
from ...evaluation.report import predict_together, report, score_together
from ...heads.configuration import ProbeConfig
from ...heads.decision import NO_NUMBER_BECAUSE, predictions, probabilities
from ...heads.probe import ProbeModel
from ...hub.folder import is_head_folder
from ...training.fitting import fit_classifier
from ...training.shared import SharedTraining
from ...training.trainer import ProbeLoss
from .baselines import BASELINES, class_logits, fit_tfidf
from .learning_curves import SIZES, learning_curves
from .methods import HeadMethod, head_methods
from .part_store import PartStore
from .workbench import Task, Workbench


logger = logging.get_logger(__name__)


class Comparison:
    """Fills a store with results of methods.

    Args:
        bench: backbone and data.
        folder: for the store (`parts`), the trained heads (`heads`), and what is under way (`training`).
        epochs, patience: of every head.
        shots: examples a label of few-shot prompting.
    """

    def __init__(self, bench: Workbench, folder: Path, epochs: int = 6, patience: int = 3, shots: int = 4):
        for name, value in (("epochs", epochs), ("patience", patience), ("shots", shots)):
            if value < 1:
                raise ProbeError(f"{name}={value} must be at least 1")
        self.bench, self.folder = bench, Path(folder)
        self.store = PartStore(self.folder / "parts")
        self.epochs, self.patience, self.shots = epochs, patience, shots

    def settings(
        self, source: str, name: str, method: HeadMethod | None = None, test: str | None = None
    ) -> dict[str, Any]:
        """What a result of a method on a data set depends on.

        Args:
            source, name: data set and method. method: of a head that is not in the table.
            test: the data set that it is tested on, where that is another.

        Raises:
            ProbeError: the rows cannot be read.
        """
        found = {**self.bench.settings, "data": source, "rows": self.bench.digests(source, test)}
        if test is not None:
            found["test"] = test
        method = method or head_methods().get(name)
        if method is not None:
            return {**found, "epochs": self.epochs, "patience": self.patience, **method.settings}
        return {**found, "shots": self.shots} if BASELINES[name].shots else found

    # Each step works out what the store does not hold yet.

    def main(self, task: Task, names: Sequence[str]) -> None:
        """Every method on the validation and test rows of a data set: parts `main/DATA/METHOD`."""
        heads = head_methods()
        self.train(task, {name: heads[name] for name in names if name in heads})
        for name in names:
            if name in BASELINES:
                self._baseline(task, name)

    def train(self, task: Task, methods: dict[str, HeadMethod], group: str = "main") -> None:
        """Trains heads, all methods and seeds on each pass of the backbone, and keeps them: parts `GROUP/DATA/METHOD`.

        Those that are fitted come first, one by one.

        The best epoch, the layer of methods with one head a layer, temperature and threshold are chosen by validation
        rows; the test rows are scored once, at the end.
        """
        settings = {name: self.settings(task.source, name, method) for name, method in methods.items()}
        parts = {name: f"{group}/{task.name}/{name}" for name in methods}
        missing = [name for name in methods if self.store.find(parts[name], settings[name]) is None]
        for name in missing:
            if methods[name].convex:
                self._fit(task, name, methods[name], group, parts[name], settings[name])
        missing = [name for name in missing if not methods[name].convex]
        if not missing:
            return
        start = time.perf_counter()
        seeds = self.bench.seeds
        candidates = {
            (name, seed): methods[name].candidates(f"{group}/{name}", task.config, seed)
            for name in missing
            for seed in seeds
        }
        scratch = self._scratch(f"{group}-{task.name}", {name: settings[name] for name in missing})
        logger.warning(f"training {', '.join(missing)} on {task.source}, seeds {', '.join(map(str, seeds))}")
        training = SharedTraining(
            [candidate for several in candidates.values() for candidate in several],
            task.dataset("train"),
            task.dataset("validation"),
            task.metric,
            self.epochs,
            scratch,
            self.bench.lm_in_the_loop,
            keep=1.0,
            patience=self.patience,
            seed=seeds[0],
        )
        learners = {learner.candidate.number: learner for learner in training.run(resume=True)}
        chosen = {
            key: max((learners[candidate.number] for candidate in several), key=lambda learner: learner.history.best)
            for key, several in candidates.items()
        }
        if failed := [
            f"{name} (seed {seed})" for (name, seed), one in chosen.items() if one.history.status == "failed"
        ]:
            raise ProbeError(f"{', '.join(failed)} on {task.source} gives no numbers: {NO_NUMBER_BECAUSE}")
        probes = [learner.probe for learner in chosen.values()]
        lm = self.bench.lm_in_the_loop
        validation = predict_together(probes, task.dataset("validation"), lm, progress=True)
        test = predict_together(probes, task.dataset("test"), lm, progress=True)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in missing}
        for (name, seed), learner, *logits in zip(chosen, chosen.values(), validation, test, strict=True):
            probe = learner.probe
            probe.config, judged = judge(probe.config, *logits, task)
            layer = {"layer": probe.layer_indices[0]} if methods[name].each_layer else {}
            runs[name].append({"seed": seed, "best_epoch": learner.history.best_epoch, **layer, **judged})
            probe.save_pretrained(self._head_folder(group, task, name, seed))
        seconds = time.perf_counter() - start
        for name in missing:
            probe = chosen[name, seeds[0]].probe
            result = _result(task, runs[name], probe.num_parameters())
            self.store.write(parts[name], settings[name], result, seconds, [parts[other] for other in missing])
        shutil.rmtree(scratch, ignore_errors=True)

    def _fit(self, task: Task, name: str, method: HeadMethod, group: str, part: str, settings: dict[str, Any]) -> None:
        """A head whose classifier is fitted; its one run is kept under the first seed."""
        start, lm, seed = time.perf_counter(), self.bench.lm_in_the_loop, self.bench.seeds[0]
        logger.warning(f"fitting {name} on {task.source}")
        probe = ProbeModel(task.config.replace(**method.head))
        probe.bind(self.bench.lm)
        probe.to("cpu" if lm is None else lm.device)
        loss = ProbeLoss(probe.config, label_smoothing=method.label_smoothing)
        fitted = fit_classifier(probe, task.dataset("train"), task.dataset("validation"), loss, task.metric, lm)
        (test,) = predict_together([probe], task.dataset("test"), lm, progress=True)
        probe.config, judged = judge(probe.config, fitted.logits, test, task)
        probe.save_pretrained(self._head_folder(group, task, name, seed))
        result = _result(task, [{"seed": None, **fitted.facts, **judged}], probe.num_parameters())
        self.store.write(part, settings, result, time.perf_counter() - start, [part])

    def _baseline(self, task: Task, name: str) -> None:
        settings, part, baseline = self.settings(task.source, name), f"main/{task.name}/{name}", BASELINES[name]
        if self.store.find(part, settings) is not None:
            return
        scratch = self._scratch(f"main-{task.name}-{name}", settings)
        kept, parts = PartStore(scratch, self.store.weights), []

        def run(seed: int) -> dict[str, Any]:
            logger.warning(f"{name} on {task.source}" + (f", seed {seed}" if baseline.seeded else ""))
            scored = baseline.run(task, seed, self.shots)
            _, judged = judge(task.labels, scored.validation, scored.test, task)
            run = {"seed": seed if baseline.seeded else None, **scored.chosen, **judged}
            return {"run": run, "num_parameters": scored.num_parameters}

        for seed in self.bench.seeds if baseline.seeded else self.bench.seeds[:1]:
            parts.append(kept.once(f"seed-{seed}", settings, partial(run, seed)))
        result = _result(task, [each.result["run"] for each in parts], parts[-1].result["num_parameters"])
        self.store.write(part, settings, result, sum(each.seconds for each in parts), [part])
        shutil.rmtree(scratch, ignore_errors=True)

    def out_of_distribution(self, task: Task, names: Sequence[str], test_set: str) -> None:
        """Heads that were trained on one data set, and TF-IDF, on the test rows of another: parts `ood/DATA/SET/METHOD`.

        Label 1 of both is the harmful one. Nothing is fitted on the other set, thresholds included.
        """
        prefix = f"ood/{task.name}/{test_set}"
        settings = {name: self.settings(task.source, name, test=test_set) for name in names}
        missing = [name for name in names if self.store.find(f"{prefix}/{name}", settings[name]) is None]
        if not missing:
            return
        start = time.perf_counter()
        rows = self.bench.test_rows(test_set)
        logger.warning(f"{', '.join(missing)}, trained on {task.source}, on {test_set}")
        heads = head_methods()
        keys = [
            (name, seed)
            for name in missing
            if name in heads
            for seed in (self.bench.seeds[:1] if heads[name].convex else self.bench.seeds)
        ]
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in missing}
        if keys:
            probes = [self.head(task, *key) for key in keys]
            dataset = self.bench.dataset(rows, task.config)
            found = predict_together(probes, dataset, self.bench.lm_in_the_loop, progress=True)
            for (name, seed), probe, logits in zip(keys, probes, found, strict=True):
                runs[name].append({"seed": seed, "test": report(probe.config, logits, rows.labels)})
        if "tfidf" in missing:
            runs["tfidf"].append({"seed": None, "test": _tfidf_elsewhere(task, rows)})
        seconds, parts = time.perf_counter() - start, [f"{prefix}/{name}" for name in missing]
        for name, part in zip(missing, parts, strict=True):
            result = {"runs": runs[name], "summary": {"test": summarize([run["test"] for run in runs[name]])}}
            self.store.write(part, settings[name], result, seconds, parts)

    def layer_groups(self, task: Task, name: str) -> None:
        """Layer weights of a head on test rows, by label and by whether it is right: part `layers/DATA/METHOD`.

        A head that reads one layer, or has no weights to show, has no groups.
        """
        settings, part = self.settings(task.source, name), f"layers/{task.name}/{name}"
        if self.store.find(part, settings) is not None:
            return
        start = time.perf_counter()
        runs = self.store.find(f"main/{task.name}/{name}", settings).result["runs"]
        best = max(runs, key=lambda run: run["validation"][task.metric])["seed"]
        probe = self.head(task, name, best)
        result = {"seed": best, "layers": probe.layer_indices, "groups": [], "errors": []}
        if len(probe.layer_indices) > 1:
            result |= self._layer_groups(task, probe)
        self.store.write(part, settings, result, time.perf_counter() - start, [part])

    def _layer_groups(self, task: Task, probe: ProbeModel) -> dict[str, Any]:
        count, config = len(task.parts["test"]), probe.config
        logits, weights = torch.empty(count, config.num_labels), torch.empty(count, len(probe.layer_indices))
        outputs = score_together(
            [probe], task.dataset("test"), self.bench.lm_in_the_loop, progress=True, output_attentions=True
        )
        for rows, (output,) in outputs:
            if output.layer_weights is None:
                return {}
            logits[rows], weights[rows] = output.logits.cpu(), output.layer_weights.cpu()
        given = predictions(probabilities(logits, config), config).numpy()
        return group_layers(weights.numpy(), task.parts["test"].labels, given, list(config.id2label.values()))

    def few_labels_settings(self, source: str, name: str) -> dict[str, Any]:
        """What the learning curve of a head on a data set depends on."""
        head, rows = head_methods()[name].head, self.bench.digests(source)
        return {**self.bench.settings, "data": source, "rows": rows, "head": head, "sizes": list(SIZES)}

    def few_labels(self, task: Task, names: Sequence[str]) -> None:
        """Heads on few training rows, scored on the test rows: parts `few-labels/DATA/NAME`.

        They are trained as `llama-probe train` would; nothing is chosen, so neither validation nor test rows are looked at
        on the way.
        """
        settings = {name: self.few_labels_settings(task.source, name) for name in names}
        parts = {name: f"few-labels/{task.name}/{name}" for name in names}
        wanted = [name for name in names if self.store.find(parts[name], settings[name]) is None]
        if not wanted:
            return
        logger.warning(f"learning curves of {', '.join(wanted)} on {task.source}")
        sets = [value for name in ("train", "test") for value in (task.dataset(name), task.parts[name].labels)]
        heads, lm = {name: settings[name]["head"] for name in wanted}, self.bench.lm_in_the_loop
        asked = {name: settings[name] for name in wanted}
        scratch = self._scratch(f"few-labels-{task.name}", asked)
        kept, draws = PartStore(scratch, self.store.weights), []

        def keep(name: str, work: Callable[[], Any]) -> Any:
            draws.append(kept.once(name, asked, work))
            return draws[-1].result

        curves = learning_curves(task.config, *sets, heads, SIZES, self.bench.seeds, lm, keep)
        rows = {name: len(task.parts[name]) for name in ("train", "test")}
        seconds, together = sum(draw.seconds for draw in draws), [parts[name] for name in wanted]
        for name in wanted:
            own = [point for point in curves if point["head"] == name]
            result = {"metric": task.metric, "rows": rows, "curve": own}
            self.store.write(parts[name], settings[name], result, seconds, together)
        shutil.rmtree(scratch, ignore_errors=True)

    def head(self, task: Task, name: str, seed: int) -> ProbeModel:
        """A head that `main` has kept.

        Raises:
            ProbeError: its folder is gone.
        """
        folder = self._head_folder("main", task, name, seed)
        if not is_head_folder(folder):
            part = self.store.folder / "main" / task.name / f"{name}.json"
            raise ProbeError(f"{folder} is gone, though {part} is there: remove that file to train the head again")
        lm = self.bench.lm_in_the_loop
        probe = ProbeModel.from_pretrained(folder).to("cpu" if lm is None else lm.device)
        probe.bind(self.bench.lm)
        return probe

    def _scratch(self, name: str, settings: dict[str, Any]) -> Path:
        """Folder for what is done of parts that are not finished, with these settings and on this backbone alone."""
        digest = hashlib.sha256(json.dumps([settings, self.store.weights]).encode()).hexdigest()[:8]
        return self.folder / "training" / f"{name}-{digest}"

    def _head_folder(self, group: str, task: Task, name: str, seed: int) -> Path:
        kept = "" if group == "main" else f"{group}-"
        return self.folder / "heads" / task.name / f"{kept}{name}-seed-{seed}"


def judge(
    config: ProbeConfig, validation: torch.Tensor, test: torch.Tensor, task: Task
) -> tuple[ProbeConfig, dict[str, Any]]:
    """Fits temperature and threshold on the validation rows, and measures both parts.

    The threshold is that of their best F1, as is usual where methods are compared; `llama-probe train` has a steadier one.

    Args:
        config: that knows the labels. validation, test: logits `[rows, num_labels]`. task: where they are from.
    """
    labels = task.parts["validation"].labels
    config = calibrate(config, validation, torch.from_numpy(labels), threshold_rule=BEST_F1)
    return config, {
        "temperature": config.temperature,
        "threshold": config.threshold,
        "validation": report(config, validation, labels),
        "test": report(config, test, task.parts["test"].labels, task.slices),
    }


def group_layers(
    weights: np.ndarray, labels: np.ndarray, given: np.ndarray, names: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Mean layer weights of the rows with each label, apart for those that the head gets right and wrong.

    Args:
        weights (`[rows, layers_read]`): of each row. labels, given (`[rows]`): true and given class. names: of the classes.

    Returns:
        `groups`: for each label that occurs `label`, `right`, `rows` and mean `weights`; `errors`: for each pair of a true
        and a given label with right rows of both, `rows`, and how far the mean weights of these errors are from those of
        the right rows of the given (`to_given`) and of the true label (`to_true`), in total variation, 0 to 1.
    """
    right = {label: weights[(labels == label) & (given == label)] for label in range(len(names))}
    groups, errors = [], []
    for label, name in enumerate(names):
        wrong = weights[(labels == label) & (given != label)]
        for rows, is_right in ((right[label], True), (wrong, False)):
            if len(rows):
                mean = [round(float(value), 5) for value in rows.mean(axis=0)]
                groups.append({"label": name, "right": is_right, "rows": len(rows), "weights": mean})
        for other in range(len(names)):
            rows = weights[(labels == label) & (given == other)]
            if other != label and len(rows) and len(right[label]) and len(right[other]):
                distance = {
                    key: round(float(np.abs(rows.mean(axis=0) - right[c].mean(axis=0)).sum() / 2), 5)
                    for key, c in (("to_given", other), ("to_true", label))
                }
                errors.append({"label": name, "given": names[other], "rows": len(rows), **distance})
    return {"groups": groups, "errors": errors}


def _result(task: Task, runs: list[dict[str, Any]], num_parameters: int) -> dict[str, Any]:
    return {
        "num_parameters": num_parameters,
        "rows": {name: len(rows) for name, rows in task.parts.items()},
        "metric": task.metric,
        "runs": runs,
        "summary": {name: summarize([run[name] for run in runs]) for name in ("validation", "test")},
    }


def _tfidf_elsewhere(task: Task, rows: LabelledTexts) -> dict[str, Any]:
    model, count = fit_tfidf(task.parts["train"]), task.labels.num_labels
    validation = class_logits(model, task.parts["validation"].texts, count)
    labels = torch.from_numpy(task.parts["validation"].labels)
    config = calibrate(task.labels, validation, labels, threshold_rule=BEST_F1)
    return report(config, class_logits(model, rows.texts, count), rows.labels)
