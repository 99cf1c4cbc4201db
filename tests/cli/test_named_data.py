"""The command line on data sets that are known by name."""

import json

import pytest
from command_line import call, write_rows

from llama_probe.heads.configuration import read_config


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Local copies of data sets known by name."""
    folder = tmp_path_factory.mktemp("copies")
    for name, splits in (("toxicchat", ("train", "test")), ("xstest", ("test",)), ("goemotions", ("train", "test"))):
        (folder / name).mkdir()
        for split in splits:
            rows = [
                {
                    "text": f"{'good' if i % 3 else 'bad'} {split} {i}",
                    "label": [i % 3 + 1, 27] if name == "goemotions" else int(i % 3 == 0),
                    "human_annotation": i % 2 == 0,
                }
                for i in range(40)
            ]
            (folder / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def trained_by_name(copies, backbone_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("named") / "tox"
    done = call(
        "train", "--backbone", backbone_folder, "--probe-type", "pooling", "--train", "toxicchat", f"--data-dir={copies}",
        "--output", output, "--epochs", 1, "--folds", 0, "--max-length", 64, "--dataset-name", "My chats", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return output, json.loads(done.stdout)


def test_train_by_name(trained_by_name, copies):
    output, results = trained_by_name
    assert read_config(output).id2label == {0: "non-toxic", 1: "toxic"}
    assert {name: (part["source"], part["rows"]) for name, part in results["data"].items()} == {
        "train": ("toxicchat", 34), "validation": ("15% of train", 6), "test": ("toxicchat:test", 40),
    }  # fmt: skip
    assert set(results["summary"]["test"]["slices"]["human_annotation"]) == {"True", "False"}
    card = results["card"]
    assert (card["license"], card["dataset"], card["language"]) == ("cc-by-nc-4.0", "lmsys/toxic-chat", "en")
    assert card["dataset_name"] == "My chats" and "non-commercial" in card["data_note"]
    assert "--train toxicchat" in card["command"] and str(copies) not in json.dumps(results)


def test_the_card_says_what_further_rows_are(copies, backbone_folder, tmp_path):
    done = call(
        "train", "--backbone", backbone_folder, "--probe-type", "pooling", "--train", copies / "xstest" / "test.jsonl",
        "--label-names", "safe,unsafe", "--extra", "toxicchat", "--extra-weight", 0.5, f"--data-dir={copies}",
        "--output", tmp_path, "--epochs", 1, "--folds", 0, "--max-length", 64, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["data"]["extra"] == {"source": "toxicchat", "rows": 40, "weights": [0.5]}
    note = "No licence of the training rows was stated. Further rows: ToxicChat 0124 ("
    assert results["card"]["data_note"].startswith(note) and "non-commercial" in results["card"]["data_note"]
    assert f"{note}prompts" in (tmp_path / "README.md").read_text()


def test_evaluate_by_name(trained_by_name, backbone_folder, copies):
    args = ("evaluate", "--probe", trained_by_name[0], "--backbone", backbone_folder, "--data-dir", copies, "--json")
    done = call(*args, "--data", "toxicchat")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rows"] == 40 and set(found["slices"]["human_annotation"]) == {"True", "False"}
    human = json.loads(call(*args, "--data", "toxicchat", "--where", "human_annotation=true").stdout)
    assert human["f1"] == found["slices"]["human_annotation"]["True"]["f1"] and human["rows"] < 40
    for condition, words in (
        ("human_annotation", "must be COLUMN=VALUE"),
        ("who=me", "no column 'who'"),
        ("human_annotation=maybe", "values: False, True"),
    ):
        refused = call(*args, "--data", "toxicchat", "--where", condition)
        assert refused.returncode == 2 and words in refused.stderr
    other = call(*args, "--data", "xstest")
    assert other.returncode == 0 and "safe, unsafe of the data are read as non-toxic, toxic" in other.stderr
    assert "slices" not in json.loads(other.stdout)
    refused = call(*args, "--data", "goemotions:test")
    assert refused.returncode == 2 and "is for multi_label_classification, not for single_label" in refused.stderr


def test_train_on_several_labels_and_on_values(copies, rows, backbone_folder, tmp_path):
    args = ("train", "--backbone", backbone_folder, "--probe-type", "pooling", "--epochs", 1, "--max-length", 64)
    done = call(*args, "--train", "goemotions", "--data-dir", copies, "--output", tmp_path / "go", "--json")
    assert done.returncode == 0, done.stderr
    config = read_config(tmp_path / "go")
    assert config.problem_type == "multi_label_classification" and config.id2label[27] == "neutral"
    done = call(*args, "--train", rows / "train.jsonl", "--problem-type", "regression", "--output", tmp_path / "value")
    assert done.returncode == 0, done.stderr
    assert read_config(tmp_path / "value").problem_type == "regression"


@pytest.mark.parametrize(
    "args, words",
    [
        (("--train", "toxichat"), "data sets known by name: toxicchat, wildguardmix"),
        (("--train", "xstest", "--data-dir", "{copies}"), "xstest has no split 'train'; it has: test"),
        (("--train", "imdb", "--data-dir", "{copies}"), "local copies lie in DIR/imdb/SPLIT.jsonl.gz"),
        (("--train", "toxicchat:dev", "--data-dir", "{copies}"), "toxicchat has no split 'dev'; it has: test, train"),
        (("--train", "toxicchat", "--label-column", "jailbreaking"), "have their own columns"),
        (("--train", "emotion"), "emotion cannot be loaded as dair-ai/emotion from the Hub"),
    ],
)
def test_bad_names_are_one_line_and_status_2(copies, backbone_folder, tmp_path, args, words):
    args = [arg.replace("{copies}", str(copies)) for arg in args]
    done = call("train", "--backbone", backbone_folder, "--output", tmp_path / "out", *args)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("llama-probe: ") and words in last and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
