"""Labelled texts: split, joined and renamed; and labels that are worth a look."""

import numpy as np
import pytest

from llama_probe import ProbeError
from llama_probe.data.labelled_texts import LabelledTexts, check_labels


def rows_of(texts, labels, names="ab", kind="single_label_classification"):
    return LabelledTexts(texts, np.array(labels), list(names), kind, {"id": list(range(len(texts)))})


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


def test_a_digest_is_of_texts_and_labels():
    rows = rows_of(["one", "two", "three"], [0, 2, 1], "xyz")
    others = [rows.select([1, 0, 2]), rows.select([0, 1]), rows.renamed(["a", "b", "c"])]
    assert len({part.digest() for part in [rows, *others]}) == 4 and rows.digest() == rows.select([0, 1, 2]).digest()


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
