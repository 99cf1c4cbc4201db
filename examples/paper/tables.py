"""The tables of arXiv 2601.13288 for a backbone: heads, baselines and prompting side by side.

Run it with `python examples/paper/tables.py --output tables` (extras `train` and `demo`). A run that was stopped resumes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import permutations, product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from baselines import Fitted
from methods import HEADS, KINDS, METHODS, SEEDED, draw_rows, draw_settings, fit, fit_head
from report import write_tables
from tasks import Bench, Task
from transformers.utils import logging

from llama_probe import ProbeError
from llama_probe.data import find_benchmark
from llama_probe.evaluation.prediction import score_rows
from llama_probe.evaluation.report import report
from llama_probe.evaluation.resume import same_settings
from llama_probe.files import write_atomically
from llama_probe.heads.decision import predictions, probabilities


PARTS = ("main", "ood", "downcast", "layers", "sensitivity", "few-labels")
TEST_SETS = ("xstest", "openai_moderation", "aegis", "beavertails", "advbench")
DOWNCASTS = (4, 8, 16, 32, 64)
SIZES = (16, 64, 256, 1024)
logger = logging.get_logger(__name__)


class Tables:
    """Trains and measures all parts. Each finished result is a JSON file: PART/DATA/METHOD/SEED."""

    def __init__(self, bench: Bench, folder: Path, seeds: int, epochs: int, shots: int):
        self.bench = bench
        self.folder = folder
        self.seeds = range(seeds)
        self.epochs = epochs
        self.shots = shots

    def path(self, part: str, task: Task, method: str, seed: int | str) -> Path:
        """Return the file of a result."""
        return self.folder / part / task.source.replace(":", "-") / method / f"{seed}.json"

    def once(self, path: Path, work: Callable[[], Any]) -> None:
        """Write the result of `work`, unless the file is there."""
        if not path.is_file():
            logger.warning(str(path.relative_to(self.folder).with_suffix("")))
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(work(), indent=1) + "\n")

    def methods(self, task: Task, names: list[str], parts: list[str]) -> None:
        """Train each method once, for all parts of `main`, `ood` and `layers` that suit the method."""
        works = {"main": measure, "ood": self.elsewhere, "layers": group_layers}
        for name in names:
            wanted = [part for part in works if part in parts and is_suited(part, task, name)]
            for seed in self.seeds if name in SEEDED else [0]:
                fitted = cache(partial(fit, task, name, seed, self.epochs, self.shots))
                for part in wanted:
                    path = self.path(part, task, name, seed)
                    self.once(path, lambda part=part, fitted=fitted: works[part](task, fitted()))

    def elsewhere(self, task: Task, fitted: Fitted) -> dict[str, Any]:
        """Score the test rows of other data sets. Nothing is fitted on them, not even the threshold."""
        config = task.calibrated(fitted.score(task.validation))
        found = {}
        for name in TEST_SETS:
            try:
                rows = self.bench.test_rows(name)
            except ProbeError as error:
                logger.warning_once(f"{name} is skipped: {error}")
                continue
            found[name] = report(config, fitted.score(rows), rows.labels)
        return found

    def downcasts(self, task: Task) -> None:
        """Train `mha` with each size of its projections."""
        sizes = [size for size in DOWNCASTS if task.config.hidden_size % size == 0]
        for size, seed in ((size, seed) for size in sizes for seed in self.seeds):
            heads = next(number for number in (2, 3, 1) if task.config.hidden_size // size % number == 0)
            head = {"probe_type": "mha", "downcast": size, "num_attention_heads": heads}
            path = self.path("downcast", task, str(size), seed)
            self.once(path, lambda head=head, seed=seed: measure(task, self.train(task, head, seed)))

    def sensitivity(self, task: Task, trials: int) -> None:
        """Train heads with drawn hyper-parameters. Only validation rows are scored."""
        for head_type, number in product(("pooling", "gate", "mha"), range(trials)):
            head, settings = draw_settings(head_type, number)
            path = self.path("sensitivity", task, head_type, number)
            self.once(path, lambda head=head, more=settings: {**self.train(task, head, 0, **more).chosen, **head})

    def few_labels(self, task: Task, names: list[str]) -> None:
        """Train heads on few rows, with the defaults for this number of rows. Nothing is chosen, so no row is held out."""
        sizes = [size for size in SIZES if size <= len(task.train)]
        for name, size, seed in ((name, size, seed) for name in names for size in sizes for seed in self.seeds):

            def work(name=name, size=size, seed=seed) -> dict[str, Any]:
                fitted = fit_head(task, HEADS[name], seed, draw_rows(task.train, size, seed))
                return {"size": size, **report(task.labels, fitted.score(task.test), task.test.labels)}

            self.once(self.path("few-labels", task, name, f"{size}-{seed}"), work)

    def train(self, task: Task, head: dict[str, Any], seed: int, **settings: Any) -> Fitted:
        """Train a head on all training rows."""
        return fit_head(task, head, seed, task.train, task.validation, num_train_epochs=self.epochs, **settings)


def is_suited(part: str, task: Task, name: str) -> bool:
    """Return True if a method can be part of `main`, `ood` or `layers` of this data set."""
    if part == "ood":
        return task.is_safety and (name in HEADS or name in ("tfidf", "layer-linear", "muli"))
    return part == "main" or HEADS.get(name, {}).get("probe_type") not in (None, "last", "pooling")


def measure(task: Task, fitted: Fitted) -> dict[str, Any]:
    """Calibrate a method on the validation rows, and measure it on validation and test rows."""
    logits = fitted.score(task.validation)
    config = task.calibrated(logits)
    return {
        "num_parameters": fitted.num_parameters,
        "chosen": fitted.chosen,
        "rows": {name: len(getattr(task, name)) for name in ("train", "validation", "test")},
        "metric": task.metric,
        "validation": report(config, logits, task.validation.labels),
        "test": report(config, fitted.score(task.test), task.test.labels, task.slices),
    }


def group_layers(task: Task, fitted: Fitted) -> dict[str, Any]:
    """Average the layer weights of test rows by label, and compare the weights of wrong rows with those of both labels.

    `errors` has for each pair of a true and a given label the number of rows, and True if their mean weights are nearer to those
    of the right rows of the given label than to those of the true label (total variation).
    """
    probe = fitted.head
    labels = task.test.labels
    states = task.bench.states(probe.config, task.test)
    logits, weights = score_rows([probe], states, lambda out: [out.logits, out.layer_weights], output_attentions=True)
    config = task.calibrated(fitted.score(task.validation))
    given, weights = predictions(probabilities(logits, config), config).numpy(), weights.numpy()
    names = task.train.label_names
    means = {}
    errors = []
    for label in range(len(names)):
        if len(right := weights[(labels == label) & (given == label)]):
            means[label] = right.mean(axis=0)
    for true, other in permutations(means, 2):
        if len(wrong := weights[(labels == true) & (given == other)]):
            to_other, to_true = (np.abs(wrong.mean(axis=0) - means[label]).sum() for label in (other, true))
            nearer = bool(to_other < to_true)
            errors.append({"label": names[true], "given": names[other], "rows": len(wrong), "nearer": nearer})
    by_label = {names[label]: mean.round(5).tolist() for label, mean in means.items()}
    return {"layers": probe.layer_indices, "weights": by_label, "errors": errors}


def split(text: str, allowed: tuple[str, ...], option: str) -> list[str]:
    """Return the names in a text with commas, in the order of `allowed`."""
    names = [name.strip() for name in text.split(",")]
    if wrong := [name for name in names if name not in allowed]:
        raise typer.BadParameter(f"{wrong[0]!r} is not allowed; allowed: {', '.join(allowed)}", param_hint=option)
    return [name for name in allowed if name in names]


def steps(tables: Tables, data: list[str], methods: list[str], parts: list[str], trials: int) -> Iterator[None]:
    """Do one part of a data set after the other."""
    tasks = [Task(tables.bench, source) for source in data]
    primary = next((task for task in tasks if task.is_safety), tasks[0])
    for task in tasks:
        if together := [part for part in ("main", "ood", "layers") if part in parts]:
            yield tables.methods(task, methods, together)
        if "few-labels" in parts:
            yield tables.few_labels(task, [name for name in KINDS if name in methods])
    if "downcast" in parts:
        yield tables.downcasts(primary)
    if "sensitivity" in parts:
        yield tables.sensitivity(primary, trials)


def main(
    output: Annotated[Path, typer.Option(help="Folder for tables.md, the results and the hidden states.")],
    backbone: Annotated[str, typer.Option(help="'demo', a folder or a Hub id.")] = "demo",
    data_dir: Annotated[Path | None, typer.Option(help="Local copies of the data: DIR/NAME/SPLIT.jsonl.gz.")] = None,
    data: Annotated[str, typer.Option(help="NAME or NAME:SPLIT, with commas.")] = "toxicchat,sst2,emotion,imdb",
    methods: Annotated[str, typer.Option(help="Methods with commas.")] = ",".join(METHODS),
    only: Annotated[str, typer.Option(help="Parts with commas.")] = ",".join(PARTS),
    max_rows: Annotated[int | None, typer.Option(min=1, help="Rows of each part of a data set at most.")] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Cut prompts to this many tokens.")] = 512,
    dtype: Annotated[str, typer.Option(help="dtype of the backbone.")] = "auto",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method that depends on chance.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of a head at most.")] = 6,
    shots: Annotated[int, typer.Option(min=1, help="Examples of each label in few-shot prompts.")] = 4,
    trials: Annotated[int, typer.Option(min=1, help="Drawn settings of each head type, for sensitivity.")] = 4,
) -> None:
    """Write the tables of arXiv 2601.13288 for a backbone."""
    sources = data.split(",")
    if unknown := [source for source in sources if find_benchmark(source) is None]:
        raise typer.BadParameter(f"{unknown[0]!r} is no data set known by name", param_hint="--data")
    names, parts = split(methods, METHODS, "--methods"), split(only, PARTS, "--only")
    bench = Bench(backbone, output / "states", data_dir, max_rows, max_length, dtype)
    bench.cache.mkdir(parents=True, exist_ok=True)
    settings = {"max_rows": max_rows, "max_length": max_length, "dtype": dtype, "epochs": epochs, "shots": shots}
    same_settings(output / "settings.json", {"backbone": backbone, **settings})
    tables = Tables(bench, output / "results", seeds, epochs, shots)
    for _ in steps(tables, sources, names, parts, trials):
        write_tables(tables.folder, output / "tables.md", sources)
    print(f"tables written to {output / 'tables.md'}")


if __name__ == "__main__":
    typer.run(main)
