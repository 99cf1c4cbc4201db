"""`calibrate --novelty-data`, `evaluate --against`, `drift`, and a head that `train` gives its novelty."""

import shutil

import pytest
from command_line import refuse, succeed, train
from training_runs import write

from llama_probe import ProbeModel


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    kinds = {
        "train": [f"{'good' if i % 3 else 'bad'} number {i}" for i in range(200)],
        "test": [f"{'good' if i % 3 else 'bad'} number {i}" for i in range(300, 350)],
        "other": [f"{{}}[] == {chr(97 + i % 26)}{i} // @@" for i in range(50)],
    }
    for name, texts in kinds.items():
        write(folder / f"{name}.jsonl", [{"text": text, "label": int("bad" in text)} for text in texts])
    return folder


@pytest.fixture(scope="module")
def heads(rows, backbone_folder, tmp_path_factory):
    """A head with novelty, one without, and one whose novelty was fitted with folds."""
    folder = tmp_path_factory.mktemp("heads")
    labels = {"names": ["fine", "awful"], "flagged": ["awful"]}
    sections = {"new": {"share": 0.25}, "old": {"share": 0.25}, "folded": {"folds": 2}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_probe.evaluation.plots.find_spec", lambda name: None)
        for name, validation in sections.items():
            held = {"validation": validation, "training": {"novelty": name != "old"}}
            train(backbone_folder, rows / "train.jsonl", folder / name, labels=labels, **held)
    return folder


@pytest.fixture
def served(heads, backbone_folder, tmp_path):
    def options(name):
        shutil.copytree(heads / name, tmp_path / name)
        return "--probe", tmp_path / name, "--backbone", backbone_folder

    return options


def test_train_fits_it(heads, served):
    new, old, folded = (ProbeModel.from_pretrained(heads / name) for name in ("new", "old", "folded"))
    assert old.novelty is None and "novelty" not in old.results
    assert new.results["novelty"]["rows"] == folded.results["novelty"]["rows"] == {"train": 150, "validation": 50}
    assert "## Novelty" in (heads / "new" / "README.md").read_text()
    prompts = ("classify", "good number 3", "bad number 7", *served("new"), "--json")
    for row in succeed(*prompts):
        assert 0 <= row["novelty"]["new"] <= 1
    assert [row["labels"]["new"] for row in succeed(*prompts, "--abstain-at", 0)] == [None, None]
    assert "unlike" in succeed("generate", *prompts[1:-1], "--abstain-at", 0)


def test_calibrate_fits_it_and_keeps_what_was_measured(rows, served):
    options = served("old")
    before = ProbeModel.from_pretrained(options[1])
    found = succeed("calibrate", *options, "--novelty-data", rows / "train.jsonl", "--json")
    assert found["novelty"]["rows"] == {"train": 150, "validation": 50}
    after = ProbeModel.from_pretrained(options[1])
    assert after.results["runs"] == before.results["runs"] and after.config.threshold == before.config.threshold
    more = ("--novelty-data", rows / "train.jsonl", "--novelty-validation", rows / "test.jsonl", "--max-rows", 45)
    both = succeed("calibrate", *options, *more, "--benign", rows / "test.jsonl", "--rate", 0.1, "--json")
    assert both["novelty"]["rows"] == {"train": 45, "validation": 45} and "fpr-10%" in both["thresholds"]
    assert "novelty: rows" in succeed("calibrate", *options, *more)
    assert "--novelty-data" in refuse("calibrate", *options, "--novelty-validation", rows / "test.jsonl")
    assert "40" in refuse("calibrate", *options, *more[:2], "--max-rows", 45)


def test_evaluate_against_other_texts(rows, served):
    options = served("new")
    args = ("evaluate", *options, "--data", rows / "test.jsonl", "--against", rows / "other.jsonl", "--bootstrap", 20)
    found = succeed(*args, "--record", "numbers", "--json")["novelty"]
    (part,) = found["against"].values()
    assert (
        part["rows"] == 50 and part["auroc"] > 0.9 and found["own"]["rows"] == 50 and part["far"] > found["own"]["far"]
    )
    card = (options[1] / "README.md").read_text()
    assert f"{part['auroc']:.3f}" in card and "other.jsonl" in card
    few = succeed(*args, "--max-rows", 20, "--json")
    assert few["rows"] == few["novelty"]["own"]["rows"] == 20
    assert "other.jsonl" in succeed(*args)
    succeed(*args[:-1], 0, "--record", "b")
    assert "--novelty-data" in refuse("evaluate", *served("old"), *args[5:])


def test_drift(rows, served, tmp_path):
    options = served("new")
    log = tmp_path / "log.jsonl"
    log.write_text((rows / "test.jsonl").read_text() + "\n" + (rows / "other.jsonl").read_text() + '\n{"text": null}')
    args = ("drift", *options, "--input", log)
    found = succeed(*args, "--top", 3, "--json")
    assert found["rows"] == 100 and found["novelty"]["far"] > 0.3 and set(found["labels"]) == {"fine", "awful"}
    assert [row["text"] for row in found["worth_labelling"] if "@@" in row["text"]]
    assert len(found["worth_labelling"]) == 3
    assert succeed(*args, "--max-rows", 20, "--json")["rows"] == 20
    assert "drift.png" in succeed(*args, "--output", tmp_path / "out")
    assert (tmp_path / "out" / "drift.png").stat().st_size > 1000
    assert "--novelty-data" in refuse("drift", *served("old"), "--input", log)
    assert "'prompt'" in refuse(*args, "--text-column", "prompt")
