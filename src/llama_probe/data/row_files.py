"""Read parquet, JSON and csv files of any size, a row at a time."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ProbeError, first_line
from ..files import JSON


if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
Row = dict[str, Any]  # values by column name
Columns = dict[str, list[Any]]  # None where a row has no value

# Suffix -> format.
KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
_TYPED_ROWS = 200  # rows from which the types of columns are inferred

MAX_TEXT = 500_000  # characters of one text; a tokenizer takes about 400 bytes of memory a character
_CHUNK_TEXTS = 64  # texts of MAX_TEXT characters in a line, or in a chunk of rows
FILE_TEXTS = 512  # texts of MAX_TEXT characters in a file that is read at once
_BATCH = 64  # rows of a parquet file that are decoded at a time

# Errors of readers for damaged files. RuntimeError: JSON that is nested too deeply, or that pyarrow cannot read the file.
_DAMAGED = (OSError, EOFError, ValueError, RuntimeError, csv.Error, zlib.error)


def kind_of(path: Path) -> str | None:
    """Return the format of a file by its suffix, or by the one before `.gz`. None if it is not in `KINDS`."""
    kind = KINDS.get(Path(path.stem).suffix if path.suffix == ".gz" else path.suffix)
    return None if path.suffix == ".gz" and kind == "parquet" else kind


class InputFile:
    """A file of rows: `parquet`, `json` (an object a line, or one array), `csv` or `tsv` (with a header, all values are texts).

    A hostile file may be small and unpack to any size, so a row is read at a time, and lines and texts have a limit. The loaders
    of `datasets` have no limit, and change texts, such as `007` and `None` in csv files and dates in JSON.

    Args:
        max_text: characters of the longest text. A line of a text file may have 64 times as many bytes.
    """

    def __init__(self, path: Path, max_text: int = MAX_TEXT):
        self.path = path
        self.kind = kind_of(path)
        self.max_text = max_text
        if self.kind is None:
            raise ProbeError(f"{path} has no known format; allowed: {', '.join(KINDS)}, all but parquet also with .gz")

    @classmethod
    def find(cls, patterns: Sequence[str], max_text: int = MAX_TEXT) -> list[InputFile]:
        """Return the files that paths and patterns such as `rows/*.parquet` match, each once."""
        paths: dict[Path, Path] = {}
        for pattern in patterns:
            names = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
            matches = [Path(name) for name in names if os.path.isfile(name)]
            if not matches:
                raise ProbeError(f"there is no file {pattern}: give files or patterns, such as 'rows/*.parquet'")
            for path in matches:
                paths.setdefault(path.resolve(), path)
        return [cls(path, max_text) for path in paths.values()]

    def identity(self) -> JSON:
        """Return path, size in bytes and time of the last change, by which a job recognises the file."""
        status = self.path.stat()
        return {"path": str(self.path), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}

    def fields(self, needed: Iterable[str] = ()) -> dict[str, pa.DataType]:
        """Return the types of the columns by name. Types of csv and JSON columns are inferred from the first rows.

        Raise `ProbeError` if a needed column is missing. A file without rows may have no columns.
        """
        if self.kind == "parquet":
            import pyarrow.parquet as pq

            try:
                schema = pq.read_schema(self.path)
                _check_names(schema.names)
            except _DAMAGED as error:
                raise ProbeError(f"{self.path} cannot be read: {first_line(error)}") from error
            fields = dict(zip(schema.names, schema.types, strict=True))
        else:
            columns = by_column(list(islice(self, _TYPED_ROWS)))
            fields = {name: _infer_type(values) for name, values in columns.items()}
        for name in needed if fields else ():
            find_column(self.path, fields, name)
        return fields

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows, with their values by column name."""
        return self._rows(None)

    def chunks(self, columns: Sequence[str], size: int) -> Iterator[tuple[range, Columns]]:
        """Yield the row numbers and the values of chunks of `size` rows. The last chunk may have fewer rows."""
        rows = ({name: row.get(name) for name in columns} for row in self._rows(list(columns)))
        for first in count(step=size):
            limit = self.max_text * _CHUNK_TEXTS
            chunk = list(islice(limited(f"{self.path}: a chunk of rows", rows, limit), size))
            if not chunk:
                return
            for row, values in enumerate(chunk, first):
                for name, value in values.items():
                    check_length(f"{self.path}: row {row}: {name}", value, self.max_text)
            yield range(first, first + len(chunk)), by_column(chunk)

    def _rows(self, columns: list[str] | None) -> Iterator[Row]:
        row = 0
        readers = {"json": self._read_json, "parquet": lambda: self._read_parquet(columns)}
        try:
            for values in readers.get(self.kind, self._read_csv)():
                yield values
                row += 1
        except ProbeError:
            raise
        except _DAMAGED as error:
            advice = ": save it in UTF-8" if isinstance(error, UnicodeDecodeError) else ""
            raise ProbeError(f"{self.path}: row {row} cannot be read: {first_line(error)}{advice}") from error

    def _read_parquet(self, columns: list[str] | None) -> Iterator[Row]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.path, pre_buffer=False) as file:
            _check_names(file.schema_arrow.names)
            for batch in file.iter_batches(_BATCH, columns=columns):
                yield from batch.to_pylist()

    def _read_json(self) -> Iterator[Row]:
        lines = filter(str.strip, self._lines())
        first = next(lines, None)
        if first is None:
            return
        lines = chain([first], lines)
        if first.lstrip().startswith("["):
            array = limited(f"{self.path}: its array", lines, self.max_text * FILE_TEXTS)
            values = json.loads("".join(array))
        else:
            values = map(json.loads, lines)
        for value in values:
            if not isinstance(value, dict):
                raise ValueError(f"it must be a JSON object, not {type(value).__name__}")
            yield value

    def _read_csv(self) -> Iterator[Row]:
        csv.field_size_limit(self.max_text * _CHUNK_TEXTS)
        reader = csv.DictReader(self._lines(), delimiter="\t" if self.kind == "tsv" else ",", strict=True)
        _check_names(reader.fieldnames or ())
        for row in reader:
            if any(row.pop(None, ())):
                raise ValueError("it has more cells than the header: put its text into quotes")
            yield row

    def _lines(self) -> Iterator[str]:
        """Yield the lines of a text file. Each line is decoded alone, so that an error names its row."""
        limit = self.max_text * _CHUNK_TEXTS
        with (gzip.open if self.path.suffix == ".gz" else open)(self.path, "rb") as file:
            while line := file.readline(limit + 1):
                if len(line) > limit:
                    raise ValueError(f"it has more than {limit:,} bytes; max_text (--max-text) raises it")
                yield line.decode("utf-8-sig")


def by_column(rows: Sequence[Mapping[str, object]]) -> Columns:
    """Return the values of rows by column name; None where a row has no value."""
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(chain.from_iterable(rows))}


def select_rows(columns: Columns, rows: Sequence[int]) -> Columns:
    """Return the columns with some of the rows."""
    return {name: [cells[row] for row in rows] for name, cells in columns.items()}


def find_column(source: object, columns: Mapping[str, T], name: str) -> T:
    """Return the values of a column, or raise a `ProbeError` that names all columns."""
    if name not in columns:
        raise ProbeError(f"{source} has no column {name!r}; it has: {', '.join(columns)}")
    return columns[name]


def limited(name: str, values: Iterable[T], limit: int) -> Iterator[T]:
    """Yield values. Raise `ProbeError` once their texts have more than `limit` characters together."""
    total = 0
    for value in values:
        total += _text_length(value)
        if total > limit:
            raise ProbeError(f"{name} has more than {limit:,} characters; max_text (--max-text) raises it")
        yield value


def check_length(name: str, value: object, max_text: int = MAX_TEXT) -> None:
    """Raise `ProbeError` if a text, or all texts of chat messages together, have more than `max_text` characters."""
    if _text_length(value) > max_text:
        raise ProbeError(f"{name} has more than {max_text:,} characters: cut it, or raise max_text (--max-text)")


def _text_length(value: object) -> int:
    """Return the number of characters of all texts in a value, such as a text, chat messages or a row."""
    length = 0
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            length += len(item)
        elif isinstance(item, (list, dict)):
            left += item if isinstance(item, list) else item.values()
    return length


def _check_names(names: Sequence[str]) -> None:
    for name, times in Counter(filter(None, names)).items():
        if times > 1:
            raise ValueError(f"it has {times} columns {name!r}: leave one")


def _infer_type(values: Sequence[object]) -> pa.DataType:
    import pyarrow as pa

    try:
        kind = pa.array(values).type
    except (pa.ArrowException, UnicodeError, OverflowError):  # mixed types, lone surrogates, large numbers
        return pa.string()
    return pa.string() if pa.types.is_null(kind) or "struct<>" in str(kind) else kind  # parquet has no empty objects
