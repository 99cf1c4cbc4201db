"""Plots: files that the results alone decide."""

import json

import numpy as np
import pytest
import torch
from conftest import make_probe

from llama_probe.evaluation import plots
from llama_probe.evaluation.calibration import reliability
from llama_probe.evaluation.plots import write_plots


LOGITS, LABELS = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)), np.arange(60) % 2
OUTCOMES = {"$\\frac{$": {"found": 1, "missed": 2, "wrong": 3}, "common": {"found": 10, "missed": 5, "wrong": 0}}


@pytest.fixture
def inspection():
    return {
        "split": "$\\frac{$",  # names are never formulas
        "calibration": reliability(LOGITS, LABELS, make_probe(temperature=2.0).config),
        "layer_weights": {"layers": [0, 1, 2], "by_label": {"_no": [0.5, 0.3, 0.2], "$^{$": [0.1, 0.1, 0.8]}},
        "outcomes": OUTCOMES,
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
    del inspection["calibration"]  # regression heads have none
    results.write_text(json.dumps({"inspection": inspection}))
    assert write_plots(tmp_path) == [tmp_path / "layer_weights.png"] == list(tmp_path.glob("*.png"))
    assert (tmp_path / "layer_weights.png").read_bytes() == first["layer_weights.png"], "the same bytes again"
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert write_plots(tmp_path) == [] == list(tmp_path.glob("*.png"))


def test_calibration_shows_frequencies_and_rows(inspection):
    figure, bins = plots.calibration_plot(inspection), inspection["calibration"]["bins"]
    upper, counts = figure.axes
    assert list(upper.lines[1].get_ydata()) == [part["frequency"] for part in bins]
    assert [bar.get_height() for bar in counts.patches] == [part["rows"] for part in bins]
    figure.draw_without_rendering()


def test_layer_weights_are_lines_and_one_for_many_labels(inspection):
    figure = plots.layer_weights_plot(inspection)
    (axes,) = figure.axes
    assert texts(axes.get_legend().get_texts()) == ["_no", "$^{$"]
    assert list(axes.lines[1].get_ydata()) == [0.1, 0.1, 0.8]
    figure.draw_without_rendering()
    by_label = {f"label {i}": [i / 100, 0.2, 0.8 - i / 100] for i in range(28)}
    inspection["layer_weights"] = {"layers": [0, 4, 8], "by_label": by_label}
    (axes,) = plots.layer_weights_plot(inspection).axes
    assert texts(axes.get_legend().get_texts()) == ["28 labels"]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([0.135, 0.2, 0.665])


def test_confusion_has_a_column_for_what_the_head_gives():
    count = 28  # as many as GoEmotions has
    matrix = np.random.default_rng(0).integers(0, 3, (count, count)) + 5000 * np.eye(count, dtype=int)
    matrix[0] = 0  # a label that no row has
    names = [f"$label_{i}$" for i in range(count)]
    figure = plots.confusion_plot({"split": "$\\frac{$", "confusion": matrix.tolist()}, names)
    (axes,), totals = figure.axes, matrix.sum(axis=1)
    shown = {text.get_position(): text.get_text().replace(",", "") for text in axes.texts}
    assert shown == {(column, line): str(rows) for (line, column), rows in np.ndenumerate(matrix) if rows}
    assert f"{matrix.trace():,} of {matrix.sum():,} right" in axes.get_title()
    assert texts(axes.get_yticklabels()) == [f"{name} ({n:,})" for name, n in zip(names, totals, strict=True)]
    assert axes.images[0].get_array()[1, 1] == pytest.approx(matrix[1, 1] / totals[1])
    figure.draw_without_rendering()
    width = axes.texts[-1].get_window_extent().width
    assert width < axes.get_window_extent().width / count, "a number fits into its cell"


def test_outcomes_of_several_labels(inspection):
    figure = plots.outcomes_plot(inspection)
    (axes,) = figure.axes
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    assert widths == [[1, 10], [2, 5], [-3, 0]], "found, missed, wrong; the label with the most rows on top"
    assert texts(axes.get_yticklabels()) == list(OUTCOMES)
    figure.draw_without_rendering()
