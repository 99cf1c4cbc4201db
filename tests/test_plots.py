"""Plots: files that the results alone decide."""

import json

import numpy as np
import pytest
import torch
from conftest import make_probe

from llama_probe import ProbeError, plots
from llama_probe.calibration import reliability, threshold_table
from llama_probe.files import read_head, save_head
from llama_probe.plots import calibration_plot, layer_weights_plot, write_plots


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


@pytest.fixture
def folder(tmp_path, inspection):
    folder = save_head(make_probe(), tmp_path / "head")
    (folder / "results.json").write_text(json.dumps({"inspection": inspection}))
    return folder


def test_the_same_results_give_the_same_files(folder):
    first = {path.name: path.read_bytes() for path in write_plots(folder)}
    assert set(first) == {"calibration.png", "layer_weights.png"}
    assert all(data.startswith(b"\x89PNG") and b"Software" not in data for data in first.values())
    assert {path.name: path.read_bytes() for path in write_plots(folder)} == first


def test_what_they_show(inspection):
    upper, counts = calibration_plot(inspection).axes
    bins = inspection["calibration"]["bins"]
    assert list(upper.lines[1].get_ydata()) == [part["frequency"] for part in bins]
    assert [bar.get_height() for bar in counts.patches] == [part["rows"] for part in bins]
    assert f"{inspection['calibration']['error']:.3f}" in upper.get_title()
    (axes,) = layer_weights_plot(inspection).axes
    assert [line.get_label() for line in axes.lines[:2]] == ["no", "yes"]
    assert list(axes.lines[1].get_ydata()) == [0.1, 0.1, 0.8]


def test_nothing_measured_nothing_drawn(tmp_path, folder, monkeypatch):
    assert write_plots(save_head(make_probe(), tmp_path / "fresh")) == []
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert write_plots(folder) == [] and not (folder / "calibration.png").exists()


def test_without_matplotlib(inspection, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ProbeError, match=r"pip install 'llama_probe\[plots\]'"):
        layer_weights_plot(inspection)


def test_results_travel_with_the_head_until_it_is_trained_on(folder, tmp_path, caplog):
    head = read_head(folder)
    assert (save_head(head, tmp_path / "copy") / "results.json").is_file()
    with torch.no_grad():
        head.classifier.weight.add_(1)
    assert not (save_head(head, tmp_path / "changed") / "results.json").exists()
    assert "trained on since its results were measured" in caplog.text
