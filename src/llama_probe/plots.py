"""Pictures of what was measured of a head. Needs matplotlib (the extra `plots`)."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ProbeError
from .files import PLOT_NAMES, read_results, write_atomically


if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIZE = (6.4, 3.6)


def write_plots(folder: str | os.PathLike) -> list[Path]:
    """Draws what the `results.json` of a head folder holds, into the folder; the same results give the same files.

    Returns:
        The files: `calibration.png` (not for regression) and `layer_weights.png`; none where nothing was measured, or
        where matplotlib is not installed.
    """
    results = read_results(folder)
    if results is None or "inspection" not in results or find_spec("matplotlib") is None:
        return []
    drawn = {}
    for name, draw in zip(PLOT_NAMES, (calibration_plot, layer_weights_plot), strict=True):
        if name.removesuffix(".png") in results["inspection"]:
            drawn[Path(folder) / name] = draw(results["inspection"])
    # Without the software's version in it, a file changes only where the picture does.
    write_atomically(
        {
            path: lambda target, figure=figure: figure.savefig(
                target, dpi=110, format="png", metadata={"Software": None}
            )
            for path, figure in drawn.items()
        }
    )
    return list(drawn)


def calibration_plot(inspection: dict[str, Any]) -> Figure:
    """Reliability diagram: how often the head is right against how sure it says it is, with the rows of each bin.

    Args:
        inspection: from `inspect_head`, with `split`.
    """
    figure = _figure()
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
    counts.set_ylabel("rows")
    counts.set_xlabel("probability that the head gives")
    counts.set_xlim(0, 1)
    return figure


def layer_weights_plot(inspection: dict[str, Any]) -> Figure:
    """Mean weight of each layer in the layer stage, a line a label. Layer 0 is the embedding output."""
    figure = _figure()
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


def _figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ProbeError("plots need matplotlib: pip install 'llama_probe[plots]'") from None

    # A figure of its own rather than pyplot's: no display, no global state.
    return Figure(figsize=_SIZE, layout="constrained")
