"""Tables of rows: of a file, of a folder of files, or of a Hub data set."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder

from ..errors import ProbeError
from .files import KINDS, InputFile, kind_of
from .known import BENCHMARKS


# Else words such as None and NA, which may be labels, are nothing, and the first 10,000 rows alone say what a column holds.
_CSV = {"keep_default_na": False, "na_values": [""], "chunksize": 2**31 - 1}


@dataclass(frozen=True)
class TablePlace:
    """Where rows lie, in one word: a path, or a Hub data set as `ID[@REVISION][:CONFIGURATION[:SPLIT]]`; a folder has the last two, too.

    Attributes:
        id: a path, or `user/name`.
        revision: a branch, tag or commit.
        configuration: of a data set that has several; `None` the default one, also where it is left empty (`ID::SPLIT`).
        split: to be read, whatever the rows are for.
    """

    id: str
    revision: str | None = None
    configuration: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, source: str) -> TablePlace:
        """An existing path is one, whatever its name."""
        match = None if Path(source).exists() else _PLACE.fullmatch(source)
        return cls(source) if match is None else cls(*(part or None for part in match.groups()))


_PLACE = re.compile(r"([^:@]+)(?:@([^:]+))?(?::([^:]*)(?::([^:]+))?)?")


def read_table(
    source: str, split: str = "train", text_columns: Sequence[str] = (), needed: Sequence[str] = ()
) -> Dataset:
    """Rows of a csv, json(l) or parquet file (also .gz), of a folder of such files, or of a Hub data set.

    Args:
        source: see `TablePlace`.
        split: of a folder or a Hub data set, where `source` names none.
        text_columns: whose cells a csv file holds as they are: `007` is a text there, and no number.
        needed: further columns; a csv file may have no two that are called so.

    Raises:
        ProbeError: there is nothing to read, or it is not clear which of two columns is meant.
    """
    if not source.strip():  # which pathlib takes for the folder that one is in
        raise ProbeError(f"{source!r} names no rows: give a file, a folder or a Hub data set")
    place = TablePlace.parse(source)
    path, split = Path(place.id), place.split or split
    try:
        # The loader calls rows by the last part of a folder's path, and `.` has none.
        location = str(path.resolve()) if path.is_dir() else place.id
        if path.is_file():
            if place.id != source:
                raise ProbeError(
                    f"{source}: {path} is a file, all of which is read: leave {source[len(place.id) :]} out"
                )
            kind = kind_of(path)
            if kind is None:
                raise ProbeError(f"{path} is of no known format; allowed: {', '.join(KINDS)}, each also with .gz")
            options: dict[str, Any] = {}
            _check_encoding([path])
            if kind in ("csv", "tsv"):
                options = _csv_options([path], text_columns, needed)
            if kind == "tsv":
                kind, options["sep"] = "csv", "\t"
            options |= {"data_files": glob.escape(str(path)), "description": _digest([path])}
            return load_dataset(kind, split="train", **options)
        options = {}
        if kind_of(path) and not path.exists():
            raise ProbeError(f"there is no file {path}")
        if path.is_dir():
            if "[" in location:  # which the loader takes for the beginning of a pattern
                raise ProbeError(f"{location}: a folder of rows must have no [ in its path: rename it, or name a file")
            if place.revision is not None:
                raise ProbeError(f"{source}: {path} is a folder, and has no revisions: leave @{place.revision} out")
            config = load_dataset_builder(location, place.configuration).config
            files = [Path(name) for part in (config.data_files or {}).values() for name in part]
            _check_encoding(files)
            if hasattr(config, "keep_default_na"):
                options = _csv_options(files, text_columns, needed)
            options["description"] = _digest(files)
        data = load_dataset(location, place.configuration, split=None, revision=place.revision, **options)
    except ProbeError:
        raise
    except Exception as error:  # the loaders raise dozens of types for bad input
        if any(words in reason(error) for words in ("StopIteration", "corresponds to no data", "No columns to parse")):
            raise ProbeError(f"{source} holds no rows") from error
        if configurations := re.search(r"(available configs|Available): \[(.*)\]", str(error)):
            missing = (
                f"no configuration {place.configuration!r}" if place.configuration else "no default configuration"
            )
            there = configurations[2].replace("'", "")
            raise ProbeError(
                f"{place.id} has {missing}; it has: {there}. Name one: {place.id}:CONFIGURATION, or "
                f"{place.id}:CONFIGURATION:SPLIT"
            ) from error
        message = f"{source} cannot be read as a file, a folder or a Hub data set: {reason(error)}"
        if "/" not in place.id:
            message += f" (data sets known by name: {', '.join(BENCHMARKS)})"
        raise ProbeError(message) from error
    if isinstance(data, DatasetDict):
        if split not in data:
            raise ProbeError(
                f"{source} has no split {split!r}; it has: {', '.join(data)}. {place.id}:{place.configuration or ''}:SPLIT names one"
            )
        data = data[split]
    return data


def reason(error: BaseException) -> str:
    """What a loader has to say, on one line."""
    while error.__cause__ is not None:  # datasets wraps what a reader says into what says nothing
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)


def _csv_options(files: Sequence[Path], text_columns: Sequence[str], needed: Sequence[str]) -> dict[str, Any]:
    texts = set(text_columns)
    for file in files:  # pandas would call the second of two columns `text.1`, and nobody would know
        if (kind := kind_of(file)) in ("csv", "tsv"):
            InputFile(file, kind).fields([*text_columns, *needed])
            texts |= InputFile(file, kind).long_numbers()
    return {**_CSV, "converters": dict.fromkeys(sorted(texts), str)}


def _check_encoding(files: Sequence[Path]) -> None:
    for file in files:
        if (kind := kind_of(file)) not in (None, "parquet"):
            InputFile(file, kind).check_encoding()


def _digest(files: Sequence[Path]) -> str:
    """Of what the files hold: by path and time of change alone, the cache of `datasets` gives the rows of another file."""
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()
