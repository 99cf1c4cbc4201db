"""Plots of what was measured of a head, and the style of all figures. Needs matplotlib (the extra `plots`)."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ProbeError
from ..files import JSON, replace_files
from ..hub.folder import PLOT_NAMES, read_results


if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_CONFUSION = 60  # labels; the cells of a larger confusion cannot be read
_DPI = 110
_MAX_LINES = 10  # labels that can be told apart as lines of one plot
# Matplotlib reads a dollar sign as a formula, unless `parse_math` is False.
_NAMES = {"fontsize": 8, "parse_math": False}


def new_figure(size: tuple[float, float] = (6.4, 3.6)) -> Figure:
    """Create an empty figure of this width and height in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ProbeError("plots need matplotlib: pip install 'llama_probe[plots]'") from None

    # A figure without pyplot needs no display and no global state.
    return Figure(figsize=size, layout="constrained")


def explain(figure: Figure, text: str, title: str | None = None) -> Figure:
    """Put a text under a figure, and a title over its first axes. Return the figure."""
    figure.supxlabel(textwrap.fill(text, int(14 * figure.get_figwidth())), color="0.3", **_NAMES)
    if title is not None:
        figure.axes[0].set_title(title, fontsize=9, parse_math=False)
    return figure


def percent(value: float, _position: int | None = None) -> str:
    """Format a share as a tick label: `0.125` is `12.5%`."""
    return f"{100 * value:.3g}%" if value else "0"


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file. The same figure gives the same bytes."""
    file = BytesIO()
    with warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        # The metadata would change the file with each version of matplotlib.
        figure.savefig(file, dpi=_DPI, format="png", metadata={"Software": None})
    return file.getvalue()


def write_plots(folder: Path) -> list[Path]:
    """Draw the measurements in the `results.json` of a head folder into the folder, in place of earlier plots.

    Returns:
        The files: `calibration.png` (not for regression) and `layer_weights.png`. Empty if nothing was measured or
        matplotlib is not installed.
    """
    inspection: JSON = {}
    if find_spec("matplotlib") is not None:
        inspection = (read_results(folder) or {}).get("inspection", {})
    files = {}
    for name, draw in zip(PLOT_NAMES, (calibration_plot, layer_weights_plot), strict=True):
        if name.removesuffix(".png") in inspection:
            files[name] = png(draw(inspection))
    replace_files(folder, files, gone=set(PLOT_NAMES) - set(files))
    return [folder / name for name in files]


def calibration_plot(inspection: JSON) -> Figure:
    """Draw a reliability diagram: observed frequency against the head's probability, with the rows of each bin."""
    figure = new_figure((6.4, 4.2))
    calibration = inspection["calibration"]
    bins = {name: np.array([part[name] for part in calibration["bins"]]) for name in calibration["bins"][0]}
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", linewidth=1)
    axes.plot(bins["confidence"], bins["frequency"], marker="o", color="tab:blue")
    axes.set(ylabel="how often it holds", ylim=(-0.03, 1.03))
    width = bins["high"] - bins["low"]
    counts.bar(bins["low"] + width / 2, bins["rows"], width=0.9 * width, color="0.6")
    counts.set(yscale="log", ylabel="rows", xlabel="probability that the head gives", xlim=(0, 1))
    counts.tick_params(axis="y", which="minor", labelleft=False)
    return explain(
        figure,
        "A point is a group of rows: the probability that the head gives them, and how often it holds. On the dashed line "
        "both agree; below it the head's probabilities are too high, above it too low. Few rows make a point unsure.",
        f"Calibration on {inspection['split']} rows: expected error {calibration['error']:.3f} "
        f"({calibration['error_uncalibrated']:.3f} without the temperature)",
    )


def layer_weights_plot(inspection: JSON) -> Figure:
    """Draw the mean weight of each layer by label, or the mean of more than ten labels. Layer 0 is the embedding output."""
    layers = inspection["layer_weights"]["layers"]
    by_label = inspection["layer_weights"]["by_label"]
    if len(by_label) > _MAX_LINES:
        by_label = {f"{len(by_label)} labels": np.mean(list(by_label.values()), axis=0)}
    figure = new_figure((6.4, 4.0))
    axes = figure.subplots()
    lines = [axes.plot(layers, shares, marker=".")[0] for shares in by_label.values()]
    axes.axhline(1 / len(layers), color="0.7", linestyle="--", linewidth=1)
    axes.set(xlabel="layer (0: embeddings)", ylabel="mean weight (dashed: all alike)")
    axes.yaxis.set_major_formatter(percent)
    axes.xaxis.get_major_locator().set_params(integer=True)  # there is no layer 2.5
    # Without its lines the legend would leave out a label such as "_x".
    for text in axes.legend(lines, list(by_label), fontsize=8).get_texts():
        text.set_parse_math(False)
    return explain(
        figure,
        "The head reads the layers of a language model, from its input (0) to its output, and weighs them. Shown is the "
        "mean over the rows of a label: the more a layer counted, the larger it is.",
        f"Layer weights on {inspection['split']} rows, by true label",
    )


def confusion_plot(inspection: JSON, names: Sequence[str]) -> Figure:
    """Draw the confusion of a single-label head: true labels (lines) by given labels (columns), counts and shares."""
    matrix = np.array(inspection["confusion"])
    count = len(names)
    cell = min(max(6.0 / count, 0.36), 1.0)  # inches
    figure = new_figure((cell * count + 3.2, cell * count + 2.2))
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (line, column), rows in np.ndenumerate(matrix):
        if rows:
            style = {"fontsize": 9 if cell > 0.7 else 6.5, "color": "white" if shares[line, column] > 0.6 else "black"}
            axes.text(column, line, f"{rows:,}", ha="center", va="center", **style)
    lines = [f"{name} ({total:,})" for name, total in zip(names, matrix.sum(axis=1), strict=True)]
    axes.set_xticks(range(count), names, rotation=0 if count < 4 else 90, **_NAMES)
    axes.set_yticks(range(count), lines, **_NAMES)
    axes.set_xlabel("label that the head gives", fontsize=9)
    axes.set_ylabel("true label (rows)", fontsize=9)
    return explain(
        figure,
        "A line holds the rows that have a label, and shows which labels the head gives them: the darker, the larger the "
        "share of the line.",
        f"Confusion on {inspection['split']} rows: {int(matrix.trace()):,} of {int(matrix.sum()):,} right",
    )


def outcomes_plot(inspection: JSON) -> Figure:
    """Draw in how many rows a multi-label head finds each label, misses it, or gives it wrongly."""
    # The label with the most rows is on top.
    outcomes = sorted(inspection["outcomes"].items(), key=lambda item: item[1]["found"] + item[1]["missed"])
    found, missed, wrong = (np.array([part[name] for _, part in outcomes]) for name in ("found", "missed", "wrong"))
    figure = new_figure((7.5, 0.22 * len(outcomes) + 2.0))
    lines = range(len(outcomes))
    axes = figure.subplots()
    axes.barh(lines, found, color="tab:blue", label="found")
    axes.barh(lines, missed, left=found, color="0.75", label="missed")
    axes.barh(lines, -wrong, color="tab:orange", label="given wrongly")
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_yticks(lines, [name for name, _ in outcomes], **_NAMES)
    axes.xaxis.set_major_formatter(lambda value, _position: f"{abs(value):,.0f}")
    axes.set_xlabel("rows")
    axes.legend(fontsize=8, loc="lower right")
    return explain(
        figure,
        "To the right the rows that have a label: those to which the head gives it, and those where it misses it. To the "
        "left the rows without the label that get it all the same.",
        f"Each label on {inspection['split']} rows",
    )
