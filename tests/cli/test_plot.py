"""`llama-probe plot`, on the tiny backbone."""

import sys

import pytest
from command_line import refuse, succeed
from conftest import make_probe, make_tokenizer, save_head
from training_runs import write

from llama_probe.cli import inputs
from llama_probe.data.prompts import PromptFormat


BIN = {"low": 0.5, "high": 0.6, "rows": 4, "confidence": 0.55, "frequency": 0.5}
INSPECTION = {
    "split": "test",
    "layer_weights": {"layers": [0, 1, 2, 3, 4], "by_label": {"fine": [0.2] * 5, "awful": [0.1, 0.1, 0.1, 0.1, 0.6]}},
    "calibration": {"error": 0.1, "error_uncalibrated": 0.2, "bins": [BIN]},
    "confusion": [[3, 1], [0, 2]],
}


@pytest.fixture
def make_head(tmp_path):
    def make_head(inspection=None, **changes):
        content = PromptFormat(make_tokenizer()).config_fields() | {"token_scope": "content"}
        head = make_probe(**{"probe_type": "gate", "id2label": {0: "fine", 1: "awful"}, **content, **changes})
        head.results = inspection and {"inspection": inspection}
        return save_head(head, tmp_path / "mood")

    return make_head


@pytest.fixture
def rows(tmp_path):
    def rows(labels):
        lines = [{"body": f"text {i}", "mood": label} for i, label in enumerate(labels)]
        words = ("--text-column", "body", "--label-column", "mood")
        return "--data", write(tmp_path / "rows.jsonl", lines), *words

    return rows


@pytest.fixture
def not_drawn(monkeypatch):
    """Files without a picture: test_texts draws one, and test_plots.py each kind of figure."""
    monkeypatch.setattr("llama_probe.cli.plot.png", lambda figure: b"")


def names_of(folder):
    return sorted(path.name for path in folder.iterdir())


def test_texts(make_head, backbone_folder, tmp_path):
    output = tmp_path / "a" / "b"
    args = ("plot", make_head(), "--backbone", backbone_folder, "--output", output)
    found = succeed(*args, "--text", "Good morning, Zoë!", "--text", "日本", "--json")
    names = ["01-good-morning-zoe.png", "02.png"]
    assert [item["file"] for item in found["files"]] == [str(output / name) for name in names]
    assert names_of(output) == sorted(names), "and no other file"
    assert [item["text"] for item in found["files"]] == ["Good morning, Zoë!", "日本"]
    assert (output / names[0]).read_bytes().startswith(b"\x89PNG")
    drawn = found["files"][0]
    assert drawn["shows"].endswith(f"{drawn['label']} ({drawn['score']:.0%})")


@pytest.mark.usefixtures("not_drawn")
def test_labelled_rows(make_head, backbone_folder, rows, tmp_path):
    args = ("plot", make_head(inspection=INSPECTION), "--backbone", backbone_folder, "--output", tmp_path / "out")
    found = succeed(*args, *rows([0, 1, 0, 1, 1, 0, 1]), "--text", "hello", "--json")
    names = ["01-hello.png", "layer_weights.png", "calibration.png", "confusion.png"]
    assert [item["file"].split("/")[-1] for item in found["files"]] == names


@pytest.mark.usefixtures("not_drawn")
def test_heads_without_a_confusion(make_head, backbone_folder, rows, tmp_path):
    head = make_head(problem_type="multi_label_classification")
    succeed("plot", head, *rows([[0], [1], [0, 1], []]), "--backbone", backbone_folder, "--output", tmp_path / "out")
    assert names_of(tmp_path / "out") == ["calibration.png", "layer_weights.png", "outcomes.png"]
    head = make_head(problem_type="regression", id2label={0: "score"})
    succeed("plot", head, *rows([0.5, 1.5, 2.5]), "--backbone", backbone_folder, "--output", tmp_path / "score")
    assert names_of(tmp_path / "score") == ["layer_weights.png"]


@pytest.mark.usefixtures("not_drawn")
def test_measurements_of_the_head_need_no_backbone(make_head, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "load_backbone", None)
    shown = succeed("plot", make_head(inspection=INSPECTION), "--output", tmp_path / "out")
    assert "confusion.png" in shown
    assert names_of(tmp_path / "out") == ["calibration.png", "confusion.png", "layer_weights.png"]


@pytest.mark.parametrize(
    "changes, args, named",
    [
        ({}, "", "--data"),
        ({}, "--data no.jsonl", "no.jsonl"),
        ({}, "--text x --output {0}/file/in/it", "file"),
        ({}, "--text x", "llama_probe[plots]"),
        ({"token_scope": "response"}, "--text x", "reads replies alone"),
    ],
)
def test_bad_input(make_head, tmp_path, monkeypatch, changes, args, named):
    if "plots" in named:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "file").write_text("mine")
    head = make_head(**changes)
    assert named in refuse("plot", head, "--output", tmp_path / "out", *args.format(tmp_path).split())
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "out").exists()
