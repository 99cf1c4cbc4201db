"""`tables.md` from the results, beside the paper's figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from methods import METHODS
from scipy.stats import spearmanr
from tasks import SAFETY

from llama_probe.data import find_benchmark


# arXiv 2601.13288v2 for Llama-3.2-3B-Instruct: tables 1, 3 and 4, as shares. On ToxicChat it tests on the human-annotated rows.
COLUMNS = ("toxicchat F1", "toxicchat AUPRC", "wildguardmix F1", "imdb accuracy", "sst2 accuracy", "emotion accuracy")
PAPER = {
    "pooling": (0.7353, 0.812, 0.8284, 0.9407, 0.9229, 0.6918),
    "gate": (0.8049, 0.854, 0.8598, 0.9505, 0.9442, 0.8458),
    "mha": (0.8451, 0.898, 0.8855, 0.9515, 0.9539, 0.8768),
    "muli": (0.778, 0.829, 0.8379, 0.8650, 0.9319, 0.6405),
    "zero-shot": (None, None, None, 0.776, 0.840, 0.446),
    "few-shot": (None, None, None, 0.761, 0.853, 0.334),
    "chain-of-thought prompting": (None, None, None, 0.915, 0.931, 0.561),
    "T5-large classifier": (0.822, 0.885, None, None, None, None),
    "WildGuard 7B": (0.708, None, 0.889, None, None, None),
}
HUMAN = ("test", "slices", "human_annotation", "True")
Runs = list[dict[str, Any]]


def write_tables(folder: Path, path: Path, sources: Sequence[str]) -> None:
    """Write all tables of the results that there are."""
    sections = [section for source in sources for section in of_source(folder, source)]
    title = "# Methods side by side\n\nMean ± standard deviation over seeds."
    path.write_text("\n\n".join([title, *sections]) + "\n")


def read(folder: Path, part: str, source: str) -> dict[str, Runs]:
    """Return the runs of each method."""
    places = (folder / part / source.replace(":", "-")).glob("*")
    places = sorted(places, key=lambda place: METHODS.index(place.name) if place.name in METHODS else int(place.name))
    return {place.name: [json.loads(file.read_text()) for file in sorted(place.glob("*.json"))] for place in places}


def of_source(folder: Path, source: str) -> Iterator[str]:
    """Yield the sections of a data set."""
    for title, part in (("", "main"), (": `mha` by downcast", "downcast")):
        if runs := read(folder, part, source):
            first = next(iter(runs.values()))[0]["rows"]
            counts = ", ".join(f"{count:,} {name}" for name, count in first.items())
            yield f"## {source}{title}\n\nRows: {counts}.\n\n" + main_table(source, runs, part == "main")
    if runs := read(folder, "ood", source):
        sets = list(next(iter(runs.values()))[0])
        lines = [[f"`{name}`", *(" / ".join(cell(of, test, metric) for metric in ("f1", "auprc", "recall")) for test in sets)]
                 for name, of in runs.items()]  # fmt: skip
        title = f"## Trained on {source}, tested on other data\n\nF1 / AUPRC / recall of the harmful label."
        yield f"{title}\n\n" + table(["method", *sets], lines)
    if runs := read(folder, "layers", source):
        lines = [[f"`{name}`", nearer(of)] for name, of in runs.items()]
        title = "Wrong rows whose layer weights are nearer to those of the predicted label: pairs of labels, and rows, of all seeds."
        yield f"## Layer weights on {source}\n\n{title}\n\n" + table(["head", "pairs (rows)"], lines)
    if runs := read(folder, "sensitivity", source):
        header = ["head type", "settings", "best", "median", "worst", "rank correlation with the learning rate"]
        yield f"## Sensitivity on {source}\n\n" + table(header, [sensitivity_line(*item) for item in runs.items()])
    if runs := read(folder, "few-labels", source):
        metric = "auprc" if find_benchmark(source)[0].name in SAFETY else "accuracy"
        sizes = sorted({run["size"] for of in runs.values() for run in of})
        lines = [[f"`{name}`", *(cell([run for run in of if run["size"] == size], metric) for size in sizes)]
                 for name, of in runs.items()]  # fmt: skip
        header = ["head type", *(f"{size:,} rows" for size in sizes)]
        yield f"## Few labels: {source}, {metric}\n\n" + table(header, lines)


def columns(source: str) -> dict[str, tuple[str, ...]]:
    """Return the path in a result of each column: F1 and AUPRC for safety data, accuracy and F1 for others."""
    name = find_benchmark(source)[0].name
    if name not in SAFETY:
        return {"accuracy": ("test", "accuracy"), "F1": ("test", "f1")}
    found = {"F1": ("test", "f1"), "AUPRC": ("test", "auprc")}
    human = {f"{title}, human-annotated rows": (*HUMAN, path[-1]) for title, path in found.items()}
    return found | (human if name == "toxicchat" else {})


def main_table(source: str, runs: dict[str, Runs], with_paper: bool) -> str:
    """Return the table of all methods on a data set, beside the paper's figures."""
    name = find_benchmark(source)[0].name
    shown = columns(source)
    figures = [column for column in COLUMNS if with_paper and column.startswith(f"{name} ")]
    lines = []
    for method in [*runs, *(method for method in PAPER if figures and method not in runs)]:
        known = dict(zip(COLUMNS, PAPER.get(method, ()), strict=False))
        theirs = [f"{value:.3f}" if (value := known.get(column)) else "-" for column in figures]
        if method in runs:
            own = [f"{runs[method][0]['num_parameters']:,}", *(cell(runs[method], *path) for path in shown.values())]
            lines.append([f"`{method}`", *own, *theirs])
        elif set(theirs) != {"-"}:
            lines.append([f"{method} (paper only)", *(["-"] * (len(shown) + 1)), *theirs])
    header = ["method", "parameters", *shown, *(f"paper: {figure.partition(' ')[2]}" for figure in figures)]
    return table(header, lines)


def nearer(runs: Runs) -> str:
    """Count the pairs and the rows of `errors`."""
    errors = [error for run in runs for error in run["errors"]]
    near = [error for error in errors if error["nearer"]]
    rows = [sum(error["rows"] for error in some) for some in (near, errors)]
    return f"{len(near)} of {len(errors)} ({rows[0]} of {rows[1]})"


def sensitivity_line(head_type: str, runs: Runs) -> list[str]:
    """Summarise the scores of drawn settings."""
    scores = [run["best"] for run in runs]
    rates = [run["learning_rate"] for run in runs]
    related = f"{spearmanr(rates, scores).statistic:+.2f}" if len(set(scores)) > 2 else "-"
    return [f"`{head_type}`", str(len(runs)), *(f"{pick(scores):.3f}" for pick in (max, median, min)), related]


def cell(runs: Runs, *path: str) -> str:
    """Format the mean and, of several runs, the standard deviation (n - 1) of a metric."""
    values = []
    for run in runs:
        value: Any = run
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        values += [] if value is None else [value]
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}" if values else "-"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    first, *others = (f"| {' | '.join(cells)} |" for cells in (header, *lines))
    return "\n".join([first, f"|---|{'---:|' * (len(header) - 1)}", *others])
