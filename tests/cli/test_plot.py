"""`llama-probe plot`, on the tiny backbone."""

import json
import sys

import numpy as np
import pytest
from command_line import call
from conftest import make_probe, make_tokenizer, save_head

from llama_probe.backbone import loading as backbones
from llama_probe.data.prompts import PromptFormat
from llama_probe.evaluation import heatmap, plots


def run(*args):
    done = call("plot", *args)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def make_head(tmp_path):
    def make_head(name="mood", results=None, **changes):
        content = PromptFormat.create(make_tokenizer()).config_fields() | {
            "token_scope": "content",
            "probe_type": "gate",
        }
        folder = save_head(make_probe(**{**content, "id2label": {0: "fine", 1: "awful"}, **changes}), tmp_path / name)
        if results is not None:
            (folder / "results.json").write_text(json.dumps(results))
        return folder

    return make_head


@pytest.fixture
def rows(tmp_path):
    def rows(labels):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps({"body": f"text {i}", "mood": label}) for i, label in enumerate(labels)))
        return "--data", path, "--text-column", "body", "--label-column", "mood"

    return rows


INSPECTION = {
    "split": "test",
    "layer_weights": {"layers": [0, 1, 2, 3, 4], "by_label": {"fine": [0.2] * 5, "awful": [0.1, 0.1, 0.1, 0.1, 0.6]}},
    "calibration": {
        "error": 0.1,
        "error_uncalibrated": 0.2,
        "bins": [{"low": 0.5, "high": 0.6, "rows": 4, "confidence": 0.55, "frequency": 0.5}],
    },
    "confusion": [[3, 1], [0, 2]],
}


def test_texts(make_head, backbone_folder, tmp_path):
    args = (make_head(), "--backbone", backbone_folder, "--output", tmp_path / "a" / "b")
    code, out, err = run("--text", "Good morning, Zoë!", "--text", "bad luck", "--text", "日本", *args, "--json")
    assert code == 0, err
    found = json.loads(out)
    names = [
        "01-good-morning-zoe.png",
        "01-good-morning-zoe.html",
        "02-bad-luck.png",
        "02-bad-luck.html",
        "03.png",
        "03.html",
    ]
    assert [item["file"] for item in found["files"]] == [str(tmp_path / "a" / "b" / name) for name in names]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "a" / "b").iterdir()), "and no other file"
    assert [item["text"] for item in found["files"][::2]] == ["Good morning, Zoë!", "bad luck", "日本"]
    assert (tmp_path / "a" / "b" / names[0]).read_bytes().startswith(b"\x89PNG")
    label, probabilities = found["files"][0]["label"], found["files"][0]["probabilities"]
    assert f"<h1>{label} ({probabilities[label]:.0%})</h1>" in (tmp_path / "a" / "b" / names[1]).read_text("utf-8")
    assert len(found["notes"]) == 1 and "keeps no measurements" in found["notes"][0] and "--data" in found["notes"][0]
    code, out, err = run("--text", "bad luck", *args)
    assert code == 0 and "01-bad-luck.html" in out and "keeps no measurements" in out


def test_labelled_rows(make_head, backbone_folder, rows, tmp_path, monkeypatch):
    drawn = {}
    confusion_plot = plots.confusion_plot
    monkeypatch.setattr(
        plots, "confusion_plot", lambda found, names: drawn.update(found) or confusion_plot(found, names)
    )
    head = make_head(results={"inspection": INSPECTION})
    args = (head, "--backbone", backbone_folder, "--output", tmp_path / "out", "--json")
    code, out, err = run(*rows([0, 1, 0, 1, 1, 0, 1]), *args, "--text", "hello")
    assert code == 0, err
    assert [item["file"].split("/")[-1] for item in json.loads(out)["files"]] == [
        "01-hello.png", "01-hello.html", "layer_weights.png", "calibration.png", "confusion.png",
    ]  # fmt: skip
    assert json.loads(out)["notes"] == []
    assert drawn["split"] == "rows.jsonl" and np.array(drawn["confusion"]).sum(axis=1).tolist() == [3, 4]


@pytest.mark.parametrize(
    "options, words",
    [
        (("--split", "train"), "no rows that --split could be for: name them with --data, or leave it out"),
        (("--label-column", "mood", "--data-dir", "."), "there are no rows that --label-column, --data-dir could be for"),
        (("--data", "{rows}", "--split", "train"), "rows.jsonl is a file, all of which is read; leave --split out"),
        (("--data", "sst2:train", "--split", "test"), "--split test: sst2:train names a split already; leave one out"),
    ],
)  # fmt: skip
def test_options_without_an_effect(make_head, rows, tmp_path, options, words):
    _, path, *_ = rows([0, 1])
    options = [option.replace("{rows}", str(path)) for option in options]
    code, _, err = run(make_head(), "--text", "hello", "--output", tmp_path / "out", *options)
    assert code == 2 and words in err and not (tmp_path / "out").exists()


def test_heads_without_a_confusion(make_head, backbone_folder, rows, tmp_path):
    args = ("--backbone", backbone_folder, "--output", tmp_path / "out", "--json")
    several = make_head("several", problem_type="multi_label_classification")
    code, out, err = run(*rows([[0], [1], [0, 1], []]), *args, several)
    assert code == 0, err
    assert {item["file"].split("/")[-1] for item in json.loads(out)["files"]} == {
        "layer_weights.png", "calibration.png", "outcomes.png",
    }  # fmt: skip
    assert "there is no confusion; outcomes.png shows each label" in json.loads(out)["notes"][0]
    value = make_head("value", problem_type="regression", id2label={0: "score"})
    code, out, err = run(*rows([0.5, 1.5, 2.5]), *args, value, "--text", "hello")
    assert code == 0, err
    assert [item["file"].split("/")[-1] for item in json.loads(out)["files"]] == [
        "01-hello.png", "01-hello.html", "layer_weights.png",
    ]  # fmt: skip
    assert "neither confusion nor reliability" in json.loads(out)["notes"][0]


def test_what_the_head_keeps_needs_no_backbone(make_head, tmp_path, monkeypatch):
    monkeypatch.setattr(backbones, "load_backbone", None)
    code, out, err = run(make_head(results={"inspection": INSPECTION}), "--output", tmp_path / "out")
    assert code == 0, err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "layer_weights.png",
        "calibration.png",
        "confusion.png",
    }
    old = {key: value for key, value in INSPECTION.items() if key != "confusion"}
    code, out, err = run(make_head("old", {"inspection": old}), "--output", tmp_path / "out")
    assert code == 0 and "keeps no confusion; --data measures it" in out


@pytest.mark.parametrize(
    "results, args, words",
    [
        (None, (), "keeps no measurements to draw; give texts to read, or labelled rows with --data"),
        (None, ("--text", " "), "a text is empty"),
        ({"inspection": {"calibration": 3}}, (), "keeps cannot be drawn"),
        ({"inspection": [1]}, (), "keeps cannot be drawn"),
        ({"inspection": {**INSPECTION, "confusion": [[1]]}}, (), "keeps cannot be drawn"),
        (None, ("--data", "no.jsonl"), "there is no file no.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_status_2(make_head, tmp_path, results, args, words):
    code, out, err = run(make_head(results=results), "--output", tmp_path / "out", *args)
    assert code == 2 and not out
    assert err.strip().splitlines()[-1].startswith("llama-probe: ") and words in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_is_refused_before_the_head_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = run("nothing-here", "--text", "x", "--output", tmp_path / "file" / "in" / "it")
    assert code == 2 and "file is a file; name a folder for the plots" in err


def test_an_unknown_head(tmp_path):
    code, _, err = run("nothing-here", "--text", "x", "--output", tmp_path / "out")
    assert code == 2 and "neither a folder nor a bundled head" in err


def test_the_output_must_be_a_folder(make_head, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        head = make_head(results={"inspection": INSPECTION})
        code, _, err = run(head, "--output", output)
        assert code == 2 and f"{tmp_path / 'file'} is a file; name a folder" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_without_matplotlib(make_head, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(backbones, "load_backbone", None)
    code, _, err = run(make_head(), "--text", "x", "--output", tmp_path / "out")
    assert code == 2 and "pip install 'llama_probe[plots]'" in err


def test_nothing_half_written(make_head, backbone_folder, tmp_path, monkeypatch):
    drawn = []
    heat_map = heatmap.heat_map

    def breaks(reading):
        drawn.append(reading)
        if len(drawn) == 2:
            raise OSError("no space left")
        return heat_map(reading)

    monkeypatch.setattr(heatmap, "heat_map", breaks)
    args = (make_head(), "--backbone", backbone_folder, "--output", tmp_path / "out")
    with pytest.raises(OSError, match="no space left"):
        run("--text", "one", "--text", "two", *args)
    assert len(drawn) == 2 and not any((tmp_path / "out").iterdir())
