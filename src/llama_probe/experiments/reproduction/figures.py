"""Plots of the paper: methods side by side, layer weights of errors, and learning curves. Needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...evaluation.plots import SIZE, mark_layers, new_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def layer_groups_plot(heads: dict[str, dict[str, Any]]) -> Figure:
    """Draw the mean weight of each layer by label, a panel a head (the paper's figures 2 and 4).

    Full lines are rows that the head judges right, dashed lines its errors.
    """
    figure = new_figure((SIZE[0], 2.6 * len(heads)))
    panels = figure.subplots(len(heads), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (name, found) in zip(panels, heads.items(), strict=True):
        labels = list(dict.fromkeys(group["label"] for group in found["groups"]))
        for group in found["groups"]:
            style, kind = ("-", "right") if group["right"] else ("--", "wrong")
            label = f"{group['label']}, {kind} ({group['rows']:,})"
            color = f"C{labels.index(group['label'])}"
            axes.plot(found["layers"], group["weights"], color=color, linestyle=style, label=label)
        mark_layers(axes, len(found["layers"]), linestyle=":")
        axes.set_title(name, fontsize=9)
        axes.set_ylabel("mean weight")
        axes.legend(fontsize=6)
        axes.label_outer()
    return figure


def methods_plot(panels: dict[str, dict[str, dict[str, Any]]]) -> Figure:
    """Draw methods side by side, a panel a metric, with the paper's figures if there are any.

    `panels` is title -> method -> `mean`, `std` and `paper` (may be None).
    """
    rows = max(len(methods) for methods in panels.values())
    figure = new_figure((3.4 * len(panels), 1.2 + 0.3 * rows))
    for axes, (title, methods) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        names, values = zip(*reversed(methods.items()), strict=True)
        spreads = [value["std"] or 0.0 for value in values]
        axes.errorbar([value["mean"] for value in values], range(len(names)), xerr=spreads, fmt="o", label="here")
        others = [(value["paper"], place) for place, value in enumerate(values) if value["paper"] is not None]
        if others:
            axes.plot(*zip(*others, strict=True), "x", color="0.5", label="paper, another backbone")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_title(title.replace(", ", ",\n"), fontsize=9)
        axes.grid(axis="x", color="0.9")
        axes.legend(fontsize=7)
    return figure


def learning_curves_plot(curves: dict[str, dict[int, dict[str, Any]]], title: str) -> Figure:
    """Draw the metric of each kind of head by the number of training rows. Bars are standard deviations over seeds."""
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
