"""Labelled texts: read by name, from files or from the Hub, and split into parts."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from ..errors import ProbeError
from ..heads.rules import ProblemType
from .files import MAX_TEXT, check_length, kind_of
from .known import Benchmark, HubSplit, find_benchmark
from .labels import read_labels
from .prompts import Text, exchange, is_text
from .tables import Columns, dataset_columns, read_table, reason


logger = logging.get_logger(__name__)

_FEW = 2  # rows of a label that are pointed out


@dataclass
class LabelledTexts:
    """Texts with their labels.

    Attributes:
        texts: texts or chat messages.
        labels: class indices `[rows]` int64, zeros and ones `[rows, num_labels]` float32 (multi-label), or values
            `[rows, 1]` float32 (regression).
        label_names: names by index.
        problem_type: as in `ProbeConfig`.
        columns: further columns of the data, to slice results by.
        flagged: names of the labels to flag; see `ProbeConfig`.
    """

    texts: list[Text]
    labels: np.ndarray
    label_names: list[str]
    problem_type: str
    columns: Columns
    flagged: list[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def none(cls, labels: Labels) -> LabelledTexts:
        """Return no rows, with these labels."""
        kind, names = labels.problem_type or "single_label_classification", list(labels.names or ())
        shape, dtype = ((0,), np.int64) if kind == "single_label_classification" else ((0, len(names)), np.float32)
        return cls([], np.zeros(shape, dtype), names, kind, {})

    def select(self, rows: Sequence[int]) -> LabelledTexts:
        """Return some of the rows."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return replace(self, texts=[self.texts[row] for row in rows], labels=self.labels[list(rows)], columns=columns)

    def label_counts(self) -> dict[str, int]:
        """Return the number of rows with each label, by name; empty for regression."""
        if self.problem_type == "regression":
            return {}
        several = self.labels.ndim == 2
        counts = self.labels.sum(axis=0) if several else np.bincount(self.labels, minlength=len(self.label_names))
        return dict(zip(self.label_names, map(int, counts), strict=True))

    @classmethod
    def join(cls, parts: Sequence[LabelledTexts]) -> LabelledTexts:
        """Return the rows of all parts, whose labels are alike. Columns that are not in all parts are dropped."""
        parts = [part for part in parts if len(part)] or parts[:1]
        first = parts[0]
        if len(parts) == 1:
            return first
        shared = [name for name in first.columns if all(name in part.columns for part in parts)]
        columns = {name: [value for part in parts for value in part.columns[name]] for name in shared}
        texts = [text for part in parts for text in part.texts]
        return replace(first, texts=texts, labels=np.concatenate([part.labels for part in parts]), columns=columns)

    def digest(self) -> str:
        """Return the sha256 of the texts and labels."""
        found = hashlib.sha256(json.dumps([self.texts, self.label_names], default=str).encode())
        found.update(self.labels.tobytes())
        return found.hexdigest()

    def at_most(self, limit: int | None, seed: int) -> LabelledTexts:
        """Return `limit` random rows in their order, or all rows if there are fewer or `limit` is None."""
        if limit is None or limit >= len(self):
            return self
        return self.select(sorted(np.random.default_rng(seed).permutation(len(self))[:limit].tolist()))

    def split(self, share: float, seed: int) -> tuple[LabelledTexts, LabelledTexts]:
        """Return the rows without a random share of them, and the share, with classes spread evenly.

        Rows with the same text, or with replies to the same prompt, stay together.
        """
        from sklearn.model_selection import train_test_split

        group = self._groups()
        unique = np.unique(group)
        strata = None
        if self.problem_type == "single_label_classification":
            strata = self.labels[unique]
            several = np.bincount(strata)[strata] > 1  # The only text of a label stays in the larger part.
            unique, strata = unique[several], strata[several]
        try:
            _, held_back = train_test_split(unique, test_size=share, random_state=seed, stratify=strata)
        except ValueError as error:
            raise ProbeError(f"{len(self)} rows cannot be split with a share of {share} held back: {error}") from None
        held = np.isin(group, held_back)
        return self.select(np.flatnonzero(~held).tolist()), self.select(np.flatnonzero(held).tolist())

    def folds(self, count: int, seed: int) -> list[np.ndarray]:
        """Return the rows of each fold, ascending. Rows stay together and classes are spread as in `split`."""
        from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

        group = self._groups()
        if (different := len(set(group))) < count:
            raise ProbeError(f"{different} different texts are too few for {count} folds")
        single = self.problem_type == "single_label_classification"
        spread = single and np.bincount(self.labels).max() >= count
        splitter = (StratifiedGroupKFold if spread else GroupKFold)(count, shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The least populated class")
            return [held for _, held in splitter.split(group, self.labels, group)]

    def _groups(self) -> list[int]:
        """Return for each row the first row with the same text, or with a reply to the same prompt."""
        first_of: dict[str, int] = {}
        asked = (text[:-1] if ends_with_reply(text) else text for text in self.texts)
        return [first_of.setdefault(str(text), row) for row, text in enumerate(asked)]

    def renamed(self, label_names: Sequence[str]) -> LabelledTexts:
        """Return the rows with other label names, matched by name if all old names are among them, else by index."""
        old, new = self.label_names, list(label_names)
        if old == new:
            return self
        if set(old) <= set(new):
            index = np.array([new.index(name) for name in old])
        elif len(old) == len(new):
            index = np.arange(len(old))
            logger.warning(f"The labels {', '.join(old)} of the data are read as {', '.join(new)}, in this order.")
        else:
            raise ProbeError(f"labels {', '.join(old)} of the data cannot be read as {', '.join(new)}")
        if self.labels.ndim == 1:
            labels = index[self.labels]
        else:
            labels = np.zeros((len(self), len(new)), dtype=self.labels.dtype)
            labels[:, index] = self.labels
        flagged = self.flagged and [new[index[old.index(name)]] for name in self.flagged]
        return replace(self, labels=labels, label_names=new, flagged=flagged)


@dataclass(kw_only=True)
class Labels:
    """The labels that rows may have.

    Attributes:
        names: names by index. Defaults to what the rows say.
        flagged: names of the labels to flag; see `ProbeConfig`.
        problem_type: as in `ProbeConfig`. Defaults to what the rows say.
    """

    names: list[str] | None = None
    flagged: list[str] | None = None
    problem_type: ProblemType | None = None


def check_labels(name: str, rows: LabelledTexts) -> None:
    """Check that training rows have several labels. Warn of labels that no row, or one or two rows, have: a typing error?

    Raises:
        ProbeError: all rows have one label; `name` is theirs in the message.
    """
    counts = rows.label_counts()
    present = [label for label, count in counts.items() if count]
    if rows.labels.ndim == 1 and len(present) == 1:
        raise ProbeError(f"all rows of {name} have the label {present[0]!r}: there is nothing to tell apart")
    if absent := [label for label, count in counts.items() if not count]:
        logger.warning(f"No training row has the label {', '.join(absent)}: the head will hardly give it")
    if max(counts.values(), default=0) <= _FEW:
        return
    for label in present:
        if counts[label] > _FEW:
            continue
        folded = {other.strip().casefold(): other for other in counts if other != label}
        alike = [folded[other] for other in get_close_matches(label.strip().casefold(), folded, 1, 0.75)]
        doubt = f"; is it {alike[0]!r}, which {counts[alike[0]]} have?" if alike else ""
        logger.warning(f"Only {counts[label]} of {sum(counts.values())} training rows have the label {label!r}{doubt}")


def ends_with_reply(text: Text) -> bool:
    """Return True for chat messages that end with the assistant's."""
    return not isinstance(text, str) and len(text) > 1 and text[-1]["role"] == "assistant"


def read_labelled(
    source: str,
    text_column: str = "text",
    label_column: str = "label",
    label_names: Sequence[str] | None = None,
    problem_type: str | None = None,
    split: str = "train",
    data_dir: str | os.PathLike | None = None,
    prompt_column: str | None = None,
    max_text: int = MAX_TEXT,
    label_of_all: str | Sequence[str] | None = None,
    label_map: Mapping[str, Any] | None = None,
    where: Mapping[str, Sequence[Any]] | None = None,
    skip_empty: bool = False,
) -> LabelledTexts:
    """Read labelled rows; see `read_labels` for the meaning of labels.

    Args:
        source: a data set of `BENCHMARKS` as `NAME` or `NAME:SPLIT`, else a source of `read_table`. A file or folder with
            the name of a benchmark is written `./imdb`.
        text_column, label_column: columns of rows that are not known by name.
        label_names: names by index. Names of the data set itself are matched with them; see `LabelledTexts.renamed`.
        problem_type: as in `ProbeConfig`. Defaults to the one that the labels imply.
        split: the split to read, if `source` names none.
        data_dir: local copies of the data sets known by name; see `read_benchmark`.
        prompt_column: column of the prompts, texts or chat messages, if the texts are replies to them.
        max_text: characters of the longest text; see also `InputFile.read`.
        label_of_all: read no label column: every row has this one, or these, of `label_names`.
        label_map: text of a value of the label column -> label; None leaves the row out.
        where: column -> the values that its rows may have. Other rows are left out.
        skip_empty: leave out rows without a text or a label, with a warning, instead of refusing them.

    Raises:
        ProbeError: the source cannot be read or is too large, a column is missing, a text or label is empty, or labels
            and names do not fit.
    """
    known = find_benchmark(source)
    if known is None:
        needed = [name for name in (text_column, prompt_column, label_column) if name is not None]
        if len(set(needed)) < len(needed):
            raise ProbeError(f"columns {', '.join(needed)}: texts, prompts and labels need columns of their own")
        columns, names = read_table(source, split, needed[:-1], max_text)
        flagged = None
        own_names = None if problem_type == "regression" else names.get(label_column)
    else:
        benchmark, own_split = known
        if os.path.exists(source):
            logger.warning(f"{source} is the data set known by that name; write ./{source} for the path")
        prompts, replies = benchmark.exchange or (None, None)
        if (text_column, label_column) != ("text", "label") or prompt_column not in (None, prompts):
            raise ProbeError(
                f"{source} is read by text_column='text', label_column='label', prompt_column={prompts!r} or None"
            )
        if label_of_all is None and problem_type not in (None, benchmark.problem_type):
            raise ProbeError(f"problem_type: {source} is for {benchmark.problem_type}, not for {problem_type}")
        columns = read_benchmark(benchmark, own_split or split, data_dir)
        own_names, problem_type = benchmark.label_names, problem_type or benchmark.problem_type
        flagged = benchmark.flagged and [benchmark.flagged]
        if prompt_column is not None:
            text_column = replies
    if where is not None:
        columns = _select_where(source, columns, where)
    if label_of_all is not None:
        label_map, own_names, flagged = None, None, None
        columns[label_column] = [label_of_all] * len(next(iter(columns.values())))
    if label_map is not None:
        columns = _map_labels(source, columns, label_column, label_map, own_names if known is not None else None)
        own_names, flagged = None, None
    for name in (text_column, label_column, prompt_column):
        if name is not None and name not in columns:
            raise ProbeError(f"{source} has no column {name!r}; it has: {', '.join(columns)}")
    if known is not None and prompt_column is not None:
        columns.pop("text", None)  # the replies are read in its place
    if skip_empty:
        columns = _full_rows(source, columns, text_column, label_column)
    return label_rows(
        source,
        columns,
        text_column,
        label_column,
        label_names,
        own_names,
        problem_type,
        prompt_column,
        max_text,
        flagged,
    )


def label_rows(
    source: str,
    columns: Columns,
    text_column: str,
    label_column: str,
    label_names: Sequence[str] | None = None,
    own_names: Sequence[str] | None = None,
    problem_type: str | None = None,
    prompt_column: str | None = None,
    max_text: int = MAX_TEXT,
    flagged: list[str] | None = None,
) -> LabelledTexts:
    """Return columns as labelled rows; see `read_labelled`.

    Args:
        own_names: names that the data itself gives its labels; they are matched with `label_names`.
        flagged: those of them to flag.
    """
    columns = dict(columns)
    texts, values = columns.pop(text_column), columns.pop(label_column)
    if not texts:
        raise ProbeError(f"{source} holds no rows")
    prompts = [None] * len(texts) if prompt_column is None else columns.pop(prompt_column)
    found: list[Text] = []
    for row, (text, value, prompt) in enumerate(zip(texts, values, prompts, strict=True)):
        if _is_empty(text, value):
            raise ProbeError(f"{source}: row {row} has no text or no label")
        text = _read_text(source, row, text)
        check_length(f"{source}: row {row}", text, max_text)
        if prompt_column is not None:
            if prompt in (None, "", []) or not isinstance(text, str):
                raise ProbeError(f"{source}: row {row} has no prompt, or its reply is not a text")
            text = exchange(_read_text(source, row, prompt), text)
        found.append(text)
    labels = read_labels(source, values, own_names or label_names, problem_type)
    rows = LabelledTexts(found, *labels, columns, flagged)
    return rows.renamed(label_names) if own_names and label_names else rows


def _select_where(source: str, columns: Columns, where: Mapping[str, Sequence[Any]]) -> Columns:
    for name in where:
        if name not in columns:
            raise ProbeError(f"{source} has no column {name!r} for where; it has: {', '.join(columns)}")
    wanted = {name: set(map(str, values)) for name, values in where.items()}
    count = len(next(iter(columns.values())))
    rows = [row for row in range(count) if all(str(columns[name][row]) in wanted[name] for name in wanted)]
    if not rows:
        raise ProbeError(
            f"{source} has no rows where {' and '.join(f'{name} is one of {list(where[name])}' for name in where)}"
        )
    return {name: [values[row] for row in rows] for name, values in columns.items()}


def _full_rows(source: str, columns: Columns, text_column: str, label_column: str) -> Columns:
    """Return the rows that have a text and a label. Warn of others."""
    pairs = list(zip(columns[text_column], columns[label_column], strict=True))
    full = [row for row, pair in enumerate(pairs) if not _is_empty(*pair)]
    if missing := len(pairs) - len(full):
        logger.warning(f"{missing} rows of {source} have no text or no label and are skipped.")
        columns = {name: [values[row] for row in full] for name, values in columns.items()}
    return columns


def _map_labels(
    source: str, columns: Columns, label_column: str, label_map: Mapping[str, Any], names: Sequence[str] | None
) -> Columns:
    """Return the rows with their labels mapped, without those that are mapped to None. `names` are those of indices."""
    if label_column not in columns:
        raise ProbeError(f"{source} has no column {label_column!r}; it has: {', '.join(columns)}")
    known = dict(enumerate(names or ()))
    values = [
        str(known.get(value, value)) if isinstance(value, int) else str(value) for value in columns[label_column]
    ]
    if unknown := sorted({value for value in values if value not in label_map}):
        raise ProbeError(f"{source}: the label {unknown[0]!r} is not in label_map: {', '.join(label_map)}")
    rows = [row for row, value in enumerate(values) if label_map[value] is not None]
    kept = {name: [column[row] for row in rows] for name, column in columns.items()}
    return kept | {label_column: [label_map[values[row]] for row in rows]}


def read_benchmark(benchmark: Benchmark, split: str, data_dir: str | os.PathLike | None) -> Columns:
    """Return the columns `text`, `label` and further ones of a data set known by name, without rows that lack either.

    With `data_dir`, `data_dir/NAME/SPLIT.jsonl.gz` (or another format of `read_table`) is read instead of the Hub. Its rows have
    the columns `text` and `label`, or those of the Hub.

    Raises:
        ProbeError: there is no such split or local copy, or the Hub does not give the data.
    """
    splits = benchmark_splits(benchmark, data_dir)
    if split not in splits:
        raise ProbeError(f"{benchmark.name} has no split {split!r}; it has: {', '.join(splits)}")
    if data_dir is not None:
        columns, _ = read_table(str(splits[split]), text_columns=["text"])
    else:
        import datasets

        name, configuration = benchmark.splits[split]
        try:
            columns, _ = dataset_columns(datasets.load_dataset(benchmark.hub_id, configuration, split=name))
        except Exception as error:  # The loaders raise dozens of types.
            raise ProbeError(f"{benchmark.hub_id} cannot be loaded: {reason(error)} (or pass data_dir)") from error
    if data_dir is None or not {"text", "label"} <= columns.keys():
        columns = benchmark.convert(columns)
    return _full_rows(f"{benchmark.name}:{split}", columns, "text", "label")


def benchmark_splits(benchmark: Benchmark, data_dir: str | os.PathLike | None) -> dict[str, Path | HubSplit]:
    """Return the splits on the Hub, or with `data_dir` the files in `data_dir/NAME`, by name."""
    if data_dir is None:
        return dict(benchmark.splits)
    folder = Path(data_dir) / benchmark.name
    if not folder.is_dir():
        raise ProbeError(f"{folder} is not a folder; --data-dir needs DIR/{benchmark.name}/SPLIT.jsonl.gz")
    return {path.name.split(".")[0]: path for path in sorted(folder.iterdir()) if kind_of(path)}


def _is_empty(text: Any, label: Any) -> bool:
    return text is None or label is None or (isinstance(text, str) and not text.strip())


def _read_text(source: str, row: int, text: Any) -> Text:
    if isinstance(text, (int, float)):
        return str(text)
    if is_text(text):
        return text
    raise ProbeError(f"{source}: {str(text)[:60]!r} in row {row} must be a text, or a list of chat messages")
