"""The report of `llama-probe reproduce`: one's own numbers beside the paper's, as Markdown, JSON and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...data.known import find_benchmark
from ...evaluation.plots import layer_groups_plot, learning_curves_plot, methods_plot, png_writer, sensitivity_plot
from ...experiments import paper
from ...files import write_atomically
from ...hub.card import table
from .columns import Column, cell, columns, find_orders
from .learning_curves import summarize_curves
from .workbench import file_name


REPORT_NAME, DATA_NAME = "report.md", "report.json"


def write_report(output: Path, report: dict[str, Any], plots: bool = True) -> None:
    """Writes `report.md`, `report.json` and, where matplotlib is installed, the plots. Parts still to be done are told of.

    Args:
        output: the folder. report: from `Reproduction.report`; the orders are added to it.
        plots: leave them out with `False`.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    report["orders"] = find_orders(report["main"])
    figures = _figures(report) if plots and find_spec("matplotlib") is not None else {}
    write_atomically({output / name: png_writer(lambda figure=figure: figure) for name, figure in figures.items()})
    text = "\n".join(_markdown(report, list(figures)))
    data = json.dumps(report, indent=2) + "\n"
    write_atomically(
        {
            output / REPORT_NAME: lambda path: path.write_text(text, encoding="utf-8"),
            output / DATA_NAME: lambda path: path.write_text(data, encoding="utf-8"),
        }
    )


def _paper_cell(figure: paper.Figure | None) -> str:
    if figure is None:
        return "-"
    return f"{figure.value:.3f}" + ("" if figure.std is None else f" ± {figure.std:.3f}")


def _markdown(report: dict[str, Any], plots: list[str]) -> Iterator[str]:
    backbone, settings = report["backbone"], report["settings"]
    yield f"# The tables of {paper.SOURCE}" + (f" for {backbone['name']}" if backbone else "")
    yield ""
    if backbone:
        yield (
            f"Backbone here: {backbone['name']}, {backbone['num_parameters'] / 1e6:,.0f} million parameters, "
            f"{backbone['num_hidden_layers']} layers of {backbone['hidden_size']:,}. Columns headed *paper* are of "
            f"{paper.BACKBONE} ({paper.BACKBONE_SIZE}), with the authors' training rows and hyper-parameter search: another "
            "model, so their size is no target for the numbers here. What can be compared is the order of the methods."
        )
        yield ""
    yield (
        "Mean ± standard deviation over the seeds "
        f"{', '.join(map(str, settings['seeds']))} (initial weights and dropout; for few-shot prompting the examples; split and "
        "order of the rows are the same). One number alone: the method has no seed. Best epoch, layer, temperature and "
        "threshold were chosen by validation rows, and nothing by test rows."
    )
    yield ""
    if settings["max_rows"] is not None:
        yield (
            f"**Not all rows:** at most {settings['max_rows']:,} training, validation and test rows were used of each data "
            "set."
        )
        yield ""
    if unfinished := _unfinished(report):
        yield f"**Not finished:** {', '.join(unfinished)}. The same command goes on."
        yield ""
    for source, results in report["main"].items():
        yield from _main_table(source, results)
        yield from _image(f"main-{file_name(source)}.png", plots)
    yield from _orders(report["orders"])
    if "ood" in report:
        yield from _out_of_distribution(report["ood"])
    if "downcast" in report:
        yield from _downcast(report["downcast"])
    for source, heads in report["layers"].items():
        yield from _layers(source, heads)
        yield from _image(f"layers-{file_name(source)}.png", plots)
    if report["sensitivity"] is not None:
        yield from _sensitivity(report["sensitivity"])
        yield from _image("sensitivity.png", plots)
    for source, heads in report["few_labels"].items():
        yield from _few_labels(source, heads)
        yield from _image(f"few-labels-{file_name(source)}.png", plots)
    yield "## How it was made"
    yield ""
    if report["command"]:
        yield from (f"`{report['command']}`", "")
    versions = ", ".join(f"{name} {version}" for name, version in report["environment"].items())
    yield f"{versions}; at most {settings['epochs']} epochs, patience {settings['patience']}."
    yield ""
    yield from table(["part", "seconds"], [[name, f"{seconds:,.0f}"] for name, seconds in report["seconds"].items()])


def _image(name: str, plots: list[str]) -> Iterator[str]:
    if name in plots:
        yield f"![{name.removesuffix('.png')}]({name})"
        yield ""


def _unfinished(report: dict[str, Any]) -> list[str]:
    """What was asked for and is not there. Test sets that are not at hand are told of in their own section."""
    found: list[str] = []
    if "main" in report["only"]:
        for source, results in report["main"].items():
            found += [f"{name} on {source}" for name, result in results.items() if result is None]
    if "downcast" in report["only"] and None in report.get("downcast", {"results": {"": None}})["results"].values():
        found.append("downcast")
    if "layers" in report["only"]:
        found += [f"layers on {source}" for source, heads in report["layers"].items() if None in heads.values()]
    if "few-labels" in report["only"]:
        found += [
            f"few-labels on {source}" for source, heads in report["few_labels"].items() if None in heads.values()
        ]
    if "sensitivity" in report["only"] and report["sensitivity"] is None:
        found.append("sensitivity")
    return found


def _main_table(source: str, results: dict[str, Any]) -> Iterator[str]:
    benchmark = find_benchmark(source)[0]
    done = {name: result for name, result in results.items() if result is not None}
    if not done:
        return
    shown = columns(source)
    compared = [column for column in shown if column.paper is not None]
    yield f"## {benchmark.title}"
    yield ""
    rows = next(iter(done.values()))["rows"]
    yield (
        f"`{source}`: {rows['train']:,} training, {rows['validation']:,} validation and {rows['test']:,} test rows. "
        f"{benchmark.note}"
    )
    yield ""
    lines = []
    for name, result in done.items():
        figures = [paper.figure(name, benchmark.name, column.paper) for column in compared]
        lines.append(
            [
                f"`{name}`",
                f"{result['num_parameters']:,}",
                *(cell(column.find(result)) for column in shown),
                *map(_paper_cell, figures),
            ]
        )
    for name in paper.MAIN:
        figures = [paper.figure(name, benchmark.name, column.paper) for column in compared]
        if name not in done and any(figure is not None for figure in figures):
            lines.append([f"{name} (paper only)", "-", *("-" for _ in shown), *map(_paper_cell, figures)])
    header = ["method", "parameters", *(c.title for c in shown), *(f"paper: {c.title}" for c in compared)]
    yield from table(header, lines)
    for name, result in done.items():
        for key in ("layer", "label_tokens"):
            if key in result["runs"][0]:
                chosen = ", ".join(str(run[key]) for run in result["runs"])
                yield f"`{name}`: {key.replace('_', ' ')} chosen by validation: {chosen}."
                yield ""


def _orders(orders: list[dict[str, Any]]) -> Iterator[str]:
    if not orders:
        return
    yield "## What holds of the paper's order"
    yield ""
    lines = []
    for found in orders:
        clear = {True: "yes", False: "no", None: "-"}[found["clear"] if found["holds"] else False]
        values = " / ".join(cell(value) for value in found["values"].values())
        order = " < ".join(found["order"])
        lines.append([order, found["data"], found["metric"], values, "yes" if found["holds"] else "no", clear])
    yield from table(["order", "data", "metric", "values", "holds", "beyond the spread"], lines)


def _out_of_distribution(ood: dict[str, Any]) -> Iterator[str]:
    shown = (Column("F1", ("f1",)), Column("AUPRC", ("auprc",)), Column("recall", ("recall",)))
    done = {test: {n: r for n, r in results.items() if r is not None} for test, results in ood["results"].items()}
    done = {test: results for test, results in done.items() if results}
    if not done:
        return
    yield f"## Out of distribution: trained on {ood['trained_on']}"
    yield ""
    yield "F1 / AUPRC / recall of the harmful label on other test sets; the threshold is that of the training data."
    yield ""
    names = list(dict.fromkeys(name for results in done.values() for name in results))
    lines = []
    for name in names:
        cells = [
            [cell(column.find(results[name])) for column in shown] for results in done.values() if name in results
        ]
        lines.append([f"`{name}`", *(" / ".join(parts) for parts in cells)])
    sizes = [next(iter(results.values()))["summary"]["test"]["rows"] for results in done.values()]
    yield from table(["method", *(f"{test} ({size:,})" for test, size in zip(done, sizes, strict=True))], lines)
    if absent := [test for test in ood["results"] if test not in done]:
        yield f"Not at hand: {', '.join(absent)}."
        yield ""
    figures = ", ".join(f"{name} {_paper_cell(figure)}" for name, figure in paper.OUT_OF_DISTRIBUTION.items())
    yield f"In the paper, trained on WildGuardMix and tested on ToxicChat (F1): {figures}."
    yield ""


def _downcast(downcast: dict[str, Any]) -> Iterator[str]:
    done = {name: result for name, result in downcast["results"].items() if result is not None}
    if not done:
        return
    shown = columns(downcast["data"])
    toxicchat = find_benchmark(downcast["data"])[0].name == "toxicchat"
    yield f"## `mha` by downcast, on {downcast['data']}"
    yield ""
    lines = [
        [
            name,
            f"{result['num_parameters']:,}",
            *(cell(column.find(result)) for column in shown),
            _paper_cell(paper.DOWNCAST.get(int(name)) if toxicchat else None),
        ]
        for name, result in done.items()
    ]
    header = ["downcast", "parameters", *(column.title for column in shown), "paper: F1, human-annotated rows"]
    yield from table(header, lines)


def _layers(source: str, heads: dict[str, Any]) -> Iterator[str]:
    done = {name: result for name, result in heads.items() if result is not None and result["groups"]}
    if not done:
        return
    yield f"## Layer weights on {source}"
    yield ""
    yield (
        "The three layers with the largest mean weight on test rows, by label and by whether the head is right; the plot has "
        "all. In the paper, errors look like the label that was given: their mean weights are nearer to those of the right rows "
        "of that label than to those of the true one."
    )
    yield ""
    lines = []
    for name, found in done.items():
        for group in found["groups"]:
            top = sorted(range(len(found["layers"])), key=lambda i: -group["weights"][i])[:3]
            layers = ", ".join(f"{found['layers'][i]} ({group['weights'][i]:.3f})" for i in top)
            lines.append(
                [f"`{name}`", group["label"], "right" if group["right"] else "wrong", str(group["rows"]), layers]
            )
    yield from table(["head", "label", "head is", "rows", "layers (weight)"], lines)
    for name, found in done.items():
        if errors := found["errors"]:
            nearer = [error for error in errors if error["to_given"] < error["to_true"]]
            rows, all_rows = (sum(error["rows"] for error in some) for some in (nearer, errors))
            yield (
                f"- `{name}`: nearer to the given label for {len(nearer)} of {len(errors)} pairs of a true and a given label, "
                f"which is {rows} of {all_rows} wrong rows."
            )
    yield ""


def _sensitivity(found: dict[str, Any]) -> Iterator[str]:
    pruned = sum(trial["status"] == "pruned" for trial in found["trials"])
    stopped = f" Pruned early: {pruned}, which stand with the best that they had reached by then." if pruned else ""
    if failed := sum(trial["status"] == "failed" for trial in found["trials"]):
        stopped += f" Failed, their training having run away: {failed}, which are left out."
    yield "## Sensitivity to hyper-parameters"
    yield ""
    yield (
        f"Validation {found['metric']} of {len(found['trials'])} configurations of a sweep.{stopped} In the paper the learning "
        "rate matters most for `pooling` and `gate`, and `mha` is robust."
    )
    yield ""
    lines = [
        [
            f"`{kind}`",
            str(values["trials"]),
            *(f"{values[name]:.3f}" for name in ("best", "median", "worst")),
            f"{values['best'] - values['worst']:.3f}",
            "-" if values["learning_rate"] is None else f"{values['learning_rate']:+.2f}",
        ]
        for kind, values in found["kinds"].items()
    ]
    header = ["kind", "configurations", "best", "median", "worst", "range", "rank correlation with the learning rate"]
    yield from table(header, lines)


def _few_labels(source: str, heads: dict[str, Any]) -> Iterator[str]:
    done = [found for found in heads.values() if found is not None]
    if not done:
        return
    found, curves = done[0], _curves(done)
    yield f"## Few labels: {source}"
    yield ""
    yield (
        f"{found['metric']} on {found['rows']['test']:,} test rows after training on so many of the "
        f"{found['rows']['train']:,} training rows, drawn anew for each seed, with what `llama-probe train` chooses for their "
        "number. No row is held back, and nothing is chosen by one."
    )
    yield ""
    sizes = list(next(iter(curves.values())))
    lines = [[f"`{kind}`", *(cell(values[size]) for size in sizes)] for kind, values in curves.items()]
    yield from table(["kind", *(f"{size:,} rows" for size in sizes)], lines)


def _curves(done: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    return summarize_curves([point for found in done for point in found["curve"]], done[0]["metric"])


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    figures = {}
    for source, results in report["main"].items():
        panels: dict[str, dict[str, Any]] = {}
        for column in columns(source):
            for name, result in results.items():
                value = None if result is None else column.find(result)
                if value is not None and math.isfinite(value["mean"]):
                    figure = paper.figure(name, find_benchmark(source)[0].name, column.paper) if column.paper else None
                    own = {**value, "paper": None if figure is None else figure.value}
                    panels.setdefault(f"{source}: {column.title}", {})[name] = own
        if panels:
            figures[f"main-{file_name(source)}.png"] = methods_plot(panels)
    for source, heads in report["layers"].items():
        done = {name: found for name, found in heads.items() if found is not None and found["groups"]}
        if done:
            figures[f"layers-{file_name(source)}.png"] = layer_groups_plot(done)
    for source, heads in report["few_labels"].items():
        done = [found for found in heads.values() if found is not None]
        if done and all(value for sizes in _curves(done).values() for value in sizes.values()):
            title = f"{source}: {done[0]['metric']}"
            figures[f"few-labels-{file_name(source)}.png"] = learning_curves_plot(_curves(done), title)
    if report["sensitivity"] is not None:
        figures["sensitivity.png"] = sensitivity_plot(report["sensitivity"])
    return figures
