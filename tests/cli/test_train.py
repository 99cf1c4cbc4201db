"""`llama-probe train`, beside what tests of the head that it writes say of it."""

import json

import pytest
from command_line import call, write_rows
from conftest import read_head

from llama_probe.heads.configuration import read_config


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


def test_train_with_few_false_alarms(rows, backbone_folder, tmp_path):
    done = call(
        "train", "--backbone", backbone_folder, "--probe-type", "pooling", "--train", rows / "train.jsonl", "--test",
        rows / "test.jsonl", "--output", tmp_path / "head", "--epochs", 1, "--max-false-positive-rate", 0.1, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["recipe"]["max_false_positive_rate"] == 0.1
    # Of six negative validation rows none may be flagged.
    assert results["runs"][0]["validation"]["precision"] in (0.0, 1.0)
    card = (tmp_path / "head" / "README.md").read_text()
    assert "(highest recall with a false-positive rate of at most 0.1) and temperature" in card


def test_a_stopped_run_goes_on(rows, backbone_folder, tmp_path):
    args = (
        "train",
        "--backbone",
        backbone_folder,
        "--probe-type",
        "pooling",
        "--train",
        rows / "train.jsonl",
        "--output",
        tmp_path / "a",
    )
    assert call(*args, "--epochs", 1, "--no-cache").returncode == 0
    assert call(*args, "--epochs", 1, "--resume").returncode == 0
    assert read_head(tmp_path / "a").config.probe_type == "pooling"


def test_a_probe_of_one_layer(rows, backbone_folder, tmp_path):
    args = (
        "train",
        "--backbone",
        backbone_folder,
        "--probe-type",
        "last",
        "--train",
        rows / "train.jsonl",
        "--epochs",
        1,
    )
    done = call(*args, "--layers", "1,3", "--output", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    config = read_config(tmp_path / "a")
    assert config.layers == [1, 3] and config.layer_indices == [3]
    served = call("classify", "good morning", "--backbone", backbone_folder, "--probe", tmp_path / "a", "--json")
    assert served.returncode == 0 and json.loads(served.stdout)[0]["labels"]["a"].startswith("LABEL_"), served.stderr
    for layers, words in (("top", "must be all, or state indices"), ("9", "the states are 0 to 4")):
        refused = call(*args, "--layers", layers, "--output", tmp_path / "b")
        assert refused.returncode == 2 and words in refused.stderr


def test_a_fitted_head(rows, backbone_folder, tmp_path):
    args = (
        "train",
        "--backbone",
        backbone_folder,
        "--probe-type",
        "muli",
        "--train",
        rows / "train.jsonl",
        "--folds",
        0,
    )
    done = call(*args, "--test", rows / "test.jsonl", "--output", tmp_path / "a", "--json")
    assert done.returncode == 0, done.stderr
    (fitted,) = json.loads(done.stdout)["runs"]
    assert read_config(tmp_path / "a").options == {"l1": fitted["l1"]}
    data = ("--data", rows / "test.jsonl", "--json", "--bootstrap", 0)
    found = call("evaluate", "--probe", tmp_path / "a", "--backbone", backbone_folder, *data)
    assert json.loads(found.stdout)["auprc"] == pytest.approx(fitted["test"]["auprc"], abs=0.02), found.stderr
    served = call("generate", "good morning", "--backbone", backbone_folder, "--probe", tmp_path / "a", "--json")
    assert len(json.loads(served.stdout)[0]["probabilities"]["a"]) == 2, served.stderr
    given = call(*args, "--option", "l1=9", "--output", tmp_path / "b")
    assert given.returncode == 0 and not read_head(tmp_path / "b").classifier.weight.any(), given.stderr
    refused = call(*args, "--normalize", "rms", "--output", tmp_path / "c")
    assert refused.returncode == 2 and "leave normalize out" in refused.stderr
