"""Labels of rows as indices, names, several a row, or values."""

import numpy as np
import pytest

from llama_probe import ProbeError
from llama_probe.data.labels import read_labels


def read(values, names=None, problem_type=None):
    labels, found, problem = read_labels("rows.csv", values, names, problem_type)
    assert labels.dtype == (np.int64 if problem == "single_label_classification" else np.float32)
    return labels.tolist(), found, problem.removesuffix("_classification")


@pytest.mark.parametrize(
    "values, names, expected, found",
    [
        ([0, 1, 1], None, [0, 1, 1], ["LABEL_0", "LABEL_1"]),
        ([0, 1], ["no", "yes", "maybe"], [0, 1], ["no", "yes", "maybe"]),
        (["b", "a"], None, [1, 0], ["a", "b"]),
        ([5, 1, 3], None, [2, 0, 1], ["1", "3", "5"]),
        ([1, -1, -1], None, [1, 0, 0], ["-1", "1"]),
        ([3, 1], ["1", "3", "5"], [1, 0], ["1", "3", "5"]),
        ([0, 1], ["10", "20"], [0, 1], ["10", "20"]),
        ([True, False], None, [1, 0], ["False", "True"]),
        ([True, False], ["no", "yes"], [1, 0], ["no", "yes"]),
        ([[0, 2], []], None, [[1, 0, 1], [0, 0, 0]], ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ([["b"], ["a", "b"]], None, [[0, 1], [1, 1]], ["a", "b"]),
    ],
)
def test_labels_are_indices_or_names(values, names, expected, found):
    problem = "multi_label" if isinstance(values[0], list) else "single_label"
    assert read(values, names) == (expected, found, problem)


def test_labels_are_values():
    assert read([0.5, 2]) == ([[0.5], [2.0]], ["value"], "regression")
    assert read(["3.5", "4"], None, "regression") == ([[3.5], [4.0]], ["value"], "regression")
    assert read([False, 1], ["stars"], "regression") == ([[0.0], [1.0]], ["stars"], "regression")


@pytest.mark.parametrize(
    "values, names, problem_type, named",
    [
        ([0.93, 0.07], ["no", "yes"], None, "problem_type"),
        ([1, "a"], None, None, "whole numbers"),
        ([0.5, 2.5], ["no", "yes"], "regression", "label_names"),
        ([[1]], None, "regression", "lists"),
        ([[0], 1], None, None, "row 1"),
        ([[1, 0, 1], [0, 1, 0]], None, None, "row 0"),
        ([1.5, float("nan")], None, None, "row 1"),
        ([0.5, "1,5"], None, "regression", "row 1"),
        ([3], ["no", "yes"], None, "'3'"),
        ([0, 1], ["-1", "1"], None, "'0'"),
        ([[], []], None, None, "0 labels"),
        ([[10**18]], None, None, "label_names"),
    ],
)
def test_refusals(values, names, problem_type, named):
    with pytest.raises(ProbeError, match=f"^rows.csv: .*{named}"):
        read(values, names, problem_type)
