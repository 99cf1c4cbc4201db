"""Labelled texts: from tables in memory, split, joined and renamed; and labels that are worth a look."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict

from llama_probe import ProbeError
from llama_probe.data.labelled_texts import LabelledTexts, check_labels
from llama_probe.data.memory import is_tokenized, rows_in_memory


def rows_of(texts, labels, names="ab", problem_type="single_label_classification"):
    return LabelledTexts(texts, np.array(labels), list(names), problem_type, {"id": list(range(len(texts)))})


def test_splits_are_even_and_keep_equal_texts_together():
    data = rows_of([f"t{i % 80}" for i in range(100)], [int(i % 80 % 4 == 0) for i in range(100)])
    large, small = data.split(0.25, seed=1)
    assert len(large) + len(small) == 100 and not set(large.texts) & set(small.texts)
    assert abs(np.mean(small.labels) - 0.25) < 0.08
    assert data.split(0.25, seed=1)[1].texts == small.texts != data.split(0.25, seed=2)[1].texts
    folds, again = (data.folds(4, seed=1) for _ in range(2))
    assert sorted(row for fold in folds for row in fold) == list(range(100)), "each row is held out once"
    assert all(len(set(data.labels[fold])) == 2 for fold in folds), "labels are spread"
    assert all((a == b).all() for a, b in zip(folds, again, strict=True))
    assert not set(data.select(folds[0]).texts) & set(data.select(folds[1]).texts)


def test_a_label_of_one_text_stays_in_the_larger_part():
    rows = rows_of([f"no {i}" for i in range(40)], [2 if i == 7 else i % 2 for i in range(40)], "abc")
    inside, outside = rows.split(0.2, seed=0)
    assert "no 7" in inside.texts and np.bincount(outside.labels).tolist() == [4, 4]
    with pytest.raises(ProbeError, match="cannot be split"):
        rows.select([0, 1]).split(0.2, seed=0)
    with pytest.raises(ProbeError, match="2 different texts"):
        rows.select([0, 1]).folds(3, seed=0)


def test_places_stay_with_their_rows():
    rows = rows_of([f"t{i}" for i in range(30)], [i % 2 for i in range(30)])
    digest = rows.digest()
    rows.places = [(0, i, i + 1) if i % 3 else None for i in range(30)]
    parts = [rows.select([4, 3]), rows.at_most(9, seed=0), *rows.split(0.3, seed=0), LabelledTexts.join([rows, rows])]
    for part in parts:
        expected = [(0, i, i + 1) if i % 3 else None for i in part.columns["id"]]
        assert part.places == expected
    unplaced = rows_of(["a", "b"], [0, 1])
    assert LabelledTexts.join([unplaced, rows]).places == [None, None, *rows.places]
    assert LabelledTexts.join([unplaced, unplaced]).places is None
    assert rows.digest() != digest == rows_of(rows.texts, rows.labels).digest()


@pytest.mark.parametrize(
    "counts, warnings",
    [
        ({"positive": 40, "postive": 1, "negative": 30}, ["'postive'; is it 'positive'?"]),
        ({"a": 40, "b": 1}, ["'b'"]),
        ({"yes": 3, "yesterday": 40, "no": 0}, ["No training row has the label no"]),
        ({"one": 1, "two": 2}, []),
    ],
)
def test_labels_worth_a_look(caplog, counts, warnings):
    labels = np.repeat(np.arange(len(counts)), list(counts.values()))
    check_labels("train", rows_of(["text"] * len(labels), labels, counts))
    assert len(caplog.records) == len(warnings)
    assert all(words in caplog.text for words in warnings) and ("is it" in caplog.text) == ("is it" in str(warnings))


@pytest.mark.parametrize(
    "data",
    [
        {"text": Dataset.from_dict({"text": ["a", "b"]})["text"], "label": np.array([1, 0])},
        [{"text": "a", "label": 1}, {"text": "b", "label": 0}],
        [("a", 1), ("b", 0)],
        {"messages": [np.array([{"role": "user", "content": text}]) for text in "ab"], "labels": [1, 0]},
        {"prompt": ["a", "b"], "response": ["no", "yes"], "label": [1, 0]},
    ],
)
def test_tables_in_memory(data):
    rows = rows_in_memory("rows", data)
    assert rows.labels.tolist() == [1, 0] and len(rows.texts) == 2 and not is_tokenized(rows)


def test_tokens_without_their_padding():
    data = {
        "input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "probe_mask": torch.tensor([[0, 0, 1], [1, 0, 0]]),
        "label": ["x", "y"],
    }
    rows = rows_in_memory("rows", data)
    assert rows.texts == [[5, 6], [7, 8, 9]] and rows.columns["probe_mask"] == [[0, 1], [1, 0, 0]]
    assert is_tokenized(rows) and rows.label_names == ["x", "y"]


def test_zeros_and_ones_for_lists_of_labels_are_refused():
    rows = rows_in_memory("rows", {"text": ["a", "b"], "label": torch.tensor([[0, 1], [1, 0]])})
    with pytest.raises(ProbeError, match="have the label 'LABEL_0', 'LABEL_1'"):
        check_labels("rows", rows)


def test_names_that_the_data_gives():
    rows = Dataset.from_dict({"words": ["a", "b"], "tone": [1, 0]})
    rows = rows.cast_column("tone", ClassLabel(names=["no", "yes"]))
    mapping = {"words": "text", "tone": "label"}
    assert rows_in_memory("rows", rows.with_format("torch"), mapping).label_names == ["no", "yes"]
    assert rows_in_memory("rows", rows, mapping, ["yes", "no"]).labels.tolist() == [0, 1]
    with pytest.raises(ProbeError, match="split"):
        rows_in_memory("rows", DatasetDict(train=rows), mapping)


def test_a_missing_cell_of_a_frame():
    frame = pytest.importorskip("pandas").DataFrame({"text": ["a", None], "label": [1, 0]})
    with pytest.raises(ProbeError, match="row 1"):
        rows_in_memory("rows", frame)
