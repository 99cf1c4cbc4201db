"""Labels of rows: class indices, names, several at once, or values."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import numpy as np

from ..errors import ProbeError
from ..hub.folder import default_label_names


_MAX_VALUE = 1e15  # a loss sums the squares of the values in float32
_MAX_LABELS = 10_000  # a column with more different values is an id or a time


def read_labels(
    source: str, values: Sequence[Any], label_names: Sequence[str] | None, problem_type: str | None
) -> tuple[np.ndarray, list[str], str]:
    """Return the labels as in `LabelledTexts`, their names and the problem type.

    Texts and truth values are names. A list is several labels of one row. Whole numbers are class indices, but names if one of
    the numbers is among `label_names`, or without `label_names` if a number is negative or an index is missing (1 to 5). Other
    numbers are values.

    Args:
        label_names: names by index. Defaults to the names that the labels imply.
        problem_type: as in `ProbeConfig`. Defaults to the type that the labels imply.
    """
    several = isinstance(values[0], (list, tuple))
    mixed = [row for row, value in enumerate(values) if isinstance(value, (list, tuple)) != several]
    if mixed:
        raise ProbeError(f"{source}: row {mixed[0]} must have {'a list' if several else 'one label'}, as row 0")
    flat = list(chain.from_iterable(values)) if several else list(values)
    if problem_type is None:
        fractions = any(isinstance(item, float) and not item.is_integer() for item in flat)
        single = "regression" if fractions and label_names is None else "single_label_classification"
        problem_type = "multi_label_classification" if several else single
    if several != (problem_type == "multi_label_classification"):
        raise ProbeError(f"{source}: labels are {'lists' if several else 'single values'}, not {problem_type}")
    if problem_type == "regression":
        if label_names is not None and len(label_names) != 1:
            raise ProbeError(f"{source}: label_names={list(label_names)} must be one name for a regression")
        return _read_values(source, flat), list(label_names or ["value"]), problem_type
    written, names = _read_names(source, flat, label_names, several)
    if not label_names and not 1 <= len(names) <= _MAX_LABELS:
        raise ProbeError(f"{source}: {len(names):,} labels; 1 to {_MAX_LABELS:,} are allowed without label_names")
    index = {name: i for i, name in enumerate(names)}
    missing = sorted(set(written) - set(names))
    if missing:
        raise ProbeError(f"{source}: labels without a name: {missing[:5]}; label_names: {', '.join(names[:100])}")
    indices = np.array([index[name] for name in written], dtype=np.int64)
    if not several:
        return indices, names, problem_type
    labels = np.zeros((len(values), len(names)), dtype=np.float32)
    np.add.at(labels, (np.repeat(np.arange(len(values)), list(map(len, values))), indices), 1)
    if (labels > 1).any():
        row = int(labels.max(axis=1).argmax())
        raise ProbeError(f"{source}: row {row} has a label twice; list the labels that hold, not zeros and ones")
    return labels, names, problem_type


def _read_values(source: str, values: list[Any]) -> np.ndarray:
    for row, value in enumerate(values):
        with suppress(TypeError, ValueError, OverflowError):
            if abs(float(value)) <= _MAX_VALUE:
                continue
        raise ProbeError(f"{source}: row {row}: {value!r} is not a finite number up to {_MAX_VALUE:g}")
    return np.array(list(map(float, values)), dtype=np.float32).reshape(-1, 1)


def _read_names(
    source: str, flat: list[Any], label_names: Sequence[str] | None, several: bool
) -> tuple[list[str], list[str]]:
    """Return each label as a name, and all names."""
    if all(isinstance(item, str) for item in flat):
        return flat, list(label_names or sorted(set(flat)))
    truths = all(isinstance(item, bool) for item in flat)
    numbers = None
    with suppress(TypeError, ValueError, OverflowError):
        numbers = list(map(int, flat))
    if numbers != flat:
        raise ProbeError(f"{source}: labels must be all whole numbers or all texts; or problem_type='regression'")
    written = list(map(str, flat if truths else numbers))
    used = sorted(set(numbers))
    if label_names:
        names = list(label_names)
    elif truths:
        names = ["False", "True"]
    elif several or used == list(range(len(used))) or (used[0] >= 0 and used[-1] <= 1):
        names = default_label_names(min(used[-1], _MAX_LABELS) + 1)  # `read_labels` refuses one too many
    else:
        names = list(map(str, used))
    if not set(written) & set(names):
        written = [names[number] if 0 <= number < len(names) else str(number) for number in numbers]
    return written, names
