"""Tables of rows: a file, a folder of files, or a Hub data set."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ProbeError
from ..hub.publish import check_links
from .row_files import FILE_TEXTS, MAX_TEXT, Columns, InputFile, by_column, kind_of, limited


if TYPE_CHECKING:
    from datasets import Dataset

LabelNames = dict[str, list[str]]

_PLACE = re.compile(r"([^:@]+)(?:@([^:]+))?(?::([^:]*)(?::([^:]+))?)?")


@dataclass(frozen=True)
class TablePlace:
    """The place of rows in one word: a path, or a Hub data set as `ID[@REVISION][:CONFIGURATION[:SPLIT]]`.

    A folder may have a configuration and a split as well. `ID::SPLIT` is a split of the default configuration.
    """

    id: str
    revision: str | None = None
    configuration: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, source: str) -> TablePlace:
        """Parse a source. An existing path is taken as a path, even with `:` or `@` in its name."""
        if not source.strip():
            raise ProbeError(f"{source!r} names no rows: give a file, a folder or a Hub data set")
        match = None if os.path.exists(source) else _PLACE.fullmatch(source)
        place = cls(source) if match is None else cls(*(part or None for part in match.groups()))
        if (os.path.isfile(place.id) and place.id != source) or (os.path.isdir(place.id) and place.revision):
            raise ProbeError(f"{source}: {place.id} is on this machine and has no {source[len(place.id) :]}")
        if kind_of(Path(place.id)) and not os.path.exists(place.id):
            raise ProbeError(f"there is no file {place.id}")
        return place


def read_table(
    source: str, split: str = "train", text_columns: Sequence[str] = (), max_text: int = MAX_TEXT
) -> tuple[Columns, LabelNames]:
    """Read a csv, json(l) or parquet file (also .gz), a folder of such files, or a Hub data set.

    Args:
        split: split of a folder or a Hub data set, if `source` names none.
        text_columns: columns whose csv cells stay texts: `007` is not a number there.
        max_text: characters of the longest text; a file may have 512 times as many.

    Returns:
        The values of each column, and the label names that the data gives, by column.
    """
    place = TablePlace.parse(source)
    split = place.split or split
    if os.path.isfile(place.id):
        return _read_files([place.id], text_columns, max_text)
    import datasets

    folder = Path(place.id).resolve() if os.path.isdir(place.id) else None  # the loader has no name for `.`
    try:
        if folder is None:
            rows = datasets.load_dataset(place.id, place.configuration, revision=place.revision, split=split)
            return dataset_columns(rows)
        splits = datasets.load_dataset_builder(str(folder), place.configuration).config.data_files or {}
    except Exception as error:  # The loaders raise dozens of types for bad input.
        message = f"{source} cannot be read as a file, a folder or a Hub data set: {_reason(error)}"
        raise ProbeError(message) from error
    if split not in splits:
        raise ProbeError(f"{source} has no split {split!r}; it has: {', '.join(map(str, splits))}")
    check_links(folder, splits[split])
    return _read_files(splits[split], text_columns, max_text)


def dataset_columns(data: Dataset) -> tuple[Columns, LabelNames]:
    """Return the columns of a `datasets.Dataset`, and its label names by column."""
    plain = data.with_format(None)
    return {name: list(plain[name]) for name in plain.column_names}, _label_names(data.features)


def _read_files(paths: Sequence[str], text_columns: Sequence[str], max_text: int) -> tuple[Columns, LabelNames]:
    files = [InputFile(Path(path), max_text) for path in paths]
    rows = [row for file in files for row in limited(str(file.path), file, max_text * FILE_TEXTS)]
    if not rows:
        raise ProbeError(f"{', '.join(map(str, paths))} holds no rows")
    columns = by_column(rows)
    if files[0].kind in ("csv", "tsv"):
        return {name: cells if name in text_columns else _typed(cells) for name, cells in columns.items()}, {}
    if files[0].kind == "json":
        return columns, {}
    import pyarrow.parquet as pq
    from datasets import Features

    return columns, _label_names(Features.from_arrow_schema(pq.read_schema(files[0].path)))


def _typed(cells: list[str | None]) -> list[int | float | bool | str | None]:
    """Return the cells of a csv column as whole numbers, numbers or truth values if all cells are; an empty cell is None."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = pa.array([cell or None for cell in cells], pa.string())
    trimmed = pc.utf8_trim_whitespace(column)
    kinds = [pa.int64(), pa.float64(), pa.bool_()]
    if pc.any(pc.match_substring_regex(trimmed, r"^\d{19,}$")).as_py():
        kinds.remove(pa.float64())  # in which a long id would lose digits
    for kind in kinds:
        with suppress(pa.ArrowInvalid):
            return trimmed.cast(kind).to_pylist()
    return column.to_pylist()


def _label_names(features: Mapping[str, object]) -> LabelNames:
    """Return the names of the class labels, or lists of them, by column."""
    kinds = {column: getattr(kind, "feature", kind) for column, kind in features.items()}
    return {column: kind.names for column, kind in kinds.items() if hasattr(kind, "names")}


def _reason(error: BaseException) -> str:
    """Return the message of the first cause of a loader's error, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or repr(error)
