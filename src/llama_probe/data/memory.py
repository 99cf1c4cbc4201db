"""Read rows in memory: a `datasets.Dataset`, a DataFrame, a dict of columns, or a list of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

from ..errors import ProbeError
from .labelled_texts import LabelledTexts, Labels, label_rows
from .row_files import Columns, by_column
from .tables import LabelNames, dataset_columns


def rows_in_memory(
    name: str,
    data: Any,
    column_mapping: Mapping[str, str] | None = None,
    label_names: Sequence[str] | None = None,
    problem_type: str | None = None,
    needs_labels: bool = True,
) -> LabelledTexts:
    """Return the rows of a table in memory.

    The columns are `text`, or `messages` (chats), or `prompt` and `response`, or `input_ids`; and `label` or `labels`.
    Rows with `input_ids` are tokenised: their texts are token ids, without the tokens where `attention_mask` is 0. The column
    `probe_mask` of such rows says which tokens count.

    Args:
        name: name of the table in errors.
        data: a `datasets.Dataset`, a DataFrame, a dict of columns, a list of dicts or of pairs of text and label.
        column_mapping: from names in the table to the names above, `{"review": "text"}`.
    """
    columns, named = _read_columns(name, data)
    mapping = column_mapping or {}
    for old, new in mapping.items():
        if old not in columns or (new in columns and new not in mapping):
            raise ProbeError(f"column_mapping: {name} has no column {old!r} for {new!r}; it has: {', '.join(columns)}")
    # A DataFrame holds lists as arrays.
    columns = {mapping.get(column, column): list(map(_as_list, cells)) for column, cells in columns.items()}
    named = {mapping.get(column, column): names for column, names in named.items()}
    label = _first_of(columns, "label", "labels")
    if label is None and needs_labels:
        raise ProbeError(f"{name} has no column 'label'; it has: {', '.join(columns)} (column_mapping renames)")
    labels = Labels(names=label_names and list(label_names), problem_type=problem_type)
    stated = Labels(names=named.get(label))
    if "input_ids" in columns:
        return _tokenized(name, columns, label, labels, stated)
    if {"prompt", "response"} <= columns.keys():
        return label_rows(name, columns, "response", label, labels, stated, "prompt")
    text = _first_of(columns, "text", "messages")
    if text is None:
        needed = "text, messages, prompt and response, input_ids"
        raise ProbeError(f"{name} has none of: {needed}; it has: {', '.join(columns)} (column_mapping renames)")
    return label_rows(name, columns, text, label, labels, stated)


def is_tokenized(rows: LabelledTexts) -> bool:
    """Return True if the texts of the rows are token ids."""
    first = rows.texts[0]
    return not isinstance(first, str) and isinstance(first[0], int)


def _first_of(columns: Columns, *names: str) -> str | None:
    return next((name for name in names if name in columns), None)


def _tokenized(name: str, columns: Columns, label: str | None, labels: Labels, stated: Labels) -> LabelledTexts:
    """Return rows of token ids, without the tokens that `attention_mask` leaves out."""

    def read(column: str) -> list[list[int]]:
        if "attention_mask" not in columns:
            return columns[column]
        return [list(compress(*row)) for row in zip(columns[column], columns["attention_mask"], strict=True)]

    tokens = read("input_ids")
    if not tokens or not all(tokens):
        raise ProbeError(f"{name} holds no rows, or a row without input_ids")
    # `label_rows` reads the labels; the texts are a filler.
    rows = label_rows(name, {**columns, "text": ["ids"] * len(tokens)}, "text", label, labels, stated)
    masks = {"probe_mask": read("probe_mask")} if "probe_mask" in columns else {}
    return replace(rows, texts=tokens, columns=masks)


def _read_columns(name: str, data: Any) -> tuple[Columns, LabelNames]:
    """Return the columns of a table, and its label names by column."""
    if hasattr(data, "column_names"):  # from the library datasets
        if not hasattr(data, "features") or isinstance(data, Mapping) or not hasattr(data, "__len__"):
            raise ProbeError(f"{name} must be one split in memory, such as data['train'], not {type(data).__name__}")
        return dataset_columns(data)
    if hasattr(data, "columns"):  # a DataFrame, whose missing values become None
        data = data.astype(object).where(data.notna(), None).to_dict("list")
    if isinstance(data, Mapping):
        columns = {str(column): _as_list(values) for column, values in data.items()}
        are_lists = all(isinstance(values, list) for values in columns.values())
        if not are_lists or len(set(map(len, columns.values()))) != 1:
            raise ProbeError(f"{name} must hold lists of the same length: {', '.join(columns) or 'no columns'}")
        return columns, {}
    rows = data if isinstance(data, (list, tuple)) else []
    if all(isinstance(row, (list, tuple)) and len(row) == 2 for row in rows):
        rows = [{"text": text, "label": label} for text, label in rows]
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        allowed = "a Dataset, a DataFrame, a dict of columns, or a list of dicts or of pairs of text and label"
        raise ProbeError(f"{name} must be {allowed}; this {type(data).__name__} is none of these, or has no rows")
    return by_column(rows), {}


def _as_list(values: Any) -> Any:
    if hasattr(values, "tolist"):
        return values.tolist()
    return list(values) if isinstance(values, Sequence) and not isinstance(values, (str, bytes)) else values
