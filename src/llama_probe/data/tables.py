"""Tables of rows: a file, a folder of files, or a Hub data set."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ProbeError
from ..hub.card import read_card
from ..hub.folder import CARD_NAME
from ..hub.publish import check_links
from .files import MAX_TEXT, InputFile, kind_of
from .known import BENCHMARKS


if TYPE_CHECKING:
    from datasets import Dataset

# Words such as None and NA may be labels. One chunk lets all rows decide the type of a column.
_CSV = {"keep_default_na": False, "na_values": [""], "chunksize": 2**31 - 1}
_PLACE = re.compile(r"([^:@]+)(?:@([^:]+))?(?::([^:]*)(?::([^:]+))?)?")


@dataclass(frozen=True)
class TablePlace:
    """Rows named in one word: a path, or a Hub data set as `ID[@REVISION][:CONFIGURATION[:SPLIT]]`.

    A folder may have a configuration and a split as well. `ID::SPLIT` is a split of the default configuration. The split
    overrides the one that a reader asks for.
    """

    id: str
    revision: str | None = None
    configuration: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, source: str) -> TablePlace:
        """Parse a source. An existing path is taken as it is.

        Raises:
            ProbeError: it is blank, a file that does not exist, or a file or folder with a revision or split behind it.
        """
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
    source: str,
    split: str = "train",
    text_columns: Sequence[str] = (),
    needed: Sequence[str] = (),
    max_text: int = MAX_TEXT,
) -> Dataset:
    """Read a csv, json(l) or parquet file (also .gz), a folder of such files, or a Hub data set.

    Args:
        source: see `TablePlace`.
        split: split of a folder or a Hub data set, if `source` names none.
        text_columns: columns whose csv cells stay texts: `007` is not a number there.
        needed: further columns that a csv file must not have twice.
        max_text: see `InputFile.check_whole`.

    Raises:
        ProbeError: the source cannot be read or is too large, a column is there twice, or a folder names files outside it.
    """
    import datasets

    place = TablePlace.parse(source)
    path, split = Path(place.id), place.split or split
    try:
        if os.path.isfile(path):
            options = _file_options([path], text_columns, needed, max_text)
            kind = kind_of(path)
            if kind == "tsv":
                kind, options["sep"] = "csv", "\t"
            return datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train", **options)
        location, options = place.id, {}
        if os.path.isdir(path):
            location = str(path.resolve())  # The loader names rows by the folder, and `.` has no name.
            _check_card(Path(location))
            builder = datasets.load_dataset_builder(location, place.configuration)
            files = [Path(name) for part in (builder.config.data_files or {}).values() for name in part]
            check_links(Path(location), map(str, files))
            options = _file_options(files, text_columns, needed, max_text)
        data = datasets.load_dataset(location, place.configuration, revision=place.revision, **options)
    except ProbeError:
        raise
    except Exception as error:  # The loaders raise dozens of types for bad input.
        words = reason(error)
        if any(part in words for part in ("StopIteration", "corresponds to no data", "No columns to parse")):
            raise ProbeError(f"{source} holds no rows") from error
        if "int too large" in words:
            raise ProbeError(
                f"{source} has a number of more than 64 bits: give it as a text, in jsonl or parquet"
            ) from error
        known = "" if "/" in place.id else f" (data sets known by name: {', '.join(BENCHMARKS)})"
        raise ProbeError(f"{source} cannot be read as a file, a folder or a Hub data set: {words}{known}") from error
    if split not in data:
        raise ProbeError(f"{source} has no split {split!r}; it has: {', '.join(data)}")
    return data[split]


def reason(error: BaseException) -> str:
    """Return the message of the first cause of a loader's error, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or repr(error)


def _check_card(folder: Path) -> None:
    """Check that the card of a data folder names files inside it, before the loader asks for others."""
    if (other := folder / ".huggingface.yaml").exists():
        raise ProbeError(f"{other} is not read: put its configurations into {CARD_NAME}")
    if not (folder / CARD_NAME).is_file():
        return
    configs = read_card(folder).data.to_dict().get("configs")
    for config in configs if isinstance(configs, list) else []:
        if isinstance(config, dict):
            for name in _texts([config.get("data_files"), config.get("data_dir")]):
                if ":" in name or Path(name).is_absolute() or ".." in Path(name).parts:
                    raise ProbeError(f"{folder / CARD_NAME} names {name!r}: rows must come from inside the folder")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value if isinstance(value, list) else value.values():
            yield from _texts(item)


def _file_options(
    files: Sequence[Path], text_columns: Sequence[str], needed: Sequence[str], max_text: int
) -> dict[str, Any]:
    """Check local files, and return the options of `load_dataset` for them."""
    # The loader caches by path and time of change alone: a digest of the contents tells files apart.
    digest, is_csv = hashlib.sha256(), False
    for source in map(InputFile, files):
        with source.path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        source.check_whole(max_text)
        if is_csv := source.kind in ("csv", "tsv"):
            source.fields([*text_columns, *needed])
    csv_options = {**_CSV, "converters": dict.fromkeys(text_columns, str)} if is_csv else {}
    return {"description": digest.hexdigest(), **csv_options}
