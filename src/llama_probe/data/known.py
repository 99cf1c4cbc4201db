"""Data sets known by name: their place on the Hub, and how their rows become texts with labels.

`known.yaml` has an entry for each data set. `Source` reads the rows from the Hub or from local copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import yaml

from ..errors import ProbeError
from .row_files import Columns, Row


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A data set known by name, in English.

    Attributes:
        name: name on the command line.
        title: name in a sentence.
        splits: by split: the split on the Hub, and its configuration or None for the default configuration.
        text, label: a column, or a name in `_FUNCTIONS`. A label is an index, a name, or a list of indices or names.
        label_names: names by index.
        flagged: the label of two that a head finds; see `ProbeConfig`.
        license: licence as the Hub spells it.
        note: origin and licence in a sentence, for cards.
        exchange: columns of the prompts and the replies, for heads that read replies.
        columns: further columns to keep.
        slices: columns to report results by.
    """

    name: str
    title: str
    hub_id: str
    splits: dict[str, list[str | None]]
    text: str = "text"
    label: str = "label"
    label_names: list[str]
    license: str
    note: str
    flagged: str | None = None
    exchange: list[str] | None = None
    columns: Sequence[str] = ()
    slices: Sequence[str] = ()

    def convert(self, table: Columns) -> Columns:
        """Return `text`, `label` (a cell may be None) and the columns of `columns`, from columns as on the Hub."""
        rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
        converted = {name: table[name] for name in self.columns if name in table}
        try:
            for name, part in (("text", self.text), ("label", self.label)):
                converted[name] = list(map(_FUNCTIONS.get(part, itemgetter(part)), rows))
        except KeyError as error:
            raise ProbeError(f"{self.name} has no column {error}; it has: {', '.join(table)}") from None
        return converted


def find_benchmark(source: str | None) -> tuple[Benchmark, str | None] | None:
    """Return the data set that `NAME` or `NAME:SPLIT` means, and the split or None.

    Return None for anything else: a file, a folder (`./imdb`) or another Hub data set.
    """
    name, _, split = str(source).partition(":")
    # `imdb::test` is a split of a file or a folder of rows.
    if name not in BENCHMARKS or split.startswith(":"):
        return None
    return BENCHMARKS[name], split or None


def slices_of(columns: dict[str, list], source: str | None, names: Sequence[str]) -> dict[str, list]:
    """Return the columns to report by: the columns of these names, or else the columns of a data set known by name."""
    missing = [name for name in names if name not in columns]
    if missing:
        raise ProbeError(f"slice_columns={missing} must be columns of the rows: {', '.join(columns) or 'none'}")
    known = find_benchmark(source)
    wanted = names or (known[0].slices if known else ())
    return {name: columns[name] for name in wanted if name in columns}  # a local copy may lack a column


def _any_category(row: Row) -> int:
    """Return 1 if an annotator flagged any category. A missing value counts as 0."""
    return int(any(row.get(name) == 1 for name in BENCHMARKS["openai_moderation"].columns))


def _majority_vote(row: Row) -> int | None:
    """Return 0 if most annotators of a prompt say `Safe`, 1 for ties and `Needs Caution`, None for other texts."""
    votes = [row.get(f"labels_{i}") for i in range(5)]
    given = [vote for vote in votes if vote not in (None, "", "None")]
    if row["text_type"] != "user_message" or not given:
        return None
    return int(2 * given.count("Safe") <= len(given))


def _dialogue(row: Row) -> str | None:
    prompt, reply = row["prompt"], row["response"]
    return None if None in (prompt, reply) else f"User: {prompt}\n\nAssistant: {reply}"


_FUNCTIONS: dict[str, Callable[[Row], object]] = {
    "(any category)": _any_category,
    "(majority vote)": _majority_vote,
    "(dialogue)": _dialogue,
    "(is not safe)": lambda row: None if row["is_safe"] is None else int(not row["is_safe"]),
    "(always flagged)": lambda row: 1,
}
_ENTRIES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
BENCHMARKS: dict[str, Benchmark] = {name: Benchmark(name=name, **entry) for name, entry in _ENTRIES.items()}
