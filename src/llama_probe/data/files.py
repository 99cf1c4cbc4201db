"""Files with any number of rows, read a chunk at a time: parquet, JSON lines and csv."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ProbeError


if TYPE_CHECKING:
    import pyarrow as pa

# Suffix -> format.
KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
_TYPED_ROWS = 1000  # JSON lines that the types of columns are inferred from


def kind_of(path: Path) -> str | None:
    """Return the format of a file by its suffix, or by the one before `.gz`. None if it is not in `KINDS`."""
    return KINDS.get(Path(path.stem).suffix if path.suffix == ".gz" else path.suffix)


@dataclass
class Chunk:
    """Consecutive rows of a file.

    Attributes:
        number: index of the chunk. All chunks but a file's last have the same number of rows.
        first_row: index of the first row in the file.
        columns: values by column name. None where a row has no value.
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
        path: path as given.
        kind: `parquet`, `json` (an object a line), `csv` or `tsv` (with a header, all values are texts).
    """

    path: Path
    kind: str

    @classmethod
    def find(cls, patterns: Sequence[str]) -> list[InputFile]:
        """Return the files that paths and patterns such as `rows/*.parquet` match, each once.

        Raises:
            ProbeError: a pattern matches no file, or a file has another format.
        """
        paths: dict[Path, Path] = {}
        for pattern in patterns:
            found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
            found = [Path(name) for name in found if Path(name).is_file()]
            if not found:
                raise ProbeError(f"there is no file {pattern}: give files or patterns, such as 'rows/*.parquet'")
            for path in found:
                paths.setdefault(path.resolve(), path)
        for path in paths.values():
            if kind_of(path) is None or path.name.endswith(".parquet.gz"):
                raise ProbeError(
                    f"{path} has no known format; allowed: {', '.join(KINDS)}, all but parquet also with .gz"
                )
        return [cls(path, kind_of(path)) for path in paths.values()]

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

    def fields(self, needed: Sequence[str] = ()) -> dict[str, pa.DataType]:
        """Return names and types of the columns. The types of JSON lines come from the first 1,000 rows.

        Raises:
            ProbeError: the file cannot be read, or a needed column is there twice.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        with _reading(self.path):
            if self.kind == "json":
                rows = list(islice(self, _TYPED_ROWS))
                return {name: _infer_type([row.get(name) for row in rows]) for row in rows for name in row}
            if self.kind == "parquet":
                schema = pq.read_schema(self.path)
                names, types = schema.names, schema.types
            else:
                with self._open() as lines:
                    names = next(self._records(lines), [])
                types = [pa.string()] * len(names)
        for name in needed:
            if names.count(name) > 1:
                raise ProbeError(
                    f"{self.path} has {names.count(name)} columns {name!r}: leave one, or rename the others"
                )
        return dict(zip(names, types, strict=True))

    def check_encoding(self) -> None:
        """Raise `ProbeError` if a text file is damaged or not in UTF-8. Some JSON readers pass wrong bytes on."""
        with _reading(self.path), self._open() as lines:
            for _ in lines:
                pass

    def chunks(self, columns: Sequence[str], size: int, wanted: Callable[[int], bool]) -> Iterator[Chunk]:
        """Yield the wanted chunks. No more than one chunk is in memory.

        Args:
            columns: names of columns.
            size: rows of a chunk.
            wanted: tells for the number of a chunk if it is wanted.

        Raises:
            ProbeError: the file cannot be read.
        """
        with _reading(self.path):
            if self.kind == "parquet":
                import pyarrow.parquet as pq

                with pq.ParquetFile(self.path, pre_buffer=False) as file:
                    for number, batch in enumerate(file.iter_batches(size, columns=list(columns))):
                        if wanted(number):
                            yield Chunk(number, number * size, batch.to_pydict())
                return
            rows = iter(self)
            for number in count():
                block = list(islice(rows, size))
                if block and wanted(number):
                    yield Chunk(number, number * size, {name: [row.get(name) for row in block] for name in columns})
                if len(block) < size:
                    return

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of a text file.

        Raises:
            ProbeError: the file cannot be read.
        """
        with _reading(self.path), self._open() as lines:
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

    def _records(self, lines) -> Iterator[list[str]]:
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


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the errors that readers raise for damaged files into `ProbeError`."""
    try:
        yield
    except ProbeError:
        raise
    except (OSError, EOFError, ValueError, NotImplementedError, csv.Error, zlib.error) as error:
        advice = ": save it in UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise ProbeError(f"{path} cannot be read: {str(error).splitlines()[0]}{advice}") from error


def _infer_type(values: list[Any]) -> pa.DataType:
    import pyarrow as pa

    try:
        kind = pa.array(values).type
    except (pa.ArrowException, UnicodeError, OverflowError):  # mixed types, lone surrogates, large numbers
        return pa.string()
    return pa.string() if pa.types.is_null(kind) else kind
