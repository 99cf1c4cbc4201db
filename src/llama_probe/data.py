"""Labelled rows: reads them, finds their labels, and splits off a validation part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from sklearn.model_selection import train_test_split

from .errors import ProbeError
from .prompts import Text


_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


@dataclass
class LabelledTexts:
    """Texts with their labels.

    Attributes:
        texts: prompts.
        labels: `[rows]` class indices, `[rows, num_labels]` of 0 and 1 (multi-label), or `[rows, 1]` values (regression).
        label_names: by index.
        problem_type: as in `ProbeConfig`.
        columns: further columns of the data, to slice results by.
    """

    texts: list[Text]
    labels: np.ndarray
    label_names: list[str]
    problem_type: str
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: Sequence[int]) -> LabelledTexts:
        """Some of the rows."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        texts = [self.texts[row] for row in rows]
        return LabelledTexts(texts, self.labels[list(rows)], self.label_names, self.problem_type, columns)

    def split(self, share: float, seed: int) -> tuple[LabelledTexts, LabelledTexts]:
        """A larger and a smaller part. Rows with the same text stay together; classes are spread evenly.

        Raises:
            ProbeError: there are too few rows for the share.
        """
        if not 0 < share < 1:
            raise ProbeError(f"validation_share={share} must lie between 0 and 1")
        first_of: dict[str, int] = {}
        group = [first_of.setdefault(str(text), row) for row, text in enumerate(self.texts)]
        unique = np.array(sorted(first_of.values()))
        strata = self.labels[unique] if self.problem_type == "single_label_classification" else None
        try:
            _, held_back = train_test_split(unique, test_size=share, random_state=seed, stratify=strata)
        except ValueError as error:
            raise ProbeError(f"{len(self)} rows cannot be split with validation_share={share}: {error}") from None
        held_back = set(held_back.tolist())
        inside = [row for row in range(len(self)) if group[row] not in held_back]
        outside = [row for row in range(len(self)) if group[row] in held_back]
        return self.select(inside), self.select(outside)


def read_table(source: str, split: str = "train") -> Dataset:
    """Rows of a csv, json(l) or parquet file (also .gz), of a folder of such files, or of a Hub data set.

    Raises:
        ProbeError: there is nothing to read.
    """
    path = Path(source)
    try:
        if path.is_file():
            suffix = next((s for s in reversed(path.suffixes) if s in _FORMATS), None)
            if suffix is None:
                raise ProbeError(f"{path} is of no known format; allowed: {', '.join(_FORMATS)}, each also with .gz")
            options = {"sep": "\t"} if suffix == ".tsv" else {}
            return load_dataset(_FORMATS[suffix], data_files=str(path), split="train", **options)
        data = load_dataset(source, split=None)
    except ProbeError:
        raise
    except Exception as error:  # the loaders raise dozens of types for bad input
        reason = str(error).strip().splitlines()
        raise ProbeError(
            f"{source} cannot be read as a file, a folder or a Hub data set: {reason[0] if reason else error!r}"
        ) from error
    if isinstance(data, DatasetDict):
        if split not in data:
            raise ProbeError(f"{source} has no split {split!r}; it has: {', '.join(data)}")
        data = data[split]
    return data


def read_labelled(
    source: str,
    text_column: str = "text",
    label_column: str = "label",
    label_names: Sequence[str] | None = None,
    problem_type: str | None = None,
    split: str = "train",
) -> LabelledTexts:
    """Reads rows and makes sense of their labels.

    Whole numbers are class indices, texts class names, lists several labels of one row (multi-label), and other numbers
    values (regression). Names come from `label_names`, from the data set's features, or from the labels themselves.

    Raises:
        ProbeError: a column is missing, a text or label is empty, or labels and names do not fit each other.
    """
    table = read_table(source, split)
    for name in (text_column, label_column):
        if name not in table.column_names:
            raise ProbeError(f"{source} has no column {name!r}; it has: {', '.join(table.column_names)}")
    texts, values = list(table[text_column]), list(table[label_column])
    if not texts:
        raise ProbeError(f"{source} holds no rows")
    for row, (text, value) in enumerate(zip(texts, values, strict=True)):
        if text is None or value is None or (isinstance(text, str) and not text.strip()):
            raise ProbeError(f"{source}: row {row} has no text or no label")
    feature = table.features[label_column]
    feature = getattr(feature, "feature", feature)
    if label_names is None and isinstance(feature, ClassLabel):
        label_names = feature.names
    labels, names, found_type = _read_labels(source, values, label_names, problem_type)
    columns = {name: list(table[name]) for name in table.column_names if name not in (text_column, label_column)}
    return LabelledTexts(texts, labels, names, found_type, columns)


def _read_labels(source: str, values: list, label_names, problem_type: str | None):
    several = isinstance(values[0], (list, tuple))
    flat = [item for value in values for item in value] if several else values
    if problem_type is None:
        if several:
            problem_type = "multi_label_classification"
        elif any(isinstance(item, float) and not item.is_integer() for item in flat):
            problem_type = "regression"
        else:
            problem_type = "single_label_classification"
    if problem_type == "regression":
        try:
            return np.asarray(values, dtype=np.float32).reshape(len(values), -1), ["value"], problem_type
        except (TypeError, ValueError):
            raise ProbeError(f"{source}: regression labels must be numbers") from None
    if several != (problem_type == "multi_label_classification"):
        raise ProbeError(
            f"{source}: labels are {'lists' if several else 'single values'}, which is not {problem_type}"
        )
    if all(isinstance(item, str) for item in flat):
        names = list(label_names or sorted(set(flat)))
        missing = sorted(set(flat) - set(names))
        if missing:
            raise ProbeError(f"{source}: labels without a name: {missing[:5]}; names: {', '.join(names)}")
        index = {name: i for i, name in enumerate(names)}
        indices = [[index[item] for item in value] if several else index[value] for value in values]
    else:
        try:
            indices = [[int(item) for item in value] if several else int(value) for value in values]
        except (TypeError, ValueError):
            raise ProbeError(f"{source}: labels must all be whole numbers or all be texts") from None
        used = {int(item) for item in flat}
        names = list(label_names or [f"LABEL_{i}" for i in range(max(used) + 1)])
        if min(used) < 0 or max(used) >= len(names):
            raise ProbeError(f"{source}: labels go from {min(used)} to {max(used)}, but there are {len(names)} names")
    if not several:
        return np.asarray(indices, dtype=np.int64), names, problem_type
    labels = np.zeros((len(values), len(names)), dtype=np.float32)
    for row, items in enumerate(indices):
        labels[row, items] = 1.0
    return labels, names, problem_type
