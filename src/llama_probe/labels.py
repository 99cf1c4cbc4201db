"""What the labels of rows mean: class indices, names, several at once, or values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import ProbeError


def read_labels(
    source: str, values: Sequence[Any], label_names: Sequence[str] | None, problem_type: str | None
) -> tuple[np.ndarray, list[str], str]:
    """Labels as in `LabelledTexts`, their names, and what kind of problem they make.

    Texts are names, and so are truth values ("False" and "True"); lists are several labels of one row, whole numbers class
    indices - or names, where they leave some out (ratings from 1 to 5) or stand among `label_names` - and other numbers values.

    Args:
        source: for messages. values: one entry a row. label_names: by index; told by the labels where left out.
        problem_type: as in `ProbeConfig`; told by the labels where left out.

    Raises:
        ProbeError: the labels do not fit each other, their names or the problem.
    """
    several = isinstance(values[0], (list, tuple))
    flat = [item for value in values for item in value] if several else list(values)
    if not several and all(isinstance(item, bool) for item in flat) and problem_type != "regression":
        label_names = label_names or ["False", "True"]
        flat = [str(item) if str(item) in label_names else int(item) for item in flat]
    if not flat and label_names is None:
        raise ProbeError(f"{source}: no row has a label")
    fractions = [item for item in flat if isinstance(item, float) and not item.is_integer()]
    if problem_type is None:
        if several:
            problem_type = "multi_label_classification"
        else:
            problem_type = "regression" if fractions and label_names is None else "single_label_classification"
    if several != (problem_type == "multi_label_classification"):
        raise ProbeError(
            f"{source}: labels are {'lists' if several else 'single values'}, which is not {problem_type}"
        )
    if problem_type == "regression":
        return _values(source, values), ["value"], problem_type
    if fractions:
        raise ProbeError(f"{source}: {fractions[0]} is no label of a {problem_type}: these are whole numbers or texts")
    if not all(isinstance(item, str) for item in flat):
        flat, names = _whole_numbers(source, flat, label_names, gaps=several)
    else:
        names = list(label_names or sorted(set(flat)))
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
        raise ProbeError(
            f"{source}: row {int(labels.max(axis=1).argmax())} names a label twice. A list names the labels that hold, by index "
            "or name, such as [0, 2]; it is no vector of zeros and ones"
        )
    return labels, names, problem_type


def _values(source: str, values: Sequence[Any]) -> np.ndarray:
    try:
        labels = np.asarray(values, dtype=np.float32).reshape(-1, 1)
    except (TypeError, ValueError):
        raise ProbeError(f"{source}: regression labels must be numbers") from None
    if len(wrong := np.flatnonzero(~np.isfinite(labels))):
        raise ProbeError(f"{source}: the label of row {wrong[0]} is {values[wrong[0]]}; it must be a finite number")
    return labels


def _whole_numbers(
    source: str, flat: list[Any], label_names: Sequence[str] | None, gaps: bool
) -> tuple[list[str], list[str]]:
    """The name of each label, and all names. `gaps`: class indices may leave some out."""
    try:
        numbers = [int(item) for item in flat]
    except (TypeError, ValueError):
        raise ProbeError(f"{source}: labels must all be whole numbers or all be texts") from None
    used = sorted(set(numbers))
    if label_names is None and not gaps and used[-1] > 1 and used != list(range(used[-1] + 1)):
        label_names = list(map(str, used))
    if label_names is not None and {str(number) for number in used} <= set(label_names):
        return list(map(str, numbers)), list(label_names)
    names = list(label_names or [f"LABEL_{i}" for i in range(used[-1] + 1)])
    if used[0] < 0 or used[-1] >= len(names):
        raise ProbeError(f"{source}: labels go from {used[0]} to {used[-1]}, but there are {len(names)} names")
    return [names[number] for number in numbers], names
