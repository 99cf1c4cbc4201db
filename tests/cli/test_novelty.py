"""`calibrate --novelty-data`, `evaluate --against`, a log beside other rows, and a head that `train` gives its novelty."""

import pytest
from command_line import refuse, succeed, train
from conftest import read_head, save_head
from training_runs import write

from llama_probe.evaluation.scored_files import compare_scored_files


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    texts_of = {
        "train": [f"{'good' if i % 3 else 'bad'} number {i}" for i in range(200)],
        "test": [f"{'good' if i % 3 else 'bad'} number {i}" for i in range(300, 350)],
        "other": [f"{{}}[] == {chr(97 + i % 26)}{i} // @@" for i in range(50)],
    }
    for name, texts in texts_of.items():
        write(folder / f"{name}.jsonl", [{"text": text, "label": int("bad" in text)} for text in texts])
    return folder


@pytest.fixture(scope="module")
def trained(rows, backbone_folder, tmp_path_factory):
    """Train a head, whose novelty is fitted on folds."""
    output = tmp_path_factory.mktemp("heads") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_probe.evaluation.plots.find_spec", lambda name: None)
        labels = {"names": ["fine", "awful"], "flagged": ["awful"]}
        train(backbone_folder, rows / "train.jsonl", output, labels=labels, validation={"folds": 2})
    return output


@pytest.fixture
def new(trained, backbone_folder, tmp_path):
    """The options that name the head, in a folder of its own."""
    return "--probe", save_head(read_head(trained), tmp_path / "new"), "--backbone", backbone_folder


@pytest.fixture
def old(trained, backbone_folder, tmp_path):
    """The options that name the head without its novelty."""
    head = read_head(trained)
    head.config, head.novelty = head.config.replace(novelty=None, weights_sha256=None), None
    del head.results["novelty"]
    return "--probe", save_head(head, tmp_path / "old"), "--backbone", backbone_folder


def test_train_fits_it(trained, new):
    assert read_head(trained).results["novelty"]["rows"] == {"train": 150, "validation": 50}
    assert "## Novelty" in (trained / "README.md").read_text()
    prompts = ("classify", "good number 3", "bad number 7", *new, "--json")
    for row in succeed(*prompts):
        assert 0 <= row["probes"]["new"]["novelty"] <= 1
    assert [row["probes"]["new"]["label"] for row in succeed(*prompts, "--abstain-at", 0)] == [None, None]
    assert "unlike" in succeed("generate", *prompts[1:-1], "--abstain-at", 0)


def test_calibrate_fits_it_and_keeps_what_was_measured(rows, old):
    before = read_head(old[1])
    found = succeed("calibrate", *old, "--novelty-data", rows / "train.jsonl", "--json")
    assert found["novelty"]["rows"] == {"train": 150, "validation": 50}
    after = read_head(old[1])
    assert after.results["runs"] == before.results["runs"] and after.config.threshold == before.config.threshold
    more = ("--novelty-data", rows / "train.jsonl", "--novelty-validation", rows / "test.jsonl", "--max-rows", 45)
    both = succeed("calibrate", *old, *more, "--benign", rows / "test.jsonl", "--rate", 0.1, "--json")
    assert both["novelty"]["rows"] == {"train": 45, "validation": 45} and "fpr-10%" in both["thresholds"]
    assert "--novelty-data" in refuse("calibrate", *old, "--novelty-validation", rows / "test.jsonl")
    assert "40" in refuse("calibrate", *old, *more[:2], "--max-rows", 45)


def test_evaluate_against_other_texts(rows, new, old, copies, tmp_path):
    args = ("--data", rows / "test.jsonl", "--against", rows / "other.jsonl", "--bootstrap", 20)
    found = succeed("evaluate", *new, *args, "--record", "numbers", "--json")["novelty"]
    (part,) = found["against"].values()
    assert part["rows"] == found["own"]["rows"] == 50 and part["auroc"] > 0.9 and part["far"] > found["own"]["far"]
    card = (new[1] / "README.md").read_text()
    assert f"{part['auroc']:.3f}" in card and "other.jsonl" in card
    few = succeed("evaluate", *new, *args[:-1], 0, "--max-rows", 20, "--record", "few", "--json")
    assert few["rows"] == few["novelty"]["own"]["rows"] == 20
    assert "other.jsonl" in succeed("evaluate", *new, *args)
    bodies = write(tmp_path / "bodies.jsonl", [{"body": f"good number {i}", "label": 0} for i in range(20)])
    args = ("--data", bodies, "--against", bodies, "--against", "toxicchat:test", "--text-column", "body")
    against = succeed("evaluate", *new, *args, "--data-dir", copies, "--bootstrap", 0, "--json")["novelty"]["against"]
    assert [part["rows"] for part in against.values()] == [20, 12], "a data set known by name has a column of its own"
    assert "--novelty-data" in refuse("evaluate", *old, *args)
    succeed("calibrate", *new, "--novelty-data", rows / "train.jsonl")
    assert "against texts of other kinds" in card
    assert "against texts of other kinds" not in (new[1] / "README.md").read_text(), "it was another novelty"


def test_a_log_is_compared_with_rows_like_the_training_data(rows, new, tmp_path):
    for name in ("test", "other"):
        succeed("classify", *new, "--input", rows / f"{name}.jsonl", "--output", tmp_path / name)
    found = compare_scored_files(tmp_path / "test", tmp_path / "other", "new", top=3)
    assert found["novelty"]["reference"]["far"] < 0.3 < found["novelty"]["log"]["far"]
    assert set(found["labels"]["log"]) == set(found["scores"]) == {"fine", "awful"}
    assert {row["file"] for row in found["worth_labelling"]} == {str(rows / "other.jsonl")}
