"""Tables of rows: of a file, of a folder of files, or of a Hub data set."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder

from .errors import ProbeError
from .input_files import InputFile
from .known_data import BENCHMARKS


FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}

_FILE = (
    "Rows of another configuration, revision or split than a command reads come from a file: "
    "load_dataset(ID, CONFIGURATION, split=..., revision=...).to_parquet('rows.parquet'), then give rows.parquet"
)

# Else words such as None and NA, which may be labels, are nothing, and the first 10,000 rows alone say what a column holds.
_CSV = {"keep_default_na": False, "na_values": [""], "chunksize": 2**31 - 1}


def read_table(
    source: str, split: str = "train", text_columns: Sequence[str] = (), needed: Sequence[str] = ()
) -> Dataset:
    """Rows of a csv, json(l) or parquet file (also .gz), of a folder of such files, or of a Hub data set.

    Args:
        text_columns: whose cells a csv file holds as they are: `007` is a text there, and no number.
        needed: further columns; a csv file may have no two that are called so.

    Raises:
        ProbeError: there is nothing to read, or it is not clear which of two columns is meant.
    """
    path = Path(source)
    try:
        if path.is_file():
            suffix = next((s for s in reversed(path.suffixes) if s in FORMATS), None)
            if suffix is None:
                raise ProbeError(f"{path} is of no known format; allowed: {', '.join(FORMATS)}, each also with .gz")
            options: dict[str, Any] = {"sep": "\t"} if suffix == ".tsv" else {}
            if FORMATS[suffix] == "csv":
                options |= _csv_options([path], text_columns, needed)
            _check_encoding([path])
            options |= {"data_files": glob.escape(str(path)), "description": _digest([path])}
            return load_dataset(FORMATS[suffix], split="train", **options)
        options = {}
        if path.suffix in FORMATS and not path.exists():
            raise ProbeError(f"there is no file {path}")
        if path.is_dir():
            if "[" in str(path.resolve()):  # which the loader takes for the beginning of a pattern
                raise ProbeError(
                    f"{path.resolve()}: a folder of rows must have no [ in its path: rename it, or name a file"
                )
            config = load_dataset_builder(source).config
            files = [Path(name) for part in (config.data_files or {}).values() for name in part]
            if hasattr(config, "keep_default_na"):
                options = _csv_options(files, text_columns, needed)
            _check_encoding(files)
            options["description"] = _digest(files)
        data = load_dataset(source, split=None, **options)
    except ProbeError:
        raise
    except Exception as error:  # the loaders raise dozens of types for bad input
        if any(words in reason(error) for words in ("StopIteration", "corresponds to no data", "No columns to parse")):
            raise ProbeError(f"{source} holds no rows") from error
        if configurations := re.search(r"available configs: \[(.*)\]", str(error)):
            raise ProbeError(
                f"{source} has several configurations ({configurations[1]}) and no default. {_FILE}"
            ) from error
        if re.match(r"[\w.-]+/[\w.-]+[:@]", source):
            raise ProbeError(f"{source}: a Hub data set is named by its id alone, user/name. {_FILE}") from error
        message = f"{source} cannot be read as a file, a folder or a Hub data set: {reason(error)}"
        if "/" not in source:
            message += f" (data sets known by name: {', '.join(BENCHMARKS)})"
        raise ProbeError(message) from error
    if isinstance(data, DatasetDict):
        if split not in data:
            raise ProbeError(f"{source} has no split {split!r}; it has: {', '.join(data)}")
        data = data[split]
    return data


def reason(error: BaseException) -> str:
    """What a loader has to say, on one line."""
    while error.__cause__ is not None:  # datasets wraps what a reader says into what says nothing
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)


def _csv_options(files: Sequence[Path], text_columns: Sequence[str], needed: Sequence[str]) -> dict[str, Any]:
    for file in files:  # pandas would call the second of two columns `text.1`, and nobody would know
        if file.suffix in (".csv", ".tsv", ".gz"):
            InputFile(file, "tsv" if ".tsv" in file.suffixes else "csv").fields([*text_columns, *needed])
    return {**_CSV, "converters": dict.fromkeys(text_columns, str)}


def _check_encoding(files: Sequence[Path]) -> None:
    for file in files:
        if suffix := next((s for s in reversed(file.suffixes) if s in FORMATS and s != ".parquet"), None):
            InputFile(file, FORMATS[suffix]).check_encoding()


def _digest(files: Sequence[Path]) -> str:
    """Of what the files hold: by path and time of change alone, the cache of `datasets` gives the rows of another file."""
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()
