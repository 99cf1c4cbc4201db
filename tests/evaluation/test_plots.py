"""Plots: files that the results alone decide."""

import json

import numpy as np
import pytest
import torch
from conftest import make_probe

from llama_probe.evaluation import plots
from llama_probe.evaluation.calibration import reliability, threshold_table
from llama_probe.evaluation.plots import (
    calibration_plot,
    confusion_plot,
    layer_weights_plot,
    outcomes_plot,
    write_plots,
)


LOGITS, LABELS = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)), np.arange(60) % 2


@pytest.fixture
def inspection():
    config = make_probe(temperature=2.0).config
    return {
        "split": "test",
        "calibration": reliability(LOGITS, LABELS, config),
        "thresholds": threshold_table(LOGITS, LABELS, config),
        "layer_weights": {"layers": [0, 1, 2], "by_label": {"no": [0.5, 0.3, 0.2], "yes": [0.1, 0.1, 0.8]}},
    }


def texts(labels):
    return [label.get_text() for label in labels]


def test_files_follow_the_results(tmp_path, inspection, monkeypatch):
    results = tmp_path / "results.json"
    assert write_plots(tmp_path) == []
    results.write_text(json.dumps({"inspection": inspection}))
    first = {path.name: path.read_bytes() for path in write_plots(tmp_path)}
    assert set(first) == {"calibration.png", "layer_weights.png"}
    assert all(data.startswith(b"\x89PNG") and b"Software" not in data for data in first.values())
    assert {path.name: path.read_bytes() for path in write_plots(tmp_path)} == first
    del inspection["calibration"]  # regression heads have none
    results.write_text(json.dumps({"inspection": inspection}))
    assert write_plots(tmp_path) == [tmp_path / "layer_weights.png"] == list(tmp_path.glob("*.png"))
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert write_plots(tmp_path) == [] == list(tmp_path.glob("*.png"))


def test_what_they_show(inspection):
    upper, counts = calibration_plot(inspection).axes
    bins = inspection["calibration"]["bins"]
    assert list(upper.lines[1].get_ydata()) == [part["frequency"] for part in bins]
    assert [bar.get_height() for bar in counts.patches] == [part["rows"] for part in bins]
    assert f"{inspection['calibration']['error']:.3f}" in upper.get_title()
    (axes,) = layer_weights_plot(inspection).axes
    assert texts(axes.get_legend().get_texts()) == ["no", "yes"]
    assert list(axes.lines[1].get_ydata()) == [0.1, 0.1, 0.8]
    assert all(place.is_integer() for place in axes.get_xticks().tolist())


def test_layer_weights_of_many_labels_are_a_heat_map(inspection):
    by_label = {f"label {i}": [i / 100, 0.2, 0.8 - i / 100] for i in range(28)}
    axes, _ = layer_weights_plot(inspection | {"layer_weights": {"layers": [0, 4, 8], "by_label": by_label}}).axes
    assert axes.images[0].get_array().tolist() == list(by_label.values())
    assert texts(axes.get_yticklabels()) == list(by_label) and texts(axes.get_xticklabels()) == ["0", "4", "8"]


@pytest.mark.parametrize("count", [2, 6, 28])
def test_confusion(count):
    matrix = np.random.default_rng(0).integers(0, 3, (count, count)) + 5000 * np.eye(count, dtype=int)
    matrix[0] = 0  # a label that no row has
    names = [f"$label_{i}$" for i in range(count)]
    figure = confusion_plot({"split": "test", "confusion": matrix.tolist()}, names)
    (axes,) = figure.axes
    shown = {text.get_position(): text.get_text().replace(",", "") for text in axes.texts}
    expected = {(column, line): str(rows) for (line, column), rows in np.ndenumerate(matrix) if rows}
    assert shown == expected, "columns are what the head gives"
    assert f"{matrix.trace():,} of {matrix.sum():,} right" in axes.get_title()
    totals = matrix.sum(axis=1)
    assert texts(axes.get_yticklabels()) == [f"{name} ({n:,})" for name, n in zip(names, totals, strict=True)]
    assert axes.images[0].get_array()[1, 1] == pytest.approx(matrix[1, 1] / totals[1])
    figure.draw_without_rendering()
    width = axes.texts[-1].get_window_extent().width
    assert width < axes.get_window_extent().width / count, "a number fits into its cell"
    with pytest.raises(ValueError):
        confusion_plot({"split": "test", "confusion": matrix.tolist()}, names[1:])


def test_outcomes_of_several_labels():
    outcomes = {"rare": {"found": 1, "missed": 2, "wrong": 3}, "common": {"found": 10, "missed": 5, "wrong": 0}}
    (axes,) = outcomes_plot({"split": "test", "outcomes": outcomes}).axes
    found, missed, wrong = ([bar.get_width() for bar in bars] for bars in axes.containers)
    assert (found, missed, wrong) == ([1, 10], [2, 5], [-3, 0]), "the label with the most rows on top"
    assert [bar.get_x() for bar in axes.containers[1]] == [1, 10], "what is missed begins where what is found ends"
    assert texts(axes.get_yticklabels()) == ["rare", "common"]


def test_names_are_never_formulas(inspection):
    by_label = {"_hidden": [0.5, 0.3, 0.2], "$\\frac{$": [0.1, 0.1, 0.8]}
    odd = inspection | {"split": "$\\frac{$", "layer_weights": {"layers": [0, 1, 2], "by_label": by_label}}
    outcomes = {"$\\frac{$": {"found": 1, "missed": 2, "wrong": 3}}
    layers = layer_weights_plot(odd)
    assert texts(layers.axes[0].get_legend().get_texts()) == list(by_label)
    confusion = confusion_plot(odd | {"confusion": [[1, 0], [0, 1]]}, list(by_label))
    for figure in (layers, calibration_plot(odd), outcomes_plot(odd | {"outcomes": outcomes}), confusion):
        figure.draw_without_rendering()
