"""Sources of labelled rows, as a recipe or a command names them."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ProbeError
from .files import KINDS, MAX_TEXT
from .known import BENCHMARKS, find_benchmark
from .tables import TablePlace
from .texts import LabelledTexts, Labels, read_labelled


ROWS_HELP = (
    f"a data set by name or NAME:SPLIT ({', '.join(BENCHMARKS)}), a csv, jsonl(.gz) or parquet file, a folder, or a Hub data set, "
    "ID@REVISION:CONFIGURATION:SPLIT or less of it"
)
SOURCE = "source"  # column of the rows of a recipe: the names of the sources that a row has words of

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")

# Licences that forbid commercial use, or grant nothing that one could name.
_NOT_COMMERCIAL = re.compile(r"\bnc\b|non-?commercial|research|educational|unknown|none|other", re.IGNORECASE)


def setting(default: Any, help: str, option: str | None = None) -> Any:
    """Declare a field of a dataclass that becomes an option of the command line.

    Args:
        default: the default, or a function that makes it.
        option: name of the option, if it is not that of the field.
    """
    given = {"default_factory" if callable(default) else "default": default}
    return field(**given, metadata={"help": help} | ({"option": option} if option else {}))


def allows_commercial_use(licence: str | None) -> bool:
    """Return True if a licence is known and does not forbid commercial use."""
    return licence is not None and _NOT_COMMERCIAL.search(licence) is None


@dataclass(kw_only=True)
class Source:
    """Rows of one source.

    With a folder of local copies, `FOLDER/NAME/SPLIT.jsonl.gz` (or another format) is read instead of the Hub. Its rows have the
    columns of the Hub, or the columns `text` and `label`.

    Attributes:
        rows: a data set known by name (`NAME` or `NAME:SPLIT`), a file or folder, or a Hub data set
            (`ID@REVISION:CONFIGURATION:SPLIT`, or less of it).
        name: name in tables and in a folder of copies. Defaults to the last part of `rows`.
        text_column, label_column: columns of rows that are not known by name.
        prompt_column: column of the prompts, if the texts are replies to them.
        label: label of every row, which then need no label column.
        label_map: value of the label column -> label; None leaves the rows out.
        where: column -> the values that its rows may have.
        part: take the texts whose hash is in this part of [0, 1]. The same text is always in the same part.
        licence: licence of the rows. Defaults to that of a data set known by name.
        licence_column: column with the licence of each row.
        note: origin and licence in a sentence, for the card.
        max_rows: rows at most, drawn at random.
        repeat: learn each row so many times an epoch.
        weights: weights of its rows in the loss; the members of a head of several use them in turn. Defaults to 1.
        extra: learn from the rows, and choose and measure nothing by them: none is held back.
        local: fields that differ in a folder of local copies.

    Raises:
        ProbeError: a value is not allowed, or a file does not exist.
    """

    rows: str
    name: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    prompt_column: str | None = None
    label: str | list[str] | None = None
    label_map: dict[Any, str | list[str] | None] | None = None
    where: dict[str, list[Any]] | None = None
    part: list[float | int] | None = None
    licence: str | None = None
    licence_column: str | None = None
    note: str | None = None
    max_rows: int | None = None
    repeat: int = 1
    weights: list[float | int] | None = None
    extra: bool = False
    local: dict[str, Any] | None = None

    def __post_init__(self):
        if not isinstance(self.rows, str):
            raise ProbeError(f"rows={self.rows!r} must name a data set, a file or a Hub data set")
        benchmark = find_benchmark(self.rows)
        if benchmark is not None:
            self.licence = self.licence or benchmark[0].license
            self.note = self.note or benchmark[0].note
            if (self.text_column, self.label_column) != ("text", "label"):
                raise ProbeError(f"text_column, label_column and prompt_column are for files, not for {self.rows}")
            if self.prompt_column is not None:
                if benchmark[0].exchange is None:
                    raise ProbeError(f"text_column, label_column, prompt_column are for files, not for {self.rows}")
                self.prompt_column = benchmark[0].exchange[0]
        for name in ("max_rows", "repeat"):
            if (value := getattr(self, name)) is not None and not (isinstance(value, int) and value >= 1):
                raise ProbeError(f"{name}={value} must be a whole number from 1")
        if self.part is not None and not (len(self.part) == 2 and 0 <= self.part[0] < self.part[1] <= 1):
            raise ProbeError(f"part={self.part} must be two numbers, from 0 to 1, the first one smaller")
        if self.weights is not None and (min(self.weights) < 0 or not 0 < sum(self.weights) < float("inf")):
            raise ProbeError(f"weights={self.weights} must be at least 0, and not all 0")
        for name in ("label_map", "where", "local"):
            if not isinstance(value := getattr(self, name), (dict, type(None))):
                raise ProbeError(f"{name}={value!r} must be a mapping")
        if self.label_map is not None:
            self.label_map = {str(value): label for value, label in self.label_map.items()}
        if self.where is not None:
            self.where = {name: value if isinstance(value, list) else [value] for name, value in self.where.items()}
        if self.local is not None:
            replace(self, **self.local, local=None)  # raises
        if self.name is None:
            self.name = self.rows.partition(":")[0] if benchmark else _short_name(self.rows)

    def find(self, data_dir: str | os.PathLike | None = None) -> Source:
        """Return the source with the place of its rows: a local copy, if there is a folder of copies.

        Raises:
            ProbeError: there is no such file, and it cannot be a Hub data set.
        """
        if data_dir is not None and self.local is not None:
            return replace(self, **self.local, local=None, name=self.name).find(data_dir)
        if find_benchmark(self.rows) is not None or os.path.exists(self.rows):
            return self
        place = TablePlace.parse(self.rows)
        split = place.split or "train"
        copy_name = f"{_short_name(place.id)}/{split}.jsonl.gz"
        if data_dir is None:
            if not _HUB_ID.fullmatch(place.id):
                raise ProbeError(f"{self.rows!r} is not on the Hub: --data-dir DIR must have {copy_name}")
            return self
        for path in (Path(data_dir) / _short_name(place.id) / split, Path(data_dir) / _short_name(place.id)):
            for suffix in (ending + zipped for ending in KINDS for zipped in ("", ".gz")):
                if (file := path.with_name(path.name + suffix)).is_file():
                    return replace(self, rows=str(file), name=self.name)
        raise ProbeError(f"{self.name}: there is no {Path(data_dir) / copy_name}")

    def read(
        self,
        labels: Labels | None = None,
        data_dir: str | os.PathLike | None = None,
        split: str = "train",
        seed: int = 0,
        max_text: int = MAX_TEXT,
        commercial: bool = False,
    ) -> LabelledTexts:
        """Return the rows, with the columns of the source and the column `source`.

        Args:
            labels: what the labels are. Defaults to what the source itself says.
            data_dir: folder of local copies.
            split: split to read, if `rows` names none.
            seed: seed of the rows that are drawn.
            max_text: characters of the longest text.
            commercial: leave out the rows whose licence forbids commercial use, or is not known.

        Raises:
            ProbeError: the source cannot be read, or a row does not have a label of `labels`.
        """
        place, labels = self.find(data_dir), labels or Labels()
        if commercial and place.licence_column is None and not allows_commercial_use(place.licence):
            return LabelledTexts.none(labels)
        rows = read_labelled(
            place.rows,
            place.text_column,
            place.label_column,
            labels.names,
            labels.problem_type,
            split,
            data_dir,
            place.prompt_column,
            max_text,
            label_of_all=place.label,
            label_map=place.label_map,
            where=place.where,
            skip_empty=not os.path.exists(self.rows),
        )
        keep = range(len(rows))
        if place.part is not None:
            keep = [row for row in keep if place.part[0] <= _hash_of(rows.texts[row]) < place.part[1]]
        if commercial and (column := place.licence_column) is not None:
            if column not in rows.columns:
                raise ProbeError(
                    f"{self.name} has no column {column!r} with licences; it has: {', '.join(rows.columns)}"
                )
            keep = [row for row in keep if allows_commercial_use(rows.columns[column][row])]
        rows = (rows if len(keep) == len(rows) else rows.select(list(keep))).at_most(self.max_rows, seed)
        return replace(rows, columns=rows.columns | {SOURCE: [self.name] * len(rows)})


def _short_name(rows: str) -> str:
    place = TablePlace.parse(rows) if not os.path.exists(rows) else TablePlace(rows)
    return (
        re.sub(r"(\.\w+)?(\.gz)?$", "", Path(place.id).name)
        if Path(place.id).suffix in (*KINDS, ".gz")
        else Path(place.id).name
    )


def _hash_of(text: Any) -> float:
    """Return a number from 0 to 1 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(str(text).encode()).digest()[:6]) / 2**48
