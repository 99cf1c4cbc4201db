"""The table and the plot of `llama-probe benchmark`."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...evaluation.plots import explain, new_figure, png_writer
from ...experiments import paper
from ...files import write_atomically
from ...hub.card import table
from .serving_systems import AGAIN


if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA_NAME, PLOT_NAME = "benchmark.json", "benchmark.png"

_COLORS = {"base": "0.4", "heads": "tab:blue", "naive": "tab:orange", "guard": "tab:red"}


def write_benchmark(output: Path, report: dict[str, Any]) -> list[Path]:
    """Write `benchmark.json` and, if matplotlib is installed, `benchmark.png` into a folder. Return their paths."""
    output.mkdir(parents=True, exist_ok=True)
    writers: dict[Path, Any] = {output / DATA_NAME: json.dumps(report, indent=2) + "\n"}
    if find_spec("matplotlib") is not None:
        writers[output / PLOT_NAME] = png_writer(lambda: benchmark_plot(report))
    write_atomically(writers)
    return list(writers)


def by_load(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Group the rows by load, such as `"batch 1, 512 tokens, 1 new"`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        title = f"batch {row['batch_size']}, {row['tokens']} tokens, {row['new_tokens']} new"
        found.setdefault(title, []).append(row)
    return found


def columns(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return titles and cells of the table of one load, without columns that would be empty."""
    stepped = any(row["step_ms"] for row in rows)
    compared = any(row["paper_ratio"] for row in rows)
    header = ["system", "ms", "p95", "prompts/s", "tokens/s", "ratio [quartiles]"]
    header += ["ms a further token", "its ratio [quartiles]"] if stepped else []
    header += ["peak MB", "above base", "operations"] + (["paper"] if compared else [])
    cells = []
    for row in rows:
        line = [
            row["system"],
            *(f"{row['latency_ms'][name]:.2f}" for name in ("median", "p95")),
            _number(row["prompts_per_second"]),
            _number(row["tokens_per_second"]),
            _ratio(row["ratio"]),
        ]
        if stepped:
            line += [f"{row['step_ms']['median']:.2f}", _ratio(row["step_ratio"])]
        line += ["-" if row[name] is None else f"{row[name]:,.1f}" for name in ("peak_memory_mb", "above_base_mb")]
        line.append(f"{row['operations_ratio']:.4f}x")
        if compared:
            line.append("-" if row["paper_ratio"] is None else f"{row['paper_ratio']:.2f}x")
        cells.append(line)
    return header, cells


def notes(report: dict[str, Any]) -> list[str]:
    """Return the notes below the table: what ran, and how far to trust it."""
    settings, backbone = report["settings"], report["backbone"]
    compared = any(row["paper_ratio"] for row in report["rows"])
    weights = "random weights" if settings["random_weights"] else "its own weights"
    compiled = ", compiled by torch.compile" if settings["compile"] else ""
    found = [
        f"{backbone['name']} ({backbone['num_parameters'] / 1e6:,.0f} million parameters, {backbone['dtype']}, {weights}) on "
        f"{report['environment']['device']}, {report['environment']['threads']} threads{compiled}; "
        f"{settings['pairs']} pairs a system, in turn with the plain model.",
        f"Ratio: of the times in a pair, median and quartiles. The ratio of `{AGAIN}` shows the noise: a difference of its "
        "size says nothing. More --pairs and an idle machine make it smaller.",
        "Peak MB: all weights, and the memory of a call. Operations: floating-point operations of matrix products and "
        "attention, over the plain model's. Guards get prompts of as many tokens, and give one token or class.",
    ]
    if compared:
        found.append(f"Paper: {paper.BACKBONE} ({paper.SOURCE}, table 5), {paper.SERVING_SETTING}.")
    return found


def markdown(report: dict[str, Any]) -> str:
    """Return the tables and their notes as Markdown."""
    lines: list[str] = []
    for title, rows in by_load(report).items():
        lines += [f"**{title}**", "", *table(*columns(rows))]
    return "\n".join([*lines, *(f"{note}\n" for note in notes(report))])


def benchmark_plot(report: dict[str, Any]) -> Figure:
    """Plot the ratio of each system, a panel a load: median as a point, quartiles as a line, noise as a band."""
    loads = {title: [row for row in rows if row["ratio"]] for title, rows in by_load(report).items()}
    lines = max(len(rows) for rows in loads.values())
    figure = new_figure((1.6 + 3.4 * len(loads), 1.6 + 0.28 * lines))
    panels = figure.subplots(1, len(loads), squeeze=False, sharey=True)[0]
    for axes, (title, rows) in zip(panels, loads.items(), strict=True):
        places = range(len(rows) - 1, -1, -1)
        for place, row in zip(places, rows, strict=True):
            color = _COLORS[row["kind"]]
            axes.plot(row["ratio"]["quartiles"], [place, place], color=color, linewidth=2)
            axes.plot(row["ratio"]["median"], place, "o", color=color)
            if row["paper_ratio"]:
                axes.plot(row["paper_ratio"], place, "x", color="0.5", label="paper, another backbone and device")
        for row in rows:
            if row["system"] == AGAIN:
                axes.axvspan(*row["ratio"]["quartiles"], color="0.9", zorder=0)
        axes.axvline(1, color="0.6", linewidth=1, zorder=0)
        if max(row["ratio"]["median"] for row in rows) > 4:
            axes.set_xscale("log")
        axes.set_yticks(list(places), [row["system"] for row in rows], fontsize=8, parse_math=False)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("time over the plain model's", fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        if handles:
            axes.legend(handles.values(), handles.keys(), fontsize=6)
    return explain(
        figure,
        "A point is the time of a system over the plain model's, median of pairs run in turn; its line spans the "
        "quartiles. The band is the plain model against itself: differences within it are noise.",
    )


def _ratio(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    low, high = found["quartiles"]
    return f"{found['median']:.3f}x [{low:.3f}, {high:.3f}]"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
