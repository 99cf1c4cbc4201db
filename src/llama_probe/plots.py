"""Pictures of what was measured of a head. Needs matplotlib (the extra `plots`)."""

from __future__ import annotations

import json
import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .figure import new_figure, png_writer
from .files import PLOT_NAMES, read_results, write_atomically


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_plots(folder: str | os.PathLike) -> list[Path]:
    """Draws what the `results.json` of a head folder holds, into the folder; the same results give the same files.

    Returns:
        The files: `calibration.png` (not for regression) and `layer_weights.png`; none where nothing was measured, or
        where matplotlib is not installed.
    """
    results = read_results(folder)
    if results is None or "inspection" not in results or find_spec("matplotlib") is None:
        return []
    writers = {
        Path(folder) / name: png_writer(partial(draw, results["inspection"]))
        for name, draw in zip(PLOT_NAMES, (calibration_plot, layer_weights_plot), strict=True)
        if name.removesuffix(".png") in results["inspection"]
    }
    write_atomically(writers)
    return list(writers)


def calibration_plot(inspection: dict[str, Any]) -> Figure:
    """Reliability diagram: how often the head is right against how sure it says it is, with the rows of each bin.

    Args:
        inspection: from `inspect_head`, with `split`.
    """
    figure = new_figure()
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
    return figure


def layer_weights_plot(inspection: dict[str, Any]) -> Figure:
    """Mean weight of each layer in the layer stage, a line a label. Layer 0 is the embedding output."""
    figure = new_figure()
    axes = figure.subplots()
    layers = inspection["layer_weights"]["layers"]
    for label, weights in inspection["layer_weights"]["by_label"].items():
        axes.plot(layers, weights, marker=".", label=label)
    axes.axhline(1 / len(layers), color="0.7", linestyle="--", linewidth=1)
    axes.set_xlabel("layer (0: embeddings)")
    axes.set_ylabel("mean weight")
    axes.set_title(f"Layer weights on {inspection['split']} rows, by true label (dashed: all alike)", fontsize=9)
    axes.legend(fontsize=8)
    return figure


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
                if params["probe_type"] == kind and name in params
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


def _base_name(parameter: str) -> str:
    for name in ("learning_rate", "num_attention_heads"):
        if name in parameter:
            return name
    return parameter
