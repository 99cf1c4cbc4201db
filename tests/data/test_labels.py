"""What the labels of rows mean."""

from decimal import Decimal

import numpy as np
import pytest

from llama_probe import ProbeError
from llama_probe.data.labels import read_labels


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
        ([10**18, 0], None, [1, 0], ["0", str(10**18)]),
        ([1, -1, -1], None, [1, 0, 0], ["-1", "1"]),
        ([-1, 0, 1], None, [0, 1, 2], ["-1", "0", "1"]),
        ([Decimal("2.00"), Decimal("1.00")], None, [1, 0], ["1", "2"]),
        ([3, 1], ["1", "3", "5"], [1, 0], ["1", "3", "5"]),
        ([0, 1], ["10", "20"], [0, 1], ["10", "20"]),
        (["bad", "bad "], ["bad", "bad "], [0, 1], ["bad", "bad "]),
        (["[a]", "[b]"], None, [0, 1], ["[a]", "[b]"]),
        (["1.5", "v2"], None, [0, 1], ["1.5", "v2"]),
        (["[1]", "[2]"], ["[1]", "[2]"], [0, 1], ["[1]", "[2]"]),
        ([True, False], None, [1, 0], ["False", "True"]),
        ([True, True], None, [1, 1], ["False", "True"]),
        ([True, False], ["no", "yes"], [1, 0], ["no", "yes"]),
        ([True, False], ["True", "False"], [0, 1], ["True", "False"]),
    ],
)
def test_single_labels(values, names, expected, found):
    assert read(values, names) == (expected, found, "single_label")


def test_names_that_look_like_numbers():
    assert read(["3.5", "4"], None, "single_label_classification") == ([0, 1], ["3.5", "4"], "single_label")
    assert read(["3.5", "4"], None, "regression") == ([[3.5], [4.0]], ["value"], "regression")


def test_several_labels():
    names = ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert read([[0, 2], []]) == ([[1, 0, 1], [0, 0, 0]], names, "multi_label")
    assert read([["b"], ["a", "b"]]) == ([[0, 1], [1, 1]], ["a", "b"], "multi_label")
    assert read([["b"], []], ["a", "b"]) == ([[0, 1], [0, 0]], ["a", "b"], "multi_label")
    assert read([["a", "b"]], ["a", "b"]) == ([[1, 1]], ["a", "b"], "multi_label")
    assert read([[], []], ["a", "b"]) == ([[0, 0], [0, 0]], ["a", "b"], "multi_label")


def test_values():
    assert read([0.5, 2]) == ([[0.5], [2.0]], ["value"], "regression")
    cents = [Decimal("0.50"), Decimal("2.00")]
    assert read(cents) == ([[0.5], [2.0]], ["value"], "regression")
    assert read([0, 1], None, "regression") == ([[0.0], [1.0]], ["value"], "regression")
    assert read([False, True], None, "regression") == ([[0.0], [1.0]], ["value"], "regression")
    assert read([0.5, -1e15])[0][1] == [np.float32(-1e15)]
    assert read([0.5, 2], ["stars"], "regression") == ([[0.5], [2.0]], ["stars"], "regression")


@pytest.mark.parametrize(
    "values, names, kind, words",
    [
        ([0.93, 0.07], ["no", "yes"], None, "0.93 is no label of a .*problem_type='regression'"),
        ([0.5, 2.5], ["no", "yes"], "regression", r"one value, and label_names=\['no', 'yes'\] are 2 names"),
        ([0.5], None, "single_label_classification", "0.5 is no label"),
        ([[0.5]], None, None, "0.5 is no label of a multi_label_classification"),
        ([[1, 0, 1], [0, 1, 0]], None, None, "row 0 names a label twice.*no vector of zeros and ones"),
        ([["a", "a"]], None, None, "row 0 names a label twice"),
        ([1.5, float("nan")], None, None, "label of row 1 is nan; it must be a finite number"),
        ([1.5, float("inf")], None, None, "label of row 1 is inf"),
        ([1.5, -1e30], None, None, r"label of row 1 is -1e\+30; values go from -1e\+15 to 1e\+15.*: scale them"),
        ([1.5, "a"], None, "regression", "must be numbers"),
        ([1, "a"], None, None, "all be whole numbers or all be texts"),
        ([[], []], None, None, "no row has a label"),
        ([3], ["no", "yes"], None, "labels go from 3 to 3, but there are 2 names"),
        (
            [0, 1],
            ["-1", "1"],
            None,
            r"labels without a name: \[0\]; names: -1, 1\. Where some of the labels are names",
        ),
        ([0, 1, 2], ["1", "2", "3"], None, r"labels without a name: \[0\]; names: 1, 2, 3"),
        (["bad", "good", "bad "], None, None, "'bad' and 'bad ' differ in nothing but spaces"),
        ([-1, 1], ["no", "yes"], None, "labels go from -1 to 1"),
        ([[-1, 1]], None, None, "labels go from -1 to 1"),
        ([Decimal("0.7")], None, "single_label_classification", "0.7 is no label"),
        (range(1, 10_003), None, None, "labels up to '10002' would make 10,002 labels, and at most 10,000 are"),
        (list(map(str, range(10_001))), None, None, "labels up to '9999' would make 10,001 labels"),
        ([[10**18]], None, None, "at most 10,000 are told by the rows"),
        ([[True, False]], None, None, "lists of truth values.*no vector of zeros and ones"),
        ([[1, 0], [0, 1]], None, None, "all 2 labels hold in every row.*no vector of zeros and ones"),
        ([[1.0, 0.0], [0.0, 1.0]], ["a", "b"], None, "all 2 labels hold in every row.*give their names"),
        (["c"], ["a", "b"], None, r"labels without a name: \['c'\]"),
        ([[1]], None, "regression", "labels are lists, which is not regression"),
        (
            ["[0, 2]", "[1]", "[]"],
            None,
            None,
            r"such as '\[\]' are texts, and look like lists\. csv files hold no lists",
        ),
        (["['a']", "['a', 'b']"], None, None, "look like lists"),
        (["[0, 2]"], None, "multi_label_classification", "single values, which is not .*; csv files hold no lists"),
        (
            ["1.5", "3", "0.25"],
            None,
            None,
            "such as '3' are texts, and look like numbers: pass problem_type='regression'",
        ),
        ([0.5, "1,5"], None, "regression", "with a point before their fractions, and '1,5' is none"),
    ],
)
def test_what_cannot_be(values, names, kind, words):
    with pytest.raises(ProbeError, match=words):
        read(values, names, kind)


def test_types():
    assert read_labels("", [0, 1], None, None)[0].dtype == np.int64
    assert read_labels("", [[0]], None, None)[0].dtype == read_labels("", [0.5], None, None)[0].dtype == np.float32
