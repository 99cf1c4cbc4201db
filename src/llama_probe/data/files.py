"""Files with any number of rows, read a row at a time: parquet, JSON and csv."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count, islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import ProbeError, first_line


if TYPE_CHECKING:
    import pyarrow as pa

# Suffix -> format.
KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
_TYPED_ROWS = 1000  # JSON rows that the types of columns are inferred from

# A small file can unpack to any size, and a tokenizer takes about 400 bytes of memory a character.
MAX_TEXT = 500_000  # characters of one text
# So many texts of the largest size may be in memory as a chunk, and as a whole file.
_CHUNK_TEXTS, _FILE_TEXTS = 64, 512
_ROW_COST = 100  # characters that a row of a whole file counts as beside its text
_STEP = 64  # rows of a parquet file that are decoded before they are measured


def kind_of(path: Path) -> str | None:
    """Return the format of a file by its suffix, or by the one before `.gz`. None if it is not in `KINDS`."""
    kind = KINDS.get(Path(path.stem).suffix if path.suffix == ".gz" else path.suffix)
    return None if path.suffix == ".gz" and kind == "parquet" else kind


@dataclass
class Chunk:
    """Consecutive rows of a file: `columns` holds their values by column name, None where a row has no value."""

    number: int
    first_row: int
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


class InputFile:
    """A file of rows: `parquet`, `json` (an object a line, or one array), `csv` or `tsv` (with a header, all values are texts).

    Raises:
        ProbeError: the name ends with none of `KINDS`.
    """

    def __init__(self, path: Path):
        self.path, self.kind = path, kind_of(path)
        if self.kind is None:
            raise ProbeError(f"{path} has no known format; allowed: {', '.join(KINDS)}, all but parquet also with .gz")

    @classmethod
    def find(cls, patterns: Sequence[str]) -> list[InputFile]:
        """Return the files that paths and patterns such as `rows/*.parquet` match, each once."""
        paths: dict[Path, Path] = {}
        for pattern in patterns:
            found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
            found = [Path(name) for name in found if os.path.isfile(name)]
            if not found:
                raise ProbeError(f"there is no file {pattern}: give files or patterns, such as 'rows/*.parquet'")
            for path in found:
                paths.setdefault(path.resolve(), path)
        return list(map(cls, paths.values()))

    def identity(self) -> dict[str, Any]:
        """Return path, size in bytes and time of the last change, to recognise the file by."""
        status = self.path.stat()
        return {"path": str(self.path), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}

    def rows(self) -> int | None:
        """Return the number of rows of a parquet file, None for other formats."""
        if self.kind != "parquet":
            return None
        import pyarrow.parquet as pq

        with _reading(self.path):
            return pq.read_metadata(self.path).num_rows

    def fields(self, max_text: int = MAX_TEXT) -> dict[str, pa.DataType]:
        """Return names and types of the columns. The types of JSON come from the first 1,000 rows.

        Raises:
            ProbeError: the file cannot be read, a column is there twice, or a row is larger than 64 texts of `max_text`.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        meter = _Meter(self.path, "a row", max_text * _CHUNK_TEXTS)
        with _reading(self.path):
            if self.kind == "parquet":
                schema = pq.read_schema(self.path)
                return dict(zip(self._check_names(schema.names), schema.types, strict=True))
            if self.kind == "json":
                first = takewhile(lambda _: meter.used < meter.limit / 2, self._rows(meter))
                return {
                    name: _infer_type(values) for name, values in by_column(list(islice(first, _TYPED_ROWS))).items()
                }
            with self._open() as file:
                return dict.fromkeys(self._check_names(next(self._records(meter.lines(file)), [])), pa.string())

    def read(self, max_text: int = MAX_TEXT) -> list[dict[str, Any]]:
        """Return all rows, with their values by column name.

        Raises:
            ProbeError: the file is damaged, not in UTF-8, has a column twice, or unpacks to more than 512 texts of `max_text`
                characters.
        """
        meter = _Meter(self.path, "it", max_text * _FILE_TEXTS)
        meter.add((self.rows() or 0) * _ROW_COST)
        found = []
        for row in self._rows(meter):
            found.append(row)
            if self.kind != "parquet":
                meter.add(_ROW_COST)
        return found

    def chunks(
        self, columns: Sequence[str], size: int, wanted: Callable[[int], bool], max_text: int = MAX_TEXT
    ) -> Iterator[Chunk]:
        """Yield the chunks of `size` rows whose numbers are wanted, one at a time. The last may have fewer rows.

        A chunk may unpack to 64 texts of `max_text` characters.

        Raises:
            ProbeError: the file cannot be read, or a text or a chunk is too large.
        """
        meter = _Meter(self.path, "a chunk of rows", max_text * _CHUNK_TEXTS)
        step = max(step for step in range(1, _STEP + 1) if size % step == 0)
        rows = self._rows(meter, list(columns), step)
        for number in count():
            if not (block := list(islice(rows, size))):
                return
            if wanted(number):
                chunk = Chunk(number, number * size, {name: [row.get(name) for row in block] for name in columns})
                for name, values in chunk.columns.items():
                    for row, value in enumerate(values, start=chunk.first_row):
                        check_length(f"{self.path}: row {row}: {name}", value, max_text)
                yield chunk
            meter.used = 0

    def _rows(self, meter: _Meter, columns: list[str] | None = None, step: int = _STEP) -> Iterator[dict[str, Any]]:
        """Yield the rows. Of a parquet file only `columns` are read, `step` rows at a time."""
        with _reading(self.path):
            if self.kind != "parquet":
                with self._open() as file:
                    yield from (self._objects if self.kind == "json" else self._cells)(meter.lines(file))
                return
            import pyarrow.parquet as pq

            with pq.ParquetFile(self.path, pre_buffer=False) as file:
                self._check_names(file.schema_arrow.names)
                for batch in file.iter_batches(step, columns=columns):
                    # A dictionary repeats its values in the rows.
                    decoded = (c.dictionary_decode() if hasattr(c, "dictionary_decode") else c for c in batch.columns)
                    meter.add(sum(column.nbytes for column in decoded))
                    yield from batch.to_pylist()

    def _objects(self, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
        lines = filter(str.strip, lines)
        first = next(lines, None)
        if first is None:
            return
        if first.lstrip().startswith("["):
            rows = self._parse("its array", first + "".join(lines))
        else:
            rows = (self._parse(f"row {row}", line) for row, line in enumerate(chain([first], lines)))
        for row, value in enumerate(rows):
            if not isinstance(value, dict):
                raise ProbeError(f"{self.path}: row {row} must be a JSON object, not {type(value).__name__}")
            yield value

    def _parse(self, what: str, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ProbeError(f"{self.path}: {what} is not JSON: {error}") from None

    def _cells(self, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
        records = self._records(lines)
        header = self._check_names(next(records, []))
        for row, record in enumerate(records):
            if any(record[len(header) :]):
                raise ProbeError(f"{self.path}: row {row} has more cells than the header: put its text into quotes")
            yield dict(zip(header, record, strict=False))

    def _records(self, lines: Iterable[str]) -> Iterator[list[str]]:
        csv.field_size_limit(sys.maxsize)
        return filter(None, csv.reader(lines, delimiter="\t" if self.kind == "tsv" else ","))

    def _open(self):
        opener = gzip.open if self.path.suffix == ".gz" else open
        return opener(self.path, "rt", encoding="utf-8-sig", newline=None if self.kind == "json" else "")

    def _check_names(self, names: Sequence[str]) -> Sequence[str]:
        for name, times in Counter(filter(None, names)).items():
            if times > 1:
                raise ProbeError(f"{self.path} has {times} columns {name!r}: leave one")
        return names


def by_column(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of rows by column name, None where a row has none."""
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(chain.from_iterable(rows))}


class _Meter:
    """Counts the characters that are read into memory, and raises if they are too many. `used` may be set back to 0."""

    def __init__(self, path: Path, what: str, limit: int):
        self.path, self.what, self.limit, self.used = path, what, limit, 0

    def add(self, characters: int) -> None:
        self.used += characters
        if self.used > self.limit:
            limit = f"{self.limit:,} characters; max_text (--max-text) raises it"
            raise ProbeError(f"{self.path}: {self.what} has more than {limit}")

    def lines(self, file: TextIO) -> Iterator[str]:
        """Yield the lines of a file; none longer than the limit is read."""
        while line := file.readline(self.limit + 1):
            self.add(len(line))
            yield line


def check_length(name: str, value: Any, max_text: int = MAX_TEXT) -> None:
    """Raise `ProbeError` if a text, or all texts of chat messages together, have more than `max_text` characters."""
    length, left = 0, [value]
    while left and length <= max_text:
        item = left.pop()
        if isinstance(item, str):
            length += len(item)
        elif isinstance(item, (list, dict)):
            left += item if isinstance(item, list) else item.values()
    if length > max_text:
        raise ProbeError(f"{name} has more than {max_text:,} characters: cut it, or raise max_text (--max-text)")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the errors that readers raise for damaged files into `ProbeError`."""
    try:
        yield
    except ProbeError:
        raise
    # pyarrow raises NotImplementedError for parquet files that it cannot read.
    except (OSError, EOFError, ValueError, NotImplementedError, csv.Error, zlib.error) as error:
        advice = ": save it in UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise ProbeError(f"{path} cannot be read: {first_line(error)}{advice}") from error


def _infer_type(values: list[Any]) -> pa.DataType:
    import pyarrow as pa

    try:
        kind = pa.array(values).type
    except (pa.ArrowException, UnicodeError, OverflowError):  # mixed types, lone surrogates, large numbers
        return pa.string()
    return pa.string() if pa.types.is_null(kind) else kind
