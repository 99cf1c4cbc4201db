"""Pictures of what was measured of a head. Needs matplotlib (the extra `plots`)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ProbeError
from ..files import write_atomically
from ..hub.folder import PLOT_NAMES, read_results
from .figure import SIZE, explain, new_figure, percent, png_writer


if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_CONFUSION = 60  # labels up to which a confusion can be read
_MAX_LINES = 10  # labels that are told apart as lines of one plot


def write_plots(folder: str | os.PathLike) -> list[Path]:
    """Draws what the `results.json` of a head folder holds, into the folder; the same results give the same files.

    Plots that an earlier head has left there, and that this one does not have, are removed.

    Returns:
        The files: `calibration.png` (not for regression) and `layer_weights.png`; none where nothing was measured, or
        where matplotlib is not installed.
    """
    inspection = (read_results(folder) or {}).get("inspection", {}) if find_spec("matplotlib") is not None else {}
    writers = {
        Path(folder) / name: png_writer(partial(draw, inspection))
        for name, draw in zip(PLOT_NAMES, (calibration_plot, layer_weights_plot), strict=True)
        if name.removesuffix(".png") in inspection
    }
    write_atomically(writers)
    for path in (Path(folder) / name for name in PLOT_NAMES):
        if path not in writers:
            path.unlink(missing_ok=True)
    return list(writers)


def calibration_plot(inspection: dict[str, Any]) -> Figure:
    """Reliability diagram: how often the head is right against how sure it says it is, with the rows of each bin.

    Args:
        inspection: from `inspect_head`, with `split`.
    """
    figure = new_figure((6.4, 4.2))
    calibration = inspection["calibration"]
    bins = calibration["bins"]
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", linewidth=1)
    axes.plot([b["confidence"] for b in bins], [b["frequency"] for b in bins], marker="o", color="tab:blue")
    axes.set_ylabel("how often it holds")
    axes.set_ylim(-0.03, 1.03)
    axes.set_title(
        f"Calibration on {inspection['split']} rows: expected error {calibration['error']:.3f} "
        f"({calibration['error_uncalibrated']:.3f} without the temperature)",
        fontsize=9,
        parse_math=False,
    )
    counts.bar(
        [(b["low"] + b["high"]) / 2 for b in bins],
        [b["rows"] for b in bins],
        width=0.9 * (bins[0]["high"] - bins[0]["low"]),
        color="0.6",
    )
    counts.set_yscale("log")
    counts.tick_params(axis="y", which="minor", labelleft=False)
    counts.set_ylabel("rows")
    counts.set_xlabel("probability that the head gives")
    counts.set_xlim(0, 1)
    return explain(
        figure,
        "A point is a group of rows: the probability that the head gives them, and how often it holds. On the dashed line "
        "both agree; below it the head's probabilities are too high, above it too low. Few rows make a point unsure.",
    )


def layer_weights_plot(inspection: dict[str, Any]) -> Figure:
    """Mean weight of each layer in the layer stage. Layer 0 is the embedding output.

    Args:
        inspection: from `inspect_head`, with `split`. A label is a line of the plot; more than ten are rows of a heat map.
    """
    layers, by_label = (inspection["layer_weights"][key] for key in ("layers", "by_label"))
    if len(by_label) > _MAX_LINES:
        figure = new_figure((8.5, 0.2 * len(by_label) + 2.0))
        axes = figure.subplots()
        image = axes.imshow(np.array(list(by_label.values())), cmap="Blues", vmin=0, aspect="auto")
        axes.set_yticks(range(len(by_label)), list(by_label), fontsize=8, parse_math=False)
        step = -(-len(layers) // 20)
        axes.set_xticks(range(0, len(layers), step), layers[::step])
        figure.colorbar(image, format=percent, label="mean weight")
    else:
        figure = new_figure((6.4, 4.0))
        axes = figure.subplots()
        lines = [axes.plot(layers, shares, marker=".")[0] for shares in by_label.values()]
        axes.axhline(1 / len(layers), color="0.7", linestyle="--", linewidth=1)
        axes.set_ylabel("mean weight (dashed: all alike)")
        axes.yaxis.set_major_formatter(percent)
        axes.xaxis.get_major_locator().set_params(integer=True)  # there is no layer 2.5
        # Given by themselves: the label "_x" of a line would be left out of the legend.
        for text in axes.legend(lines, list(by_label), fontsize=8).get_texts():
            text.set_parse_math(False)
    axes.set_xlabel("layer (0: embeddings)")
    axes.set_title(f"Layer weights on {inspection['split']} rows, by true label", fontsize=9, parse_math=False)
    return explain(
        figure,
        "The head reads the layers of a language model, from its input (0) to its output, and weighs them. Shown is the "
        "mean over the rows of a label: the more a layer counted, the larger it is.",
    )


def confusion_plot(inspection: dict[str, Any], names: Sequence[str]) -> Figure:
    """Rows of each label (a line) by the label that a single-label head gives (a column), with counts and shares.

    Args:
        inspection: from `inspect_head`, with `split`.
        names: of the labels, by index.

    Raises:
        ProbeError: there are more or fewer names than rows and columns.
    """
    matrix, count = np.array(inspection["confusion"]), len(names)
    if matrix.shape != (count, count):
        raise ProbeError(f"a confusion of {count} labels has {count} rows and columns, not the shape {matrix.shape}")
    totals = matrix.sum(axis=1)
    shares = matrix / np.maximum(totals, 1)[:, None]
    cell = min(max(6.0 / count, 0.36), 1.0)  # inches
    figure = new_figure((cell * count + 3.2, cell * count + 2.2))
    axes = figure.subplots()
    right = np.eye(count, dtype=bool)
    for color, hidden in (("Blues", ~right), ("Oranges", right)):
        axes.imshow(np.ma.masked_array(shares, hidden | (matrix == 0)), cmap=color, vmin=0, vmax=1)
    for (line, column), rows in np.ndenumerate(matrix):
        if rows:
            axes.text(
                column,
                line,
                f"{rows:,}\n{shares[line, column]:.0%}" if cell > 0.7 else f"{rows}",
                ha="center",
                va="center",
                fontsize=9 if cell > 0.7 else 6.5,
                color="white" if shares[line, column] > 0.6 else "black",
            )
    axes.set_xticks(range(count), names, rotation=0 if count < 4 else 90, parse_math=False)
    axes.set_yticks(
        range(count), [f"{name} ({total:,})" for name, total in zip(names, totals, strict=True)], parse_math=False
    )
    axes.set_xticks(np.arange(count - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(count - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="0.85", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("label that the head gives", fontsize=9)
    axes.set_ylabel("true label (rows)", fontsize=9)
    axes.set_title(
        f"Confusion on {inspection['split']} rows: {int(matrix.trace()):,} of {int(matrix.sum()):,} right",
        fontsize=9,
        parse_math=False,
    )
    return explain(
        figure,
        "A line holds the rows that have a label, and shows which labels the head gives them: blue where it is right, "
        "orange where it is wrong; the darker, the larger the share of the line.",
    )


def outcomes_plot(inspection: dict[str, Any]) -> Figure:
    """For each label of a multi-label head, in how many rows it is found, missed, or given wrongly.

    Args:
        inspection: from `inspect_head`, with `split`.
    """
    # The label with the most rows on top.
    outcomes = sorted(inspection["outcomes"].items(), key=lambda item: item[1]["found"] + item[1]["missed"])
    found, missed, wrong = (np.array([part[key] for _, part in outcomes]) for key in ("found", "missed", "wrong"))
    figure = new_figure((7.5, 0.22 * len(outcomes) + 2.0))
    axes = figure.subplots()
    lines = range(len(outcomes))
    axes.barh(lines, found, color="tab:blue", label="found")
    axes.barh(lines, missed, left=found, color="0.75", label="missed")
    axes.barh(lines, -wrong, color="tab:orange", label="given wrongly")
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_yticks(lines, [name for name, _ in outcomes], fontsize=8, parse_math=False)
    axes.xaxis.set_major_formatter(lambda value, _position: f"{abs(value):,.0f}")
    axes.set_xlabel("rows")
    axes.set_title(f"Each label on {inspection['split']} rows", fontsize=9, parse_math=False)
    axes.legend(fontsize=8, loc="lower right")
    return explain(
        figure,
        "To the right the rows that have a label: those to which the head gives it, and those where it misses it. To the "
        "left the rows without the label that get it all the same.",
    )


def write_sensitivity_plot(results: Path) -> Path | None:
    """Draws `sensitivity.png` beside a `sweep.json`; nothing where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return None
    path = results.with_name("sensitivity.png")
    sweep = json.loads(results.read_text(encoding="utf-8"))
    write_atomically({path: png_writer(partial(sensitivity_plot, sweep))})
    return path


def sensitivity_plot(sweep: dict[str, Any]) -> Figure:
    """How the validation metric of a sweep depends on each parameter, a colour a kind of head (the paper's figure 3).

    Args:
        sweep: from `Sweep.execute`.
    """
    trials = sweep["trials"]
    # One axis for what differs in name only, because its range depends on something else.
    merged = [{_base_name(name): value for name, value in trial["params"].items()} for trial in trials]
    names = [name for name in dict.fromkeys(name for params in merged for name in params) if name != "probe_type"]
    kinds = sorted({params["probe_type"] for params in merged})
    columns = 3
    lines = -(-len(names) // columns)
    figure = new_figure((3.2 * columns, 2.4 * lines))
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    for axes, name in zip(panels, names, strict=False):
        for kind in kinds:
            points = [
                (params[name], trial["score"])
                for params, trial in zip(merged, trials, strict=True)
                if params["probe_type"] == kind and name in params and trial["score"] is not None
            ]
            if points:
                axes.scatter(*zip(*points, strict=True), s=10, alpha=0.7, label=kind, color=f"C{kinds.index(kind)}")
        if name == "learning_rate":
            axes.set_xscale("log")
        axes.set_xlabel(name, fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    panels[0].set_ylabel(f"validation {sweep['metric']}", fontsize=8)
    panels[0].legend(fontsize=7)
    return figure


def layer_groups_plot(heads: dict[str, dict[str, Any]]) -> Figure:
    """Mean weight of each layer by label, full lines for rows that are judged right and dashed ones for errors, a panel a head.

    The paper's figures 2 and 4.

    Args:
        heads: by name, from `comparison.group_layers`, with `layers`.
    """
    figure = new_figure((SIZE[0], 2.6 * len(heads)))
    panels = figure.subplots(len(heads), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (name, found) in zip(panels, heads.items(), strict=True):
        labels = list(dict.fromkeys(group["label"] for group in found["groups"]))
        for group in found["groups"]:
            kind = "right" if group["right"] else "wrong"
            axes.plot(
                found["layers"],
                group["weights"],
                color=f"C{labels.index(group['label'])}",
                linestyle="-" if group["right"] else "--",
                label=f"{group['label']}, {kind} ({group['rows']:,})",
            )
        axes.axhline(1 / len(found["layers"]), color="0.7", linestyle=":", linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.set_ylabel("mean weight")
        axes.legend(fontsize=6)
    panels[-1].set_xlabel("layer (0: embeddings)")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    return figure


def methods_plot(panels: dict[str, dict[str, dict[str, Any]]]) -> Figure:
    """Methods side by side, a panel a metric, with the paper's figures where there are any.

    Args:
        panels: title -> method -> `mean`, `std` and `paper` (may be `None`).
    """
    rows = max(len(methods) for methods in panels.values())
    figure = new_figure((3.4 * len(panels), 1.2 + 0.3 * rows))
    for axes, (title, methods) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        names = list(methods)[::-1]
        places = range(len(names))
        means = [methods[name]["mean"] for name in names]
        axes.errorbar(means, places, xerr=[methods[name]["std"] or 0.0 for name in names], fmt="o", label="here")
        others = [(methods[name]["paper"], place) for name, place in zip(names, places, strict=True)]
        others = [point for point in others if point[0] is not None]
        if others:
            axes.plot(*zip(*others, strict=True), "x", color="0.5", label="paper, another backbone")
        axes.set_yticks(list(places), names, fontsize=8)
        axes.set_title(title.replace(", ", ",\n"), fontsize=9)
        axes.grid(axis="x", color="0.9")
        axes.legend(fontsize=7)
    return figure


def learning_curves_plot(curves: dict[str, dict[int, dict[str, Any]]], title: str) -> Figure:
    """How good each kind of head gets with a number of labelled rows; bars are standard deviations over the seeds.

    Args:
        curves: from `summarize_curves`. title: the data set and its metric.
    """
    figure = new_figure()
    axes = figure.subplots()
    for kind, values in curves.items():
        spreads = [value["std"] or 0.0 for value in values.values()]
        axes.errorbar(list(values), [v["mean"] for v in values.values()], spreads, marker="o", capsize=3, label=kind)
    sizes = list(next(iter(curves.values())))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xlabel("labelled training rows")
    axes.set_ylabel(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _base_name(parameter: str) -> str:
    for name in ("learning_rate", "num_attention_heads"):
        if name in parameter:
            return name
    return parameter
