"""Labelled rows from files and folders."""

import gzip
import json

import numpy as np
import pytest

from llama_probe import ProbeError
from llama_probe.data import read_labelled


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(text.encode()))
        elif name.endswith((".csv", ".tsv")):
            sep = "," if name.endswith(".csv") else "\t"
            lines = [sep.join(rows[0])] + [sep.join(str(value) for value in row.values()) for row in rows]
            path.write_text("\n".join(lines) + "\n")
        elif name.endswith(".parquet"):
            import datasets

            datasets.Dataset.from_list(rows).to_parquet(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return str(path)

    return write


ROWS = [
    {"text": "one", "label": 0, "kind": "x"},
    {"text": "two", "label": 2, "kind": "y"},
    {"text": "three", "label": 1, "kind": "x"},
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.tsv", "a.parquet"])
def test_formats(write, name):
    rows = read_labelled(write(ROWS, name))
    assert rows.texts == ["one", "two", "three"] and rows.labels.tolist() == [0, 2, 1]
    assert rows.label_names == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert rows.columns == {"kind": ["x", "y", "x"]}
    assert rows.problem_type == "single_label_classification"


def test_a_folder_with_splits(write, tmp_path):
    write(ROWS, "data/train.jsonl")
    write(ROWS[:1], "data/test.jsonl")
    assert len(read_labelled(str(tmp_path / "data"), split="test")) == 1
    with pytest.raises(ProbeError, match="has no split 'validation'; it has: train, test"):
        read_labelled(str(tmp_path / "data"), split="validation")


def test_own_columns_and_names(write):
    path = write([{"q": "a", "y": "spam"}, {"q": "b", "y": "ham"}])
    rows = read_labelled(path, "q", "y")
    assert rows.label_names == ["ham", "spam"] and rows.labels.tolist() == [1, 0]
    assert read_labelled(path, "q", "y", ["spam", "ham"]).labels.tolist() == [0, 1]


def test_several_labels_and_values(write):
    rows = read_labelled(write([{"text": "a", "label": [0, 2]}, {"text": "b", "label": []}]))
    assert rows.problem_type == "multi_label_classification"
    assert rows.labels.tolist() == [[1, 0, 1], [0, 0, 0]]
    values = read_labelled(write([{"text": "a", "label": 0.5}, {"text": "b", "label": 2.0}]))
    assert values.problem_type == "regression" and values.labels.tolist() == [[0.5], [2.0]]


def test_splits_are_even_and_keep_equal_texts_together(write):
    rows = [{"text": f"t{i % 80}", "label": int(i % 80 % 4 == 0)} for i in range(100)]
    data = read_labelled(write(rows))
    large, small = data.split(0.25, seed=1)
    assert len(large) + len(small) == 100 and not set(large.texts) & set(small.texts)
    assert abs(np.mean(small.labels) - 0.25) < 0.08
    again = data.split(0.25, seed=1)[1]
    assert again.texts == small.texts and data.split(0.25, seed=2)[1].texts != small.texts


@pytest.mark.parametrize(
    "rows, kwargs, words",
    [
        (ROWS, {"text_column": "body"}, "has no column 'body'; it has: text, label, kind"),
        (ROWS, {"label_names": ["a", "b"]}, "labels go from 0 to 2, but there are 2 names"),
        ([{"text": "a", "label": "x"}], {"label_names": ["y"]}, r"labels without a name: \['x'\]"),
        ([{"text": " ", "label": 1}], {}, "row 0 has no text"),
        ([{"text": "a", "label": None}, {"text": "b", "label": 1}], {}, "row 0 has no text or no label"),
        ([{"text": "a", "label": -1}], {}, "labels go from -1"),
        ([{"text": "a", "label": [1]}], {"problem_type": "single_label_classification"}, "labels are lists"),
    ],
)
def test_wrong_rows(write, rows, kwargs, words):
    with pytest.raises(ProbeError, match=words):
        read_labelled(write(rows), **kwargs)


def test_wrong_sources(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ProbeError, match=r"is of no known format; allowed: \.json"):
        read_labelled(str(tmp_path / "a.txt"))
    with pytest.raises(ProbeError, match="cannot be read as a file, a folder or a Hub data set"):
        read_labelled(str(tmp_path / "nowhere"))
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(ProbeError, match="cannot be read"):
        read_labelled(str(tmp_path / "bad.jsonl"))
