"""The report of `llama-probe reproduce`: results beside the paper's, as Markdown, JSON and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...data.known import find_benchmark
from ...evaluation.plots import png_writer, sensitivity_plot
from ...files import write_atomically
from .. import paper
from .figures import layer_groups_plot, learning_curves_plot, methods_plot
from .learning_curves import summarize_curve
from .workbench import SAFETY, file_name


REPORT_NAME, DATA_NAME = "report.md", "report.json"


@dataclass(frozen=True)
class Column:
    """A metric of the test rows: its title, its path in a summary, and the paper's metric beside it."""

    title: str
    path: tuple[str, ...]
    paper: str | None = None

    def find(self, result: dict[str, Any]) -> dict[str, Any] | None:
        """Return `mean` and `std` (`None` for one run), or `None` if the metric is not defined."""
        value: Any = result["summary"]["test"]
        for key in self.path:
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, dict):
            return None
        return {"mean": value["mean"], "std": value["std"] if len(result["runs"]) > 1 else None}


def columns(source: str) -> list[Column]:
    """Return the columns of a data set, as in the paper: F1 and AUPRC for safety, accuracy and F1 for the others."""
    name = find_benchmark(source)[0].name
    if name == "toxicchat":  # the paper tests on the human-annotated rows
        human = ("slices", "human_annotation", "True")
        return [
            Column("F1", ("f1",)),
            Column("AUPRC", ("auprc",)),
            Column("F1, human-annotated rows", (*human, "f1"), "f1"),
            Column("AUPRC, human-annotated rows", (*human, "auprc"), "auprc"),
        ]
    if name in SAFETY:
        return [Column("F1", ("f1",), "f1"), Column("AUPRC", ("auprc",), "auprc")]
    return [Column("accuracy", ("accuracy",), "accuracy"), Column("F1", ("f1",))]


def cell(value: dict[str, Any] | None) -> str:
    """Format a mean and its standard deviation."""
    if value is None:
        return "-"
    return f"{value['mean']:.3f}" + ("" if value["std"] is None else f" ± {value['std']:.3f}")


def cells(result: dict[str, Any], shown: Sequence[Column]) -> list[str]:
    """Format the numbers of a method in some columns."""
    return [cell(column.find(result)) for column in shown]


def write_report(output: Path, report: dict[str, Any], finished: bool = True) -> None:
    """Write `report.md` and `report.json`, at the end with plots."""
    output.mkdir(parents=True, exist_ok=True)
    page = _Page(draws=finished and find_spec("matplotlib") is not None)
    _write_sections(page, report, finished)
    write_atomically({output / name: png_writer(draw) for name, draw in page.figures.items()})
    text = "\n\n".join(page.blocks) + "\n"
    write_atomically({output / REPORT_NAME: text, output / DATA_NAME: json.dumps(report, indent=2) + "\n"})


@dataclass
class _Page:
    """Blocks of Markdown, and functions that draw its figures, by file name."""

    draws: bool
    blocks: list[str] = field(default_factory=list)
    figures: dict[str, Callable] = field(default_factory=dict)

    def add(self, *blocks: str) -> None:
        self.blocks += blocks

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        first, *others = (f"| {' | '.join(row)} |" for row in (header, *rows))
        self.add("\n".join([first, f"|---|{'---:|' * (len(header) - 1)}", *others]))

    def figure(self, name: str, draw: Callable, *args: Any) -> None:
        if self.draws:
            self.figures[f"{name}.png"] = partial(draw, *args)
            self.add(f"![{name}]({name}.png)")


def _write_sections(page: _Page, report: dict[str, Any], finished: bool) -> None:
    backbone, settings = report["backbone"], report["settings"]
    page.add(
        f"# The tables of {paper.SOURCE} for {backbone['name']}",
        f"- The backbone is {backbone['name']}: {backbone['num_parameters'] / 1e6:,.0f} million parameters, "
        f"{backbone['num_hidden_layers']} layers, hidden size {backbone['hidden_size']:,}.\n"
        f"- Columns headed *paper* are for {paper.BACKBONE}: {paper.BACKBONE_SIZE}. They use the authors' training rows and "
        "hyper-parameter search. Compare the order of the methods, not the size of the numbers.",
        f"- Numbers are mean ± standard deviation over the seeds {', '.join(map(str, settings['seeds']))}. A seed sets initial "
        "weights and dropout; for few-shot prompting it sets the examples. The split and the order of the rows do not change. "
        "A number without ± is from a method without a seed.\n"
        "- Validation rows chose the best epoch, layer, temperature and threshold. Test rows chose nothing.",
    )
    if settings["max_rows"] is not None:
        rows = settings["max_rows"]
        page.add(f"**Not all rows:** at most {rows:,} training, validation and test rows of each data set.")
    if not finished:
        page.add("**Not finished:** the same command resumes the run.")
    _for_each_source(_main_table, page, report["main"])
    if "ood" in report:
        _out_of_distribution(page, report["ood"])
    _for_each_source(_downcast, page, {report["downcast"]["data"]: report["downcast"]["results"]})
    _for_each_source(_layers, page, report["layers"])
    if report["sensitivity"] is not None:
        _sensitivity(page, report["sensitivity"])
    _for_each_source(_few_labels, page, report["few_labels"])
    page.add("## How it was made")
    if report["command"]:
        page.add(f"`{report['command']}`")
    versions = ", ".join(f"{name} {version}" for name, version in report["environment"].items())
    page.add(f"{versions}; at most {settings['epochs']} epochs, patience {settings['patience']}.")


def _for_each_source(section: Callable, page: _Page, by_source: dict[str, Any]) -> None:
    for source, done in by_source.items():
        if done:
            section(page, source, done)


def _main_table(page: _Page, source: str, done: dict[str, Any]) -> None:
    benchmark, shown = find_benchmark(source)[0], columns(source)
    compared = [column for column in shown if column.paper is not None]
    rows = next(iter(done.values()))["rows"]
    page.add(
        f"## {benchmark.title}",
        f"`{source}`: {rows['train']:,} training, {rows['validation']:,} validation and {rows['test']:,} test rows. "
        f"{benchmark.note}",
    )
    lines = []
    for name in dict.fromkeys([*done, *paper.METHODS]):
        figures = [paper.figure(name, benchmark.name, column.paper) for column in compared]
        if name in done:
            own = f"{done[name]['num_parameters']:,}", *cells(done[name], shown)
            lines.append([f"`{name}`", *own, *map(cell, figures)])
        elif any(figure is not None for figure in figures):
            lines.append([f"{name} (paper only)", "-", *("-" for _ in shown), *map(cell, figures)])
    titles = [*(column.title for column in shown), *(f"paper: {column.title}" for column in compared)]
    page.table(["method", "parameters", *titles], lines)
    for name, result in done.items():
        for key in ("layer", "label_tokens"):
            if key in result["runs"][0]:
                chosen = ", ".join(str(run[key]) for run in result["runs"])
                page.add(f"`{name}`: {key.replace('_', ' ')} chosen by validation: {chosen}.")
    panels: dict[str, dict[str, Any]] = {}
    for column in shown:
        for name, result in done.items():
            value = column.find(result)
            if value is not None and math.isfinite(value["mean"]):
                figure = paper.figure(name, benchmark.name, column.paper)
                panel = panels.setdefault(f"{source}: {column.title}", {})
                panel[name] = {**value, "paper": figure and figure["mean"]}
    if panels:
        page.figure(f"main-{file_name(source)}", methods_plot, panels)


def _out_of_distribution(page: _Page, ood: dict[str, Any]) -> None:
    shown = (Column("F1", ("f1",)), Column("AUPRC", ("auprc",)), Column("recall", ("recall",)))
    done = {test: results for test, results in ood["results"].items() if results}
    if not done:
        return
    page.add(
        f"## Out of distribution: trained on {ood['trained_on']}",
        "The cells are F1 / AUPRC / recall of the harmful label on other test sets. The threshold is that of the training data.",
    )
    lines = []
    for name in dict.fromkeys(name for results in done.values() for name in results):
        own = (" / ".join(cells(results[name], shown)) if name in results else "-" for results in done.values())
        lines.append([f"`{name}`", *own])
    sizes = [next(iter(results.values()))["summary"]["test"]["rows"] for results in done.values()]
    page.table(["method", *(f"{test} ({size:,})" for test, size in zip(done, sizes, strict=True))], lines)
    if absent := [test for test in ood["results"] if test not in done]:
        page.add(f"Not at hand: {', '.join(absent)}.")
    figures = ", ".join(f"{name} {figure:.3f}" for name, figure in paper.OUT_OF_DISTRIBUTION.items())
    page.add(f"In the paper, heads trained on WildGuardMix and tested on ToxicChat have these F1 scores: {figures}.")


def _downcast(page: _Page, source: str, done: dict[str, Any]) -> None:
    shown, toxicchat = columns(source), find_benchmark(source)[0].name == "toxicchat"
    page.add(f"## `mha` by downcast, on {source}")
    lines = []
    for name, result in done.items():
        figure = f"{paper.DOWNCAST[int(name)]:.3f}" if toxicchat else "-"
        lines.append([name, f"{result['num_parameters']:,}", *cells(result, shown), figure])
    titles = [column.title for column in shown]
    page.table(["downcast", "parameters", *titles, "paper: F1, human-annotated rows"], lines)


def _layers(page: _Page, source: str, done: dict[str, Any]) -> None:
    page.add(
        f"## Layer weights on {source}",
        "The table shows the three layers with the largest mean weight on test rows, by label and by right or wrong prediction. "
        "The plot shows all layers. In the paper, errors look like the predicted label: their mean weights are nearer to those "
        "of the right rows of the predicted label than to those of the true label.",
    )
    lines, nearest = [], []
    for name, found in done.items():
        for group in found["groups"]:
            top = sorted(range(len(found["layers"])), key=lambda i: -group["weights"][i])[:3]
            layers = ", ".join(f"{found['layers'][i]} ({group['weights'][i]:.3f})" for i in top)
            right = "right" if group["right"] else "wrong"
            lines.append([f"`{name}`", group["label"], right, str(group["rows"]), layers])
        if errors := found["errors"]:
            nearer = [error for error in errors if error["to_given"] < error["to_true"]]
            rows, all_rows = (sum(error["rows"] for error in some) for some in (nearer, errors))
            nearest.append(
                f"- `{name}`: nearer to the predicted label for {len(nearer)} of {len(errors)} pairs of a true and a predicted "
                f"label ({rows} of {all_rows} wrong rows)."
            )
    page.table(["head", "label", "head is", "rows", "layers (weight)"], lines)
    if nearest:
        page.add("\n".join(nearest))
    page.figure(f"layers-{file_name(source)}", layer_groups_plot, done)


def _sensitivity(page: _Page, found: dict[str, Any]) -> None:
    page.add(
        "## Sensitivity to hyper-parameters",
        f"The table shows the validation {found['metric']} of {len(found['trials'])} configurations of a sweep. In the "
        "paper the learning rate matters most for `pooling` and `gate`, and `mha` is robust.",
    )
    lines = []
    for kind, values in found["kinds"].items():
        scores = [values["best"], values["median"], values["worst"], values["best"] - values["worst"]]
        related = "-" if values["learning_rate"] is None else f"{values['learning_rate']:+.2f}"
        lines.append([f"`{kind}`", str(values["trials"]), *(f"{score:.3f}" for score in scores), related])
    header = ["kind", "configurations", "best", "median", "worst", "range", "rank correlation with the learning rate"]
    page.table(header, lines)
    page.figure("sensitivity", sensitivity_plot, found)


def _few_labels(page: _Page, source: str, done: dict[str, Any]) -> None:
    found = next(iter(done.values()))
    curves = {name: summarize_curve(part["curve"], part["metric"]) for name, part in done.items()}
    page.add(
        f"## Few labels: {source}",
        f"{found['metric']} on {found['rows']['test']:,} test rows, after training on a sample of the "
        f"{found['rows']['train']:,} training rows. Each seed draws its own sample. The settings are those that "
        "`llama-probe train` chooses for the number of rows. No row is held back.",
    )
    sizes = list(next(iter(curves.values())))
    lines = [[f"`{kind}`", *(cell(values[size]) for size in sizes)] for kind, values in curves.items()]
    page.table(["kind", *(f"{size:,} rows" for size in sizes)], lines)
    if all(value for values in curves.values() for value in values.values()):
        page.figure(f"few-labels-{file_name(source)}", learning_curves_plot, curves, f"{source}: {found['metric']}")
