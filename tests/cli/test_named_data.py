"""The command line on data sets that are known by name."""

import json

import pytest
from command_line import call, refuse, succeed

from llama_probe.heads.configuration import read_config


pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def train(copies, backbone_folder):
    words = ("--backbone", backbone_folder, "--probe-type", "pooling", "--data-dir", copies, "--folds", 0, "--json")
    return ("train", *words, "--epochs", 1, "--max-length", 64)


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    output = tmp_path_factory.mktemp("named") / "tox"
    return output, succeed(*train, "--train", "toxicchat", "--output", output, "--set", "card.dataset_name=My chats")


def test_train_by_name(trained, copies):
    output, results = trained
    assert read_config(output).id2label == {0: "non-toxic", 1: "toxic"}
    assert {name: (part["source"], part["rows"]) for name, part in results["data"].items()} == {
        "train": ("toxicchat", 34), "validation": ("15% of train", 6), "test": ("toxicchat:test", 12),
    }  # fmt: skip
    assert set(results["summary"]["test"]["slices"]["human_annotation"]) == {"True", "False"}
    card = results["card"]
    assert (card["license"], card["dataset"], card["language"]) == ("cc-by-nc-4.0", "lmsys/toxic-chat", "en")
    assert card["dataset_name"] == "My chats" and "non-commercial" in card["data_note"]
    assert "--train toxicchat" in card["command"] and str(copies) not in json.dumps(results)


def test_the_card_says_what_further_rows_are(train, copies, tmp_path):
    rows = ("--train", copies / "xstest" / "test.jsonl.gz", "--label-names", "safe,unsafe")
    extra = ("--train", "toxicchat", "--set", "train.1.extra=true", "--set", "train.1.weights=[0.5]")
    results = succeed(*train, *rows, *extra, "--output", tmp_path / "head")
    assert results["data"]["extra"] == {"source": "toxicchat", "rows": 40, "weights": [0.5]}
    note = "No licence of the training rows was stated. Further rows: ToxicChat 0124 ("
    assert results["card"]["data_note"].startswith(note) and "non-commercial" in results["card"]["data_note"]
    assert f"{note}prompts" in (tmp_path / "head" / "README.md").read_text()


def test_evaluate_by_name(trained, backbone_folder, copies):
    args = ("evaluate", "--probe", trained[0], "--backbone", backbone_folder, "--data-dir", copies, "--json", "--data")
    found = succeed(*args, "toxicchat")
    assert found["rows"] == 12 and set(found["slices"]["human_annotation"]) == {"True", "False"}
    other = call(*args, "xstest")
    assert other.returncode == 0 and "safe, unsafe" in other.stderr
    assert "slices" not in json.loads(other.stdout)
    assert "labels are lists" in refuse(*args, "goemotions:test")


def test_train_on_several_labels(train, tmp_path):
    succeed(*train, "--train", "goemotions", "--output", tmp_path / "go")
    config = read_config(tmp_path / "go")
    assert config.problem_type == "multi_label_classification" and config.id2label[27] == "neutral"


@pytest.mark.parametrize("source", ["toxichat", "toxicchat:dev"])
def test_rows_that_there_are_not(train, tmp_path, source):
    assert source.partition(":")[0] in refuse(*train, "--train", source, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
