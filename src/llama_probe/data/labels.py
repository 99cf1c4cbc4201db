"""What the labels of rows mean: class indices, names, several at once, or values."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from ..errors import ProbeError


_LARGEST_VALUE = 1e15  # float32 holds the sum of the squares of a million of them, as in a loss
_MOST_LABELS = 10_000  # that are told by the rows; a column with more is an id, a time or a value

_NO_LISTS = "csv files hold no lists: give the rows as json lines or parquet"
_LISTS = "A list names the labels that hold, by index or name, such as [0, 2]; it is no vector of zeros and ones"


def read_labels(
    source: str, values: Sequence[Any], label_names: Sequence[str] | None, problem_type: str | None
) -> tuple[np.ndarray, list[str], str]:
    """Labels as in `LabelledTexts`, their names, and what kind of problem they make.

    Texts are names, and so are truth values ("False" and "True"); lists are several labels of one row, whole numbers class
    indices - or names, where they leave some out (ratings from 1 to 5), begin below 0 (-1 and 1) or stand among `label_names` -
    and other numbers values.

    Args:
        source: for messages. values: one entry a row. label_names: by index; told by the labels where left out.
        problem_type: as in `ProbeConfig`; told by the labels where left out.

    Raises:
        ProbeError: the labels do not fit each other, their names or the problem.
    """
    several = isinstance(values[0], (list, tuple))
    flat = [item for value in values for item in value] if several else list(values)
    flat = [float(item) if isinstance(item, Decimal) else item for item in flat]
    if several and any(isinstance(item, bool) for item in flat):
        raise ProbeError(f"{source}: labels are lists of truth values. {_LISTS}")
    if not several and all(isinstance(item, bool) for item in flat) and problem_type != "regression":
        label_names = label_names or ["False", "True"]
        flat = [str(item) if str(item) in label_names else int(item) for item in flat]
    if not flat and label_names is None:
        raise ProbeError(f"{source}: no row has a label")
    fractions = [item for item in flat if isinstance(item, float) and not item.is_integer()]
    if problem_type is None:
        if not several and label_names is None and all(isinstance(item, str) for item in flat):
            _check_written(source, sorted(set(flat)))
        if several:
            problem_type = "multi_label_classification"
        else:
            problem_type = "regression" if fractions and label_names is None else "single_label_classification"
    if several != (problem_type == "multi_label_classification"):
        raise ProbeError(
            f"{source}: labels are {'lists' if several else 'single values'}, which is not {problem_type}"
            + (f"; {_NO_LISTS}" if not several and isinstance(values[0], str) else "")
        )
    if problem_type == "regression":
        if label_names is not None and len(label_names) != 1:
            raise ProbeError(
                f"{source}: a regression has one value, and label_names={list(label_names)} are {len(label_names)} names"
            )
        return _values(source, values), list(label_names or ["value"]), problem_type
    if fractions:
        values_hint = "" if several else "; for values give problem_type='regression' (--problem-type regression)"
        raise ProbeError(
            f"{source}: {fractions[0]} is no label of a {problem_type}: these are whole numbers or texts{values_hint}"
        )
    if not all(isinstance(item, str) for item in flat):
        flat, names = _whole_numbers(source, flat, label_names, gaps=several)
    else:
        names = list(label_names or sorted(set(flat)))
        if label_names is None:
            _check_count(source, len(names), names[-1])
            _check_spaces(source, names)
        if missing := sorted(set(flat) - set(names)):
            raise ProbeError(f"{source}: labels without a name: {missing[:5]}; names: {', '.join(names)}")
    index = {name: i for i, name in enumerate(names)}
    indices = np.asarray([index[item] for item in flat], dtype=np.int64)
    if not several:
        return indices, names, problem_type
    rows = np.repeat(np.arange(len(values)), [len(value) for value in values])
    labels = np.zeros((len(values), len(names)), dtype=np.float32)
    np.add.at(labels, (rows, indices), 1.0)
    if labels.max(initial=0.0) > 1:
        raise ProbeError(f"{source}: row {int(labels.max(axis=1).argmax())} names a label twice. {_LISTS}")
    if len(names) > 1 and labels.all() and not any(isinstance(item, str) for value in values for item in value):
        raise ProbeError(
            f"{source}: all {len(names)} labels hold in every row. {_LISTS}; where they do hold, give their names"
        )
    return labels, names, problem_type


def _values(source: str, values: Sequence[Any]) -> np.ndarray:
    try:
        labels = np.asarray(values, dtype=np.float32).reshape(-1, 1)
    except (TypeError, ValueError):
        raise ProbeError(
            f"{source}: regression labels must be numbers, with a point before their fractions, and {_no_number(values)!r} is none"
        ) from None
    if len(wrong := np.flatnonzero(~np.isfinite(labels))):
        raise ProbeError(f"{source}: the label of row {wrong[0]} is {values[wrong[0]]}; it must be a finite number")
    if len(wrong := np.flatnonzero(np.abs(labels) > _LARGEST_VALUE)):
        raise ProbeError(
            f"{source}: the label of row {wrong[0]} is {values[wrong[0]]}; values go from -{_LARGEST_VALUE:g} to "
            f"{_LARGEST_VALUE:g}, because a head learns by their squares: scale them, best to a mean of 0 and a spread of 1"
        )
    return labels


def _no_number(values: Sequence[Any]) -> Any:
    for value in values:
        try:
            np.float32(value)
        except (TypeError, ValueError):
            return value
    return values[0]  # lists of several numbers


def _whole_numbers(
    source: str, flat: list[Any], label_names: Sequence[str] | None, gaps: bool
) -> tuple[list[str], list[str]]:
    """The name of each label, and all names. `gaps`: class indices may leave some out."""
    try:
        numbers = [int(item) for item in flat]
    except (TypeError, ValueError):
        raise ProbeError(f"{source}: labels must all be whole numbers or all be texts") from None
    if numbers != flat:  # what int() has cut is no whole number
        raise ProbeError(f"{source}: labels must all be whole numbers or all be texts")
    used = sorted(set(numbers))
    complete = used[0] == 0 and used[-1] == len(used) - 1
    if label_names is None and not gaps and not complete and (used[0] < 0 or used[-1] > 1):
        _check_count(source, len(used), used[-1])
        label_names = list(map(str, used))
    if label_names is not None and {str(number) for number in used} <= set(label_names):
        return list(map(str, numbers)), list(label_names)
    if label_names and set(map(str, used)) & set(label_names):
        unknown = [number for number in used if str(number) not in label_names]
        raise ProbeError(
            f"{source}: labels without a name: {unknown[:5]}; names: {', '.join(label_names)}. Where some of "
            "the labels are names, all of them must be, and none is a place among the names: mend the rows"
        )
    if not label_names:
        _check_count(source, used[-1] + 1, used[-1])
    names = list(label_names or [f"LABEL_{i}" for i in range(used[-1] + 1)])
    if used[0] < 0 or used[-1] >= len(names):
        raise ProbeError(f"{source}: labels go from {used[0]} to {used[-1]}, but there are {len(names)} names")
    return [names[number] for number in numbers], names


def _check_written(source: str, names: Sequence[str]) -> None:
    """Lists and fractions that a file holds as texts would make a label each."""
    if all(_is_list(name) for name in names):
        raise ProbeError(f"{source}: labels such as {names[-1]!r} are texts, and look like lists. {_NO_LISTS}")
    try:
        numbers = list(map(float, names))
    except ValueError:
        return
    if all(map(math.isfinite, numbers)) and not all(number.is_integer() for number in numbers):
        raise ProbeError(
            f"{source}: labels such as {names[-1]!r} are texts, and look like numbers: pass problem_type='regression' where "
            "they are values, or 'single_label_classification' where they are names"
        )


def _is_list(text: str) -> bool:
    if not text.strip().startswith("["):
        return False
    try:
        return isinstance(ast.literal_eval(text.strip()), list)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def _check_spaces(source: str, names: Sequence[str]) -> None:
    """Else a head would learn to tell apart what looks the same."""
    first_of: dict[str, str] = {}
    for name in names:
        if (other := first_of.setdefault(" ".join(name.split()), name)) is not name:
            raise ProbeError(
                f"{source}: the labels {other!r} and {name!r} differ in nothing but spaces: mend the rows, or give the names of "
                "both (label_names)"
            )


def _check_count(source: str, count: int, last: Any) -> None:
    if count > _MOST_LABELS:
        raise ProbeError(
            f"{source}: labels up to {str(last)[:40]!r} would make {count:,} labels, and at most {_MOST_LABELS:,} are told by the "
            "rows. Name the column of the labels, or their names (label_names); for values give problem_type='regression'"
        )
