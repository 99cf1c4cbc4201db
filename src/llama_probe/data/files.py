"""Files with any number of rows, read a chunk at a time: parquet, json lines and csv."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ProbeError


# What a file is, by its suffix.
KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
_SAVE_ANEW = "save the file in UTF-8, or as parquet"
_LONG_NUMBER = re.compile(r"\s*[+-]?\d{20,}\s*")  # as many digits as 64 bits hold, or more
_LOOKED_AT = 1000  # rows by which the types of the columns of json lines are told


def kind_of(path: Path) -> str | None:
    """What a file of rows is, one of `KINDS`, by its suffix, or by the one before `.gz`; `None` where it is none of them."""
    return KINDS.get(Path(path.stem).suffix if path.suffix == ".gz" else path.suffix)


@dataclass
class Chunk:
    """Rows that follow one another in a file.

    Attributes:
        number: from 0; all chunks but a file's last have the same number of rows.
        first_row: its place in the file.
        columns: values by name of those that were asked for; `None` where a row has none.
    """

    number: int
    first_row: int
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


@dataclass(frozen=True)
class InputFile:
    """A file of rows.

    Attributes:
        path: as it was given. kind: `parquet`, `json` (an object a line), `csv` or `tsv` (with a header, all values texts).
    """

    path: Path
    kind: str

    @classmethod
    def find(cls, patterns: Sequence[str]) -> list[InputFile]:
        """The files that paths and patterns such as `rows/*.parquet` stand for, each once.

        Raises:
            ProbeError: nothing is there, or a file is of another format.
        """
        paths: dict[Path, Path] = {}
        for pattern in patterns:
            found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
            found = [Path(name) for name in found if Path(name).is_file()]
            if not found:
                raise ProbeError(f"there is no file {pattern}: give files or patterns, such as 'rows/*.parquet'")
            for path in found:
                paths.setdefault(path.resolve(), path)
        files = []
        for path in paths.values():
            kind = kind_of(path)
            if kind is None or (kind == "parquet" and path.suffix != ".parquet"):
                raise ProbeError(
                    f"{path} is of no known format; allowed: {', '.join(KINDS)}, all but parquet also with .gz"
                )
            files.append(cls(path, kind))
        return files

    def identity(self) -> dict[str, Any]:
        """What tells that the file is still the same: path, bytes and time of the last change."""
        status = self.path.stat()
        return {"path": str(self.path), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}

    def rows(self) -> int | None:
        """How many there are, where the file says so without being read."""
        return pq.read_metadata(self.path).num_rows if self.kind == "parquet" else None

    def fields(self, needed: Sequence[str] = ()) -> dict[str, pa.DataType]:
        """Names and types of the columns: those of parquet files, texts for csv, told by the first rows for json lines.

        Raises:
            ProbeError: the file cannot be read, or has two columns of a name that is needed.
        """
        with self._mishaps():
            if self.kind == "parquet":
                schema = pq.read_schema(self.path)
                self._check_once(schema.names, needed)
                return dict(zip(schema.names, schema.types, strict=True))
            if self.kind == "json":
                with self._open() as lines:
                    rows = [self._parse(row, line) for row, line in enumerate(islice(_not_blank(lines), _LOOKED_AT))]
                names = dict.fromkeys(name for row in rows for name in row)
                return {name: _told_type([row.get(name) for row in rows]) for name in names}
            with self._open() as lines:
                header = next(self._records(lines), [])
            self._check_once(header, needed)
            return dict.fromkeys(header, pa.string())

    def long_numbers(self) -> set[str]:
        """The columns of a csv file that hold whole numbers of more than 64 bits, which no reader of numbers takes.

        Raises:
            ProbeError: the file cannot be read.
        """
        with self._mishaps(), self._open() as lines:
            records = self._records(lines)
            header = next(records, [])
            cells = (pair for record in records for pair in zip(header, record, strict=False))
            return {name for name, cell in cells if len(cell) > 19 and _LONG_NUMBER.fullmatch(cell)}

    def check_encoding(self) -> None:
        """Reads a file of lines to its end, which other readers do in blocks and with other words for what they cannot read.

        Raises:
            ProbeError: it is not in UTF-8, or cannot be read.
        """
        with self._mishaps(), self._opener(self.path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    raise ProbeError(f"{self.path}: line {number} is not in UTF-8 ({error}): {_SAVE_ANEW}") from None

    def _check_once(self, names: list[str], needed: Sequence[str]) -> None:
        for name in needed:
            if names.count(name) > 1:
                raise ProbeError(
                    f"{self.path} has {names.count(name)} columns {name!r}: leave one, or rename the others"
                )

    def chunks(self, columns: Sequence[str], size: int, wanted: Callable[[int], bool]) -> Iterator[Chunk]:
        """The chunks with the numbers that are wanted. No more rows are held than those of one, whatever the file's size.

        Args:
            columns: names; json lines that lack one have `None`.
            size: rows of a chunk.
            wanted: says of a number whether the chunk is to be read, the same each time.

        Raises:
            ProbeError: the file cannot be read.
        """
        with self._mishaps():
            yield from (self._parquet_chunks if self.kind == "parquet" else self._line_chunks)(columns, size, wanted)

    def _parquet_chunks(self, columns: Sequence[str], size: int, wanted: Callable[[int], bool]) -> Iterator[Chunk]:
        with pq.ParquetFile(self.path, pre_buffer=False) as file:
            position, pending = 0, []
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if not rows or not any(
                    wanted(number) for number in range(position // size, -(-(position + rows) // size))
                ):
                    position += rows
                    continue
                for batch in file.iter_batches(min(size, rows), [group], list(columns)):
                    start = 0
                    while start < len(batch):
                        number = position // size
                        taken = min(len(batch) - start, (number + 1) * size - position)
                        if wanted(number):
                            pending.append(batch.slice(start, taken))
                        start, position = start + taken, position + taken
                        if pending and (position % size == 0 or position == file.metadata.num_rows):
                            table = pa.Table.from_batches(pending)
                            pending = []
                            yield Chunk(number, number * size, {name: table[name].to_pylist() for name in columns})

    def _line_chunks(self, columns: Sequence[str], size: int, wanted: Callable[[int], bool]) -> Iterator[Chunk]:
        with self._open() as lines:
            records = _not_blank(lines) if self.kind == "json" else self._records(lines)
            header = None if self.kind == "json" else next(records, [])
            for number in count():
                block = list(islice(records, size))
                if not block:
                    return
                if not wanted(number):
                    continue
                first = number * size
                if header is None:
                    rows = [self._parse(first + i, line) for i, line in enumerate(block)]
                else:
                    rows = [dict(zip(header, record, strict=False)) for record in block]
                yield Chunk(number, first, {name: [row.get(name) for row in rows] for name in columns})

    def _open(self):
        newline = None if self.kind == "json" else ""
        return self._opener(self.path, "rt", encoding="utf-8-sig", newline=newline)

    @property
    def _opener(self) -> Callable:
        return gzip.open if self.path.suffix == ".gz" else open

    def _records(self, lines) -> Iterator[list[str]]:
        csv.field_size_limit(sys.maxsize)
        return filter(None, csv.reader(lines, delimiter="\t" if self.kind == "tsv" else ","))

    def _parse(self, row: int, line: str) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ProbeError(f"{self.path}: row {row} is no JSON: {error}") from None
        if not isinstance(value, dict):
            raise ProbeError(f"{self.path}: row {row} must be a JSON object, not {type(value).__name__}")
        return value

    def _mishaps(self):
        return _Mishaps(self.path)


class _Mishaps:
    """Turns what readers raise for damaged files into `ProbeError`."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, (OSError, UnicodeError, EOFError, csv.Error, pa.ArrowException)):
            hint = f": {_SAVE_ANEW}" if isinstance(error, UnicodeDecodeError) else ""
            raise ProbeError(f"{self.path} cannot be read: {str(error).splitlines()[0]}{hint}") from error


def _told_type(values: list[Any]) -> pa.DataType:
    try:
        kind = pa.array(values).type
    # Of several types, no texts that a file could hold, or numbers of more than 64 bits.
    except (pa.ArrowException, UnicodeError, OverflowError):
        return pa.string()
    return pa.string() if pa.types.is_null(kind) else kind


def _not_blank(lines: Iterator[str]) -> Iterator[str]:
    return (line for line in lines if not line.isspace())
