"""The report of `llama-probe reproduce`: results beside the paper's, as Markdown, JSON and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...data.known import find_benchmark
from ...evaluation.plots import png_writer, sensitivity_plot
from ...files import write_atomically
from .. import paper
from .columns import Column, cell, columns
from .figures import layer_groups_plot, learning_curves_plot, methods_plot
from .learning_curves import summarize_curve
from .workbench import file_name


REPORT_NAME, DATA_NAME = "report.md", "report.json"


def write_report(output: Path, report: dict[str, Any], finished: bool = True) -> None:
    """Write `report.md` and `report.json`, at the end with plots."""
    output.mkdir(parents=True, exist_ok=True)
    figures = _figures(report) if finished and find_spec("matplotlib") is not None else {}
    write_atomically({output / name: png_writer(lambda figure=figure: figure) for name, figure in figures.items()})
    text = "\n\n".join(_blocks(report, list(figures), finished)) + "\n"
    write_atomically({output / REPORT_NAME: text, output / DATA_NAME: json.dumps(report, indent=2) + "\n"})


def _done(results: dict[str, Any]) -> dict[str, Any]:
    return {name: result for name, result in results.items() if result is not None}


def _table(header: list[str], rows: list[list[str]]) -> str:
    first, *others = (f"| {' | '.join(row)} |" for row in (header, *rows))
    return "\n".join([first, f"|---|{'---:|' * (len(header) - 1)}", *others])


def _blocks(report: dict[str, Any], plots: list[str], finished: bool) -> Iterator[str]:
    def image(name: str) -> Iterator[str]:
        if f"{name}.png" in plots:
            yield f"![{name}]({name}.png)"

    backbone, settings = report["backbone"], report["settings"]
    yield f"# The tables of {paper.SOURCE} for {backbone['name']}"
    yield (
        f"- The backbone is {backbone['name']}: {backbone['num_parameters'] / 1e6:,.0f} million parameters, "
        f"{backbone['num_hidden_layers']} layers, hidden size {backbone['hidden_size']:,}.\n"
        f"- Columns headed *paper* are for {paper.BACKBONE}: {paper.BACKBONE_SIZE}. They use the authors' training rows and "
        "hyper-parameter search. Compare the order of the methods, not the size of the numbers."
    )
    yield (
        f"- Numbers are mean ± standard deviation over the seeds {', '.join(map(str, settings['seeds']))}. A seed sets initial "
        "weights and dropout; for few-shot prompting it sets the examples. The split and the order of the rows do not change. "
        "A number without ± is from a method without a seed.\n"
        "- Validation rows chose the best epoch, layer, temperature and threshold. Test rows chose nothing."
    )
    if settings["max_rows"] is not None:
        rows = settings["max_rows"]
        yield f"**Not all rows:** at most {rows:,} training, validation and test rows of each data set."
    if not finished:
        yield "**Not finished:** the same command resumes the run."
    for source, results in report["main"].items():
        yield from _main_table(source, _done(results))
        yield from image(f"main-{file_name(source)}")
    if "ood" in report:
        yield from _out_of_distribution(report["ood"])
    yield from _downcast(report["downcast"]["data"], _done(report["downcast"]["results"]))
    for source, heads in report["layers"].items():
        yield from _layers(source, heads)
        yield from image(f"layers-{file_name(source)}")
    if report["sensitivity"] is not None:
        yield from _sensitivity(report["sensitivity"])
        yield from image("sensitivity")
    for source, heads in report["few_labels"].items():
        yield from _few_labels(source, _done(heads))
        yield from image(f"few-labels-{file_name(source)}")
    yield "## How it was made"
    if report["command"]:
        yield f"`{report['command']}`"
    versions = ", ".join(f"{name} {version}" for name, version in report["environment"].items())
    yield f"{versions}; at most {settings['epochs']} epochs, patience {settings['patience']}."


def _main_table(source: str, done: dict[str, Any]) -> Iterator[str]:
    if not done:
        return
    benchmark, shown = find_benchmark(source)[0], columns(source)
    compared = [column for column in shown if column.paper is not None]
    yield f"## {benchmark.title}"
    rows = next(iter(done.values()))["rows"]
    yield (
        f"`{source}`: {rows['train']:,} training, {rows['validation']:,} validation and {rows['test']:,} test rows. "
        f"{benchmark.note}"
    )
    lines = []
    for name in dict.fromkeys([*done, *paper.METHODS]):
        figures = [paper.figure(name, benchmark.name, column.paper) for column in compared]
        if name in done:
            own = [f"{done[name]['num_parameters']:,}", *(cell(column.find(done[name])) for column in shown)]
            lines.append([f"`{name}`", *own, *map(cell, figures)])
        elif any(figure is not None for figure in figures):
            lines.append([f"{name} (paper only)", "-", *("-" for _ in shown), *map(cell, figures)])
    titles = [*(column.title for column in shown), *(f"paper: {column.title}" for column in compared)]
    yield _table(["method", "parameters", *titles], lines)
    for name, result in done.items():
        for key in ("layer", "label_tokens"):
            if key in result["runs"][0]:
                chosen = ", ".join(str(run[key]) for run in result["runs"])
                yield f"`{name}`: {key.replace('_', ' ')} chosen by validation: {chosen}."


def _out_of_distribution(ood: dict[str, Any]) -> Iterator[str]:
    shown = (Column("F1", ("f1",)), Column("AUPRC", ("auprc",)), Column("recall", ("recall",)))
    done = {test: found for test, results in ood["results"].items() if (found := _done(results))}
    if not done:
        return
    yield f"## Out of distribution: trained on {ood['trained_on']}"
    yield (
        "The cells are F1 / AUPRC / recall of the harmful label on other test sets. The threshold is that of the training data."
    )
    lines = []
    for name in dict.fromkeys(name for results in done.values() for name in results):
        own = [results[name] for results in done.values() if name in results]
        lines.append([f"`{name}`", *(" / ".join(cell(column.find(result)) for column in shown) for result in own)])
    sizes = [next(iter(results.values()))["summary"]["test"]["rows"] for results in done.values()]
    yield _table(["method", *(f"{test} ({size:,})" for test, size in zip(done, sizes, strict=True))], lines)
    if absent := [test for test in ood["results"] if test not in done]:
        yield f"Not at hand: {', '.join(absent)}."
    figures = ", ".join(f"{name} {figure:.3f}" for name, figure in paper.OUT_OF_DISTRIBUTION.items())
    yield f"In the paper, heads trained on WildGuardMix and tested on ToxicChat have these F1 scores: {figures}."


def _downcast(source: str, done: dict[str, Any]) -> Iterator[str]:
    if not done:
        return
    shown, toxicchat = columns(source), find_benchmark(source)[0].name == "toxicchat"
    yield f"## `mha` by downcast, on {source}"
    lines = []
    for name, result in done.items():
        own = [f"{result['num_parameters']:,}", *(cell(column.find(result)) for column in shown)]
        lines.append([name, *own, f"{paper.DOWNCAST[int(name)]:.3f}" if toxicchat else "-"])
    titles = [column.title for column in shown]
    yield _table(["downcast", "parameters", *titles, "paper: F1, human-annotated rows"], lines)


def _layers(source: str, heads: dict[str, Any]) -> Iterator[str]:
    done = {name: result for name, result in _done(heads).items() if result["groups"]}
    if not done:
        return
    yield f"## Layer weights on {source}"
    yield (
        "The table shows the three layers with the largest mean weight on test rows, by label and by right or wrong prediction. "
        "The plot shows all layers. In the paper, errors look like the predicted label: their mean weights are nearer to those "
        "of the right rows of the predicted label than to those of the true label."
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
    yield _table(["head", "label", "head is", "rows", "layers (weight)"], lines)
    if nearest:
        yield "\n".join(nearest)


def _sensitivity(found: dict[str, Any]) -> Iterator[str]:
    yield "## Sensitivity to hyper-parameters"
    yield (
        f"The table shows the validation {found['metric']} of {len(found['trials'])} configurations of a sweep. In the "
        "paper the learning rate matters most for `pooling` and `gate`, and `mha` is robust."
    )
    lines = []
    for kind, values in found["kinds"].items():
        scores = [values["best"], values["median"], values["worst"], values["best"] - values["worst"]]
        related = "-" if values["learning_rate"] is None else f"{values['learning_rate']:+.2f}"
        lines.append([f"`{kind}`", str(values["trials"]), *(f"{score:.3f}" for score in scores), related])
    header = ["kind", "configurations", "best", "median", "worst", "range", "rank correlation with the learning rate"]
    yield _table(header, lines)


def _few_labels(source: str, done: dict[str, Any]) -> Iterator[str]:
    if not done:
        return
    found, curves = next(iter(done.values())), _curves(done)
    yield f"## Few labels: {source}"
    yield (
        f"{found['metric']} on {found['rows']['test']:,} test rows, after training on a sample of the "
        f"{found['rows']['train']:,} training rows. Each seed draws its own sample. The settings are those that "
        "`llama-probe train` chooses for the number of rows. No row is held back."
    )
    sizes = list(next(iter(curves.values())))
    lines = [[f"`{kind}`", *(cell(values[size]) for size in sizes)] for kind, values in curves.items()]
    yield _table(["kind", *(f"{size:,} rows" for size in sizes)], lines)


def _curves(done: dict[str, Any]) -> dict[str, dict[int, dict[str, Any] | None]]:
    return {name: summarize_curve(found["curve"], found["metric"]) for name, found in done.items()}


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    figures = {}
    for source, results in report["main"].items():
        panels: dict[str, dict[str, Any]] = {}
        for column in columns(source):
            for name, result in _done(results).items():
                value = column.find(result)
                if value is not None and math.isfinite(value["mean"]):
                    figure = paper.figure(name, find_benchmark(source)[0].name, column.paper) if column.paper else None
                    own = {**value, "paper": figure and figure["mean"]}
                    panels.setdefault(f"{source}: {column.title}", {})[name] = own
        if panels:
            figures[f"main-{file_name(source)}.png"] = methods_plot(panels)
    for source, heads in report["layers"].items():
        if done := {name: found for name, found in _done(heads).items() if found["groups"]}:
            figures[f"layers-{file_name(source)}.png"] = layer_groups_plot(done)
    for source, heads in report["few_labels"].items():
        curves = _curves(_done(heads))
        if curves and all(value for sizes in curves.values() for value in sizes.values()):
            title = f"{source}: {next(iter(_done(heads).values()))['metric']}"
            figures[f"few-labels-{file_name(source)}.png"] = learning_curves_plot(curves, title)
    if report["sensitivity"] is not None:
        figures["sensitivity.png"] = sensitivity_plot(report["sensitivity"])
    return figures
