"""Sources of labelled rows, as a recipe or a command names them."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..errors import ProbeError
from ..files import JSON
from ..heads.rules import Rule, check_fields
from ..hub.card import is_hub_id
from .known import BENCHMARKS, Benchmark, find_benchmark
from .labelled_texts import LabelledTexts, Labels, is_empty, label_rows
from .prompts import Place, Text, as_chat
from .row_files import MAX_TEXT, Columns, find_column, kind_of, select_rows
from .tables import TablePlace, read_table


logger = logging.get_logger(__name__)

_COUNT: Rule = ("a whole number from 1", lambda value: value >= 1)
_RULES: dict[str, Rule] = {
    "max_rows": _COUNT,
    "repeat": _COUNT,
    "part": (
        "two numbers from 0 to 1, the first one smaller",
        lambda value: len(value) == 2 and 0 <= value[0] < value[1] <= 1,
    ),
    "weights": (
        "numbers from 0, not all 0",
        lambda value: min(value, default=0) >= 0 and 0 < sum(value) < math.inf,
    ),
}
ROWS_HELP = (
    f"a data set by name or NAME:SPLIT ({', '.join(BENCHMARKS)}), a csv, jsonl(.gz) or parquet file, a folder, or a Hub data set, "
    "ID@REVISION:CONFIGURATION:SPLIT or less of it"
)
OTHERS = "*"  # in `label_map`: all labels without an entry
SOURCE = "source"  # column of the rows of a recipe: the names of the sources of a row's words

# Matches licences that forbid commercial use, or that are not known.
_NOT_COMMERCIAL = re.compile(r"\bnc\b|non-?commercial|research|educational|unknown|none|other", re.IGNORECASE)


def allows_commercial_use(licence: str | None) -> bool:
    """Return True if a licence is known and does not forbid commercial use."""
    return licence is not None and _NOT_COMMERCIAL.search(licence) is None


@dataclass(kw_only=True)
class Source:
    """Rows of one source.

    With a folder of local copies, `FOLDER/NAME/SPLIT.jsonl.gz` (or another format) is read instead of the Hub. The rows of a copy
    have the columns of the Hub, or the columns `text` and `label`.

    Args:
        rows: data set known by name (`toxicchat:test`), file, folder (`FOLDER::SPLIT`), or Hub data set
            (`ID@REVISION:CONFIGURATION:SPLIT`, or less of it).
        name: name in tables and in `hold_out`. Defaults to the last part of `rows`.
        text_column: column of the texts.
        label_column: column of the labels.
        prompt_column: column of the prompts, if the texts are replies.
        request_column: column of the part of each text that gives the row its label, such as an instruction in the result of a
            tool. A head with windows learns where in a text this part stands.
        label: label of all rows; no label column is read. A list for several labels, `[]` for none.
        label_map: value of the label column: label. `null` leaves the rows out. `"*"` stands for all values that it does not name.
        known_labels: the labels of a head of several that the rows were labelled with. Nothing is learned of the other labels,
            or measured by them. Defaults to all.
        where: column: list of the values that its rows may have. `[null]` means no value.
        part: two numbers: texts whose hash is between these shares of all hashes. Parts that do not overlap share no text.
        licence: licence of the rows.
        licence_column: column with the licence of each row.
        note: origin and licence in a sentence, for the card.
        max_rows: rows at most, drawn at random.
        repeat: times that each row is learned in an epoch.
        weights: weights of the rows in the loss. Members of a `multimax` head use them in turn.
        extra: learn from the rows, but hold none of them back.
        local: fields that differ in local copies.
    """

    rows: str
    name: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    prompt_column: str | None = None
    request_column: str | None = None
    label: str | list[str] | None = None
    label_map: dict[Any, str | list[str] | None] | None = None
    known_labels: list[str] | None = None
    where: dict[str, list[Any]] | None = None
    part: list[float | int] | None = None
    licence: str | None = None
    licence_column: str | None = None
    note: str | None = None
    max_rows: int | None = None
    repeat: int = 1
    weights: list[float | int] | None = None
    extra: bool = False
    local: JSON | None = None

    def __post_init__(self):
        known = find_benchmark(self.rows)
        if known is not None:
            benchmark = known[0]
            self.licence = self.licence or benchmark.license
            self.note = self.note or benchmark.note
            self.name = self.name or benchmark.name
            prompts = benchmark.exchange[0] if benchmark.exchange else None
            if (self.text_column, self.label_column) != ("text", "label") or self.prompt_column not in (None, prompts):
                raise ProbeError(f"text_column, label_column and prompt_column are for files, not for {self.rows}")
        check_fields(self, _RULES)
        if self.label_map is not None:
            self.label_map = {str(value): label for value, label in self.label_map.items()}
        if self.local is not None:
            replace(self, **self.local, local=None)  # raises
        # An augmented row joins the names of its sources by a plus.
        self.name = self.name or _short_name(self.rows).replace("+", "_")

    def find(self, data_dir: str | os.PathLike | None = None, split: str = "train") -> Source:
        """Return the source with the place of its rows, which is a local copy of the split if there is a folder of copies."""
        if data_dir is not None and self.local is not None:
            return replace(self, **self.local | {"local": None, "name": self.name}).find(data_dir, split)
        if find_benchmark(self.rows) is not None:
            return self
        place = TablePlace.parse(self.rows)
        if os.path.exists(place.id):
            return self
        if data_dir is not None:
            copies = local_copies(_short_name(self.rows), data_dir)
            # On the Hub, "all" means all splits of a data set. A folder of copies may have no "all".
            split = place.split or ("train" if split == "all" and split not in copies else split)
            if split not in copies:
                raise ProbeError(f"{self.rows}: {data_dir} has no split {split!r}, but {', '.join(copies)}")
            return replace(self, rows=copies[split], name=self.name)
        if not is_hub_id(place.id):
            known = f"data sets known by name: {', '.join(BENCHMARKS)}; --data-dir reads DIR/{place.id}/SPLIT.jsonl.gz"
            raise ProbeError(f"{self.rows!r} is no file and no Hub id; {known}")
        return self

    def read(
        self,
        labels: Labels | None = None,
        data_dir: str | os.PathLike | None = None,
        split: str = "train",
        seed: int = 0,
        max_text: int = MAX_TEXT,
        not_commercial: Counter[str] | None = None,
    ) -> LabelledTexts:
        """Return the rows, with the columns of the source and the column `source`.

        Args:
            labels: the labels that rows may have. Defaults to the labels that the source itself names.
            split: split to read, if `rows` names none.
            not_commercial: if given, rows whose licence forbids commercial use, or is not known, are left out and counted here.
        """
        labels = labels or Labels()
        place = self.find(data_dir, split)
        columns, stated = place._read_columns(split, data_dir, max_text)
        columns = place._where(columns)
        if place.label is not None:
            stated = Labels()
            columns |= {place.label_column: [place.label] * len(find_column(place.rows, columns, place.text_column))}
        # An empty cell is an error in a user's own file. Public data sets have empty cells.
        if find_benchmark(self.rows) is not None or not os.path.exists(self.rows):
            columns = place._without_gaps(columns)
        if place.label_map is not None and place.label is None:
            columns = place._map_labels(columns, stated)
            stated = Labels()
        rows = label_rows(
            place.rows, columns, place.text_column, place.label_column, labels, stated, place.prompt_column, max_text
        )
        if place.request_column is not None:
            requests = find_column(place.rows, rows.columns, place.request_column)
            rows.places = list(map(_find_request, rows.texts, requests))
        if place.known_labels is not None:
            rows = rows.known_only(place.known_labels)
        if place.part is not None:
            low, high = place.part
            rows = rows.select([row for row, text in enumerate(rows.texts) if low <= _hash_of(text) < high])
        if not_commercial is not None:
            count = len(rows)
            licences = [place.licence] * count
            if place.licence_column is not None:
                licences = find_column(self.name, rows.columns, place.licence_column)
            rows = rows.select([row for row, licence in enumerate(licences) if allows_commercial_use(licence)])
            not_commercial[self.name] += count - len(rows)
        rows = rows.at_most(place.max_rows, seed)
        return replace(rows, columns=rows.columns | {SOURCE: [self.name] * len(rows)})

    def _read_columns(self, split: str, data_dir: str | os.PathLike | None, max_text: int) -> tuple[Columns, Labels]:
        """Return all columns, and the labels that the data names."""
        known = find_benchmark(self.rows)
        if known is None:
            texts = [name for name in (self.text_column, self.prompt_column) if name is not None]
            columns, names = read_table(self.rows, split, texts, max_text)
            return columns, Labels(names=names.get(self.label_column))
        benchmark, own_split = known
        split = own_split or split
        if os.path.exists(self.rows):
            logger.warning(f"{self.rows} is the data set known by that name; write ./{self.rows} for the path")
        places = benchmark_splits(benchmark, data_dir)
        if split not in places:
            raise ProbeError(f"{benchmark.name} has no split {split!r}; it has: {', '.join(places)}")
        columns, _ = read_table(places[split], text_columns=["text"], max_text=max_text)
        if data_dir is None or not {"text", "label"} <= columns.keys():
            columns = benchmark.convert(columns)
        if self.prompt_column is not None:
            columns["text"] = find_column(self.rows, columns, benchmark.exchange[1])
        return columns, Labels(names=benchmark.label_names, flagged=benchmark.flagged and [benchmark.flagged])

    def _where(self, columns: Columns) -> Columns:
        """Return the rows with the values of `where`."""
        for name, values in (self.where or {}).items():
            allowed = set(map(str, values))
            rows = [row for row, cell in enumerate(find_column(self.rows, columns, name)) if str(cell) in allowed]
            if not rows:
                raise ProbeError(f"{self.rows} has no rows where {name} is one of {values}")
            columns = select_rows(columns, rows)
        return columns

    def _without_gaps(self, columns: Columns) -> Columns:
        """Return the rows that have a text, a label and, if the texts are replies, a prompt."""
        names = [self.text_column, self.label_column]
        if self.prompt_column is not None:
            names.append(self.prompt_column)
        rows = list(zip(*(find_column(self.rows, columns, name) for name in names), strict=True))
        full = [row for row, cells in enumerate(rows) if not any(map(is_empty, cells))]
        if len(full) < len(rows):
            logger.warning(f"{len(rows) - len(full)} rows of {self.rows} without a text or a label are skipped")
        return select_rows(columns, full)

    def _map_labels(self, columns: Columns, stated: Labels) -> Columns:
        """Return the rows with the labels of `label_map`, without rows whose label becomes None.

        The entry of a label is that of the label as it is, or of its name if the data names its labels, or of `OTHERS`.
        """
        named = {str(index): name for index, name in enumerate(stated.names or ())}
        values = []
        for label in map(str, find_column(self.rows, columns, self.label_column)):
            value = next((key for key in (label, named.get(label), OTHERS) if key in self.label_map), None)
            if value is None:
                shown = named.get(label, label)
                raise ProbeError(f"{self.rows}: {shown!r} is not in label_map: {', '.join(self.label_map)}")
            values.append(self.label_map[value])
        mapped = columns | {self.label_column: values}
        return select_rows(mapped, [row for row, value in enumerate(values) if value is not None])


def benchmark_splits(benchmark: Benchmark, data_dir: str | os.PathLike | None) -> dict[str, str]:
    """Return the place of each split of a data set known by name: on the Hub, or with `data_dir` in `data_dir/NAME`."""
    if data_dir is not None:
        return local_copies(benchmark.name, data_dir)
    places = benchmark.splits.items()
    return {split: f"{benchmark.hub_id}:{configuration or ''}:{name}" for split, (name, configuration) in places}


def local_copies(name: str, data_dir: str | os.PathLike) -> dict[str, str]:
    """Return the files of rows in `data_dir/NAME` by split, such as `train.jsonl.gz`."""
    folder = Path(data_dir) / name
    if not folder.is_dir():
        raise ProbeError(f"{folder} is not a folder; --data-dir needs DIR/{name}/SPLIT.jsonl.gz")
    return {path.name.split(".")[0]: str(path) for path in sorted(folder.iterdir()) if kind_of(path)}


def _short_name(rows: str) -> str:
    path = Path(rows if os.path.exists(rows) else TablePlace.parse(rows).id)
    return path.name.split(".")[0] if kind_of(path) else path.name


def _find_request(text: Text, request: object) -> Place | None:
    """Return the place of a request, in the last turn of a chat that has it; None without a request, or a turn that has it."""
    if not isinstance(request, str) or not request:
        return None
    for number, turn in reversed(list(enumerate(as_chat(text)))):
        content = turn.get("content")
        first = content.find(request) if isinstance(content, str) else -1
        if first >= 0:
            return number, first, first + len(request)
    return None


def _hash_of(text: Text) -> float:
    """Return a number from 0 to 1 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(str(text).encode()).digest()[:6]) / 2**48
