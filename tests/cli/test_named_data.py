"""The command line on data sets that are known by name."""

import json

import pytest
from command_line import call, refuse, settings, succeed, train

from llama_probe.heads.configuration import read_config


pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def trained(copies, backbone_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("named") / "tox"
    words = ("--train", "toxicchat", "--data-dir", copies, "--output", output, "--json")
    sections = {"validation": {"folds": 0}, "card": {"dataset_name": "My chats"}, "training": {"num_train_epochs": 1}}
    return output, succeed("train", "--backbone", backbone_folder, *words, *settings(**sections))


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


def test_the_card_says_what_further_rows_are(copies, backbone_folder, tmp_path):
    extra = ("--train", "toxicchat", "--set", "train.1.extra=true", "--set", "train.1.weights=[0.5]")
    words, labels = ("--data-dir", copies, "--json", *extra), {"names": ["safe", "unsafe"]}
    results = train(backbone_folder, copies / "xstest" / "test.jsonl.gz", tmp_path / "head", *words, labels=labels)
    assert results["data"]["extra"] == {"source": "toxicchat", "rows": 40, "weights": [0.5]}
    note = results["card"]["data_note"]
    assert note.startswith("No licence of the training rows was stated") and "non-commercial" in note
    assert note in (tmp_path / "head" / "README.md").read_text()


def test_evaluate_by_name(trained, backbone_folder, copies):
    args = ("evaluate", "--probe", trained[0], "--backbone", backbone_folder, "--data-dir", copies, "--json", "--data")
    found = succeed(*args, "toxicchat")
    assert found["rows"] == 12 and set(found["slices"]["human_annotation"]) == {"True", "False"}
    other = call(*args, "xstest")
    assert other.returncode == 0 and "safe, unsafe" in other.stderr
    assert "slices" not in json.loads(other.stdout)
    assert "labels are lists" in refuse(*args, "goemotions:test")
