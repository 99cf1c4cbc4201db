"""What the labels of rows mean."""

import numpy as np
import pytest

from llama_probe import ProbeError
from llama_probe.labels import read_labels


def read(values, names=None, kind=None):
    labels, found, problem = read_labels("rows.csv", values, names, kind)
    return labels.tolist(), found, problem.removesuffix("_classification")


@pytest.mark.parametrize(
    "values, names, expected, found",
    [
        ([0, 1, 1], None, [0, 1, 1], ["LABEL_0", "LABEL_1"]),
        ([1.0, 0.0], None, [1, 0], ["LABEL_0", "LABEL_1"]),
        ([1, 1], None, [1, 1], ["LABEL_0", "LABEL_1"]),
        ([0, 1], ["no", "yes", "maybe"], [0, 1], ["no", "yes", "maybe"]),
        (["b", "a"], None, [1, 0], ["a", "b"]),
        (["b"], ["c", "b"], [1], ["c", "b"]),
        ([5, 1, 3], None, [2, 0, 1], ["1", "3", "5"]),
        ([10_000_000, 0], None, [1, 0], ["0", "10000000"]),
        ([3, 1], ["1", "3", "5"], [1, 0], ["1", "3", "5"]),
        ([True, False], None, [1, 0], ["False", "True"]),
        ([True, True], None, [1, 1], ["False", "True"]),
        ([True, False], ["no", "yes"], [1, 0], ["no", "yes"]),
        ([True, False], ["True", "False"], [0, 1], ["True", "False"]),
    ],
)
def test_single_labels(values, names, expected, found):
    assert read(values, names) == (expected, found, "single_label")


def test_several_labels():
    names = ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert read([[0, 2], []]) == ([[1, 0, 1], [0, 0, 0]], names, "multi_label")
    assert read([["b"], ["a", "b"]]) == ([[0, 1], [1, 1]], ["a", "b"], "multi_label")
    assert read([["b"], []], ["a", "b"]) == ([[0, 1], [0, 0]], ["a", "b"], "multi_label")
    assert read([[], []], ["a", "b"]) == ([[0, 0], [0, 0]], ["a", "b"], "multi_label")


def test_values():
    assert read([0.5, 2]) == ([[0.5], [2.0]], ["value"], "regression")
    assert read([0, 1], None, "regression") == ([[0.0], [1.0]], ["value"], "regression")
    assert read([False, True], None, "regression") == ([[0.0], [1.0]], ["value"], "regression")


@pytest.mark.parametrize(
    "values, names, kind, words",
    [
        ([0.93, 0.07], ["no", "yes"], None, "0.93 is no label of a single_label_classification"),
        ([0.5], None, "single_label_classification", "0.5 is no label"),
        ([[0.5]], None, None, "0.5 is no label of a multi_label_classification"),
        ([[1, 0, 1], [0, 1, 0]], None, None, "row 0 names a label twice.*no vector of zeros and ones"),
        ([["a", "a"]], None, None, "row 0 names a label twice"),
        ([1.5, float("nan")], None, None, "label of row 1 is nan; it must be a finite number"),
        ([1.5, float("inf")], None, None, "label of row 1 is inf"),
        ([1.5, "a"], None, "regression", "must be numbers"),
        ([1, "a"], None, None, "all be whole numbers or all be texts"),
        ([[], []], None, None, "no row has a label"),
        ([3], ["no", "yes"], None, "labels go from 3 to 3, but there are 2 names"),
        ([-1, 1], None, None, "labels go from -1 to 1"),
        (["c"], ["a", "b"], None, r"labels without a name: \['c'\]"),
        ([[1]], None, "regression", "labels are lists, which is not regression"),
    ],
)
def test_what_cannot_be(values, names, kind, words):
    with pytest.raises(ProbeError, match=words):
        read(values, names, kind)


def test_types():
    assert read_labels("", [0, 1], None, None)[0].dtype == np.int64
    assert read_labels("", [[0]], None, None)[0].dtype == read_labels("", [0.5], None, None)[0].dtype == np.float32
