"""Files with any number of rows, read a chunk at a time: parquet, JSON lines and csv."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import ProbeError


if TYPE_CHECKING:
    import pyarrow as pa

# Suffix -> format.
KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
_TYPED_ROWS = 1000  # JSON lines that the types of columns are inferred from

# A small file can unpack to any size, and a tokenizer takes about 400 bytes of memory a character.
MAX_TEXT = 500_000  # characters of one text
# So many texts of the largest size may be in memory as a chunk, and as a whole file.
_CHUNK_TEXTS, _FILE_TEXTS = 64, 512
_ROW_COST = 100  # characters that a row counts as beside its text
_STEP = 64  # rows of a parquet file that are decoded before they are measured


def kind_of(path: Path) -> str | None:
    """Return the format of a file by its suffix, or by the one before `.gz`. None if it is not in `KINDS`."""
    kind = KINDS.get(Path(path.stem).suffix if path.suffix == ".gz" else path.suffix)
    return None if path.suffix == ".gz" and kind == "parquet" else kind


@dataclass
class Chunk:
    """Consecutive rows of a file: `columns` holds their values by column name, None where a row has no value.

    All chunks but a file's last have the same number of rows.
    """

    number: int
    first_row: int
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


class InputFile:
    """A file of rows: `parquet`, `json` (an object a line), `csv` or `tsv` (with a header, all values are texts).

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

    def fields(self, needed: Sequence[str] = (), max_text: int = MAX_TEXT) -> dict[str, pa.DataType]:
        """Return names and types of the columns. The types of JSON lines come from the first 1,000 rows.

        Raises:
            ProbeError: the file cannot be read, a needed column is there twice, or a row is larger than 64 texts of `max_text`.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        with _reading(self.path):
            meter = _Meter(self.path, "a row", max_text, _CHUNK_TEXTS)
            if self.kind == "json":
                first = takewhile(lambda _: meter.used < meter.limit / 2, self._rows(meter))
                rows = list(islice(first, _TYPED_ROWS))
                return {name: _infer_type([row.get(name) for row in rows]) for row in rows for name in row}
            if self.kind == "parquet":
                schema = pq.read_schema(self.path)
                names, types = schema.names, schema.types
            else:
                with self._open() as file:
                    names = next(self._records(meter.lines(file)), [])
                types = [pa.string()] * len(names)
        for name in needed:
            if names.count(name) > 1:
                raise ProbeError(f"{self.path} has {names.count(name)} columns {name!r}: leave one")
        return dict(zip(names, types, strict=True))

    def check_whole(self, max_text: int = MAX_TEXT) -> None:
        """Check that a file is not damaged and can be held in memory.

        Raises:
            ProbeError: it is damaged, a text file is not in UTF-8 (some JSON readers pass wrong bytes on), or it unpacks to
                more than 512 texts of `max_text` characters.
        """
        meter = _Meter(self.path, "it", max_text, _FILE_TEXTS)
        with _reading(self.path):
            if self.kind == "parquet":
                import pyarrow.parquet as pq

                meter.add(self.rows() * _ROW_COST)
                with pq.ParquetFile(self.path, pre_buffer=False) as file:
                    for batch in file.iter_batches(_STEP):
                        meter.add(_unpacked(batch))
                return
            with self._open() as file:
                while piece := file.read(2**20):
                    meter.add(len(piece) + piece.count("\n") * _ROW_COST)

    def chunks(
        self, columns: Sequence[str], size: int, wanted: Callable[[int], bool], max_text: int = MAX_TEXT
    ) -> Iterator[Chunk]:
        """Yield the chunks of `size` rows whose numbers are wanted. No more than one is in memory.

        A chunk may unpack to 64 texts of `max_text` characters.

        Raises:
            ProbeError: the file cannot be read, or a text or a chunk is too large.
        """
        meter = _Meter(self.path, "a chunk of rows", max_text, _CHUNK_TEXTS)
        with _reading(self.path):
            blocks = self._parquet_blocks if self.kind == "parquet" else self._text_blocks
            for number, block in enumerate(blocks(columns, size, meter)):
                if wanted(number):
                    chunk = Chunk(number, number * size, block())
                    for name, values in chunk.columns.items():
                        for row, value in enumerate(values, start=chunk.first_row):
                            check_length(f"{self.path}: row {row}: {name}", value, max_text)
                    yield chunk
                meter.used = 0

    def _parquet_blocks(self, columns: Sequence[str], size: int, meter: _Meter) -> Iterator[Callable[[], dict]]:
        """Yield for each chunk a function that returns its values by column."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        def values(parts: list[pa.RecordBatch]) -> dict[str, list[Any]]:
            return pa.Table.from_batches(parts).to_pydict()

        with pq.ParquetFile(self.path, pre_buffer=False) as file:
            parts, rows = [], 0
            for batch in file.iter_batches(min(size, _STEP), columns=list(columns)):
                while len(batch):
                    parts.append(batch.slice(0, size - rows))
                    rows, batch = rows + len(parts[-1]), batch.slice(len(parts[-1]))
                    meter.add(_unpacked(parts[-1]))
                    if rows == size:
                        yield partial(values, parts)
                        parts, rows = [], 0
            if parts:
                yield partial(values, parts)

    def _text_blocks(self, columns: Sequence[str], size: int, meter: _Meter) -> Iterator[Callable[[], dict]]:
        rows = ({name: row.get(name) for name in columns} for row in self._rows(meter))
        while block := list(islice(rows, size)):
            yield partial(lambda block: {name: [row[name] for row in block] for name in columns}, block)

    def _rows(self, meter: _Meter) -> Iterator[dict[str, Any]]:
        with _reading(self.path), self._open() as file:
            lines = meter.lines(file)
            if self.kind == "json":
                for row, line in enumerate(line for line in lines if not line.isspace()):
                    yield self._parse(row, line)
            else:
                records = self._records(lines)
                header = next(records, [])
                yield from (dict(zip(header, record, strict=False)) for record in records)

    def _open(self):
        opener = gzip.open if self.path.suffix == ".gz" else open
        return opener(self.path, "rt", encoding="utf-8-sig", newline=None if self.kind == "json" else "")

    def _records(self, lines: Iterable[str]) -> Iterator[list[str]]:
        csv.field_size_limit(sys.maxsize)
        return filter(None, csv.reader(lines, delimiter="\t" if self.kind == "tsv" else ","))

    def _parse(self, row: int, line: str) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ProbeError(f"{self.path}: row {row} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ProbeError(f"{self.path}: row {row} must be a JSON object, not {type(value).__name__}")
        return value


def _unpacked(batch: pa.RecordBatch) -> int:
    """Return the bytes of a batch if each row has its own values."""
    columns = (c.dictionary_decode() if hasattr(c, "dictionary_decode") else c for c in batch.columns)
    return sum(column.nbytes for column in columns)


class _Meter:
    """Counts the characters that are read into memory, and raises if they are too many. `used` may be set back to 0."""

    def __init__(self, path: Path, what: str, max_text: int, texts: int):
        self.path, self.what, self.limit, self.used = path, what, max_text * texts, 0

    def add(self, characters: int) -> None:
        self.used += characters
        if self.used > self.limit:
            raise ProbeError(
                f"{self.path}: {self.what} has more than {self.limit:,} characters; max_text (--max-text) raises it"
            )

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
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ProbeError(f"{path} cannot be read: {reason}{advice}") from error


def _infer_type(values: list[Any]) -> pa.DataType:
    import pyarrow as pa

    try:
        kind = pa.array(values).type
    except (pa.ArrowException, UnicodeError, OverflowError):  # mixed types, lone surrogates, large numbers
        return pa.string()
    return pa.string() if pa.types.is_null(kind) else kind
