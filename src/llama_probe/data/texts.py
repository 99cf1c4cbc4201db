"""Labelled rows: reads them by name, from files or from the Hub, finds their labels, and splits off a validation part."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, load_dataset
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, train_test_split
from transformers.utils import logging

from ..errors import ProbeError
from .files import kind_of
from .known import Benchmark, HubSplit, find_benchmark
from .labels import read_labels
from .prompts import Text, exchange, is_text
from .tables import read_table, reason


logger = logging.get_logger(__name__)


@dataclass
class LabelledTexts:
    """Texts with their labels.

    Attributes:
        texts: prompts.
        labels: `[rows]` class indices, `[rows, num_labels]` of 0 and 1 (multi-label), or `[rows, 1]` values (regression).
        label_names: by index.
        problem_type: as in `ProbeConfig`.
        columns: further columns of the data, to slice results by.
    """

    texts: list[Text]
    labels: np.ndarray
    label_names: list[str]
    problem_type: str
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: Sequence[int]) -> LabelledTexts:
        """Some of the rows."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        texts = [self.texts[row] for row in rows]
        return LabelledTexts(texts, self.labels[list(rows)], self.label_names, self.problem_type, columns)

    def digest(self) -> str:
        """sha256 of the texts and labels."""
        found = hashlib.sha256(json.dumps([self.texts, self.label_names], default=str).encode())
        found.update(self.labels.tobytes())
        return found.hexdigest()

    def where(self, column: str, value: str) -> LabelledTexts:
        """The rows that have a value, written as text, in a column.

        Raises:
            ProbeError: there is no such column, or no such row.
        """
        if column not in self.columns:
            raise ProbeError(f"there is no column {column!r}; there are: {', '.join(self.columns) or 'none'}")
        found = [row for row, item in enumerate(self.columns[column]) if str(item).lower() == value.lower()]
        if not found:
            known = sorted({str(item) for item in self.columns[column]})
            raise ProbeError(f"no row has {column}={value}; values: {', '.join(known[:8])}")
        return self.select(found)

    def at_most(self, limit: int | None, seed: int) -> LabelledTexts:
        """`limit` rows drawn at random, in their order; all where there are no more, or `limit` is `None`."""
        if limit is None or limit >= len(self):
            return self
        return self.select(sorted(np.random.default_rng(seed).permutation(len(self))[:limit].tolist()))

    def split(self, share: float, seed: int) -> tuple[LabelledTexts, LabelledTexts]:
        """A larger and a smaller part. Rows with the same text, or replies to the same prompt, stay together; classes are
        spread evenly.

        Raises:
            ProbeError: there are too few rows for the share.
        """
        if not 0 < share < 1:
            raise ProbeError(f"a share of {share} rows held back must lie between 0 and 1")
        group = self._first_rows()
        unique = np.unique(group)
        strata = None
        if self.problem_type == "single_label_classification":
            strata = self.labels[unique]
            several = np.bincount(strata)[strata] > 1  # the only text of a label can be in one part alone: the larger
            unique, strata = unique[several], strata[several]
        try:
            _, held_back = train_test_split(unique, test_size=share, random_state=seed, stratify=strata)
        except ValueError as error:
            raise ProbeError(f"{len(self)} rows cannot be split with a share of {share} held back: {error}") from None
        held_back = set(held_back.tolist())
        inside = [row for row in range(len(self)) if group[row] not in held_back]
        outside = [row for row in range(len(self)) if group[row] in held_back]
        return self.select(inside), self.select(outside)

    def folds(self, count: int, seed: int) -> list[np.ndarray]:
        """The rows of each of `count` folds, ascending; they stay together as in `split`, and classes are spread evenly.

        Raises:
            ProbeError: there are fewer texts than folds.
        """
        group = self._first_rows()
        different = len(set(group))
        if different < count:
            raise ProbeError(f"{different} different texts are too few for {count} folds")
        single = self.problem_type == "single_label_classification"
        spread = single and np.bincount(self.labels).max() >= count
        splitter = (StratifiedGroupKFold if spread else GroupKFold)(count, shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The least populated class")  # it is in some folds only
            return [held for _, held in splitter.split(group, self.labels, group)]

    def _first_rows(self) -> list[int]:
        """For each row the first one with its text, or with the prompt that its reply is to."""
        first_of: dict[str, int] = {}
        return [first_of.setdefault(str(_asked(text)), row) for row, text in enumerate(self.texts)]

    def renamed(self, label_names: Sequence[str]) -> LabelledTexts:
        """The same rows with other label names: matched by name where all names are among them, else by index.

        Raises:
            ProbeError: there are more or fewer names, and they do not hold the old ones.
        """
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
        return LabelledTexts(self.texts, labels, new, self.problem_type, self.columns)


def _asked(text: Text) -> Text:
    """The messages before the reply that a text ends with, where it ends with one."""
    replied = not isinstance(text, str) and len(text) > 1 and text[-1]["role"] == "assistant"
    return text[:-1] if replied else text


def read_labelled(
    source: str,
    text_column: str = "text",
    label_column: str = "label",
    label_names: Sequence[str] | None = None,
    problem_type: str | None = None,
    split: str = "train",
    data_dir: str | os.PathLike | None = None,
    prompt_column: str | None = None,
) -> LabelledTexts:
    """Reads rows and makes sense of their labels.

    Whole numbers are class indices, texts class names, lists several labels of one row (multi-label), and other numbers
    values (regression). Names come from `label_names`, from the data set's features, or from the labels themselves.

    Args:
        source: the name of a data set in `BENCHMARKS`, or `NAME:SPLIT`; else a file, a folder or a Hub id (see
            `read_table`). A file or folder that is called as one of them is written `./imdb`.
        text_column, label_column: of rows that are not known by name.
        label_names: where the data set has names of its own (it is known by name, or its labels are a `ClassLabel`) see
            `LabelledTexts.renamed`.
        problem_type: as in `ProbeConfig`; told by the labels where left out.
        split: which part to read, where `source` does not say.
        data_dir: local copies of the data sets known by name (see `read_benchmark`), to be read instead of the Hub.
        prompt_column: where the texts are replies, the column of what they reply to: a text, or chat messages. The texts
            that come out are chat messages. A data set that is known by name and has replies gives them so with its own.

    Raises:
        ProbeError: there is nothing to read, a column is missing, a text or label is empty, or labels and names do not
            fit each other.
    """
    known = find_benchmark(source)
    if known is not None:
        benchmark, own_split = known
        if Path(source).exists():  # the folder of an earlier run, most often
            logger.warning(
                f"{source} is the data set known by that name, not the path here, which is written ./{source}"
            )
        own = (None,) if benchmark.exchange is None else (None, benchmark.exchange[0])
        if (text_column, label_column) != ("text", "label") or prompt_column not in own:
            allowed = "" if benchmark.exchange is None else f" (allowed: prompt_column={benchmark.exchange[0]!r})"
            raise ProbeError(
                f"{source} is known by name and has its own columns; text_column, label_column, prompt_column are for "
                f"files{allowed}"
            )
        if problem_type not in (None, benchmark.problem_type):
            raise ProbeError(f"{source} is for {benchmark.problem_type}, not for {problem_type}")
        columns = read_benchmark(benchmark, own_split or split, data_dir)
        texts, values = columns.pop("text"), columns.pop("label")
        if prompt_column is not None:
            if missing := [name for name in benchmark.exchange if name not in columns]:
                raise ProbeError(
                    f"the copy of {source} has no column {missing[0]!r}; it has: {', '.join(['text', 'label', *columns])}"
                )
            pairs = list(zip(*(columns.pop(name) for name in benchmark.exchange), strict=True))
            texts = [_exchange(source, row, *pair) for row, pair in enumerate(pairs)]
        rows = _labelled(source, texts, values, columns, benchmark.label_names, benchmark.problem_type)
        return rows if label_names is None else rows.renamed(label_names)
    written = [text_column, *([] if prompt_column is None else [prompt_column])]
    if len({*written, label_column}) < len(written) + 1:
        raise ProbeError(
            f"{', '.join(written)} and {label_column}: texts, prompts and labels stand in columns of their own; name each once"
        )
    table = read_table(source, split, written, [label_column])
    for name in (*written, label_column):
        if name not in table.column_names:
            raise ProbeError(f"{source} has no column {name!r}; it has: {', '.join(table.column_names)}")
    feature = table.features[label_column]
    feature = getattr(feature, "feature", feature)
    named = isinstance(feature, ClassLabel) and problem_type != "regression"
    columns = {name: table[name][:] for name in table.column_names}
    texts, values = columns.pop(text_column), columns.pop(label_column)
    if prompt_column is not None:
        texts = [
            _exchange(source, row, *pair)
            for row, pair in enumerate(zip(columns.pop(prompt_column), texts, strict=True))
        ]
    rows = _labelled(source, texts, values, columns, feature.names if named else label_names, problem_type)
    return rows.renamed(label_names) if named and label_names is not None else rows


def read_benchmark(
    benchmark: Benchmark, split: str, data_dir: str | os.PathLike | None = None
) -> dict[str, list[Any]]:
    """Columns `text`, `label` and further ones of a data set that is known by name. Says how many rows had no text or label.

    Args:
        benchmark: the data set.
        split: one of `benchmark_splits`.
        data_dir: read `data_dir/NAME/SPLIT.jsonl.gz` (or another format of `read_table`) instead of the Hub. Its rows
            have columns `text` and `label`, or those of the Hub.

    Raises:
        ProbeError: there is no such split or local copy, or the Hub does not give the data.
    """
    splits = benchmark_splits(benchmark, data_dir)
    if split not in splits:
        raise ProbeError(f"{benchmark.name} has no split {split!r}; it has: {', '.join(splits)}")
    if data_dir is not None:
        table = read_table(str(splits[split]), text_columns=["text"])
    else:
        place = benchmark.splits[split]
        try:
            table = load_dataset(benchmark.hub_id, place.configuration, split=place.split, revision=benchmark.revision)
        except Exception as error:  # the loaders raise dozens of types
            raise ProbeError(
                f"{benchmark.name} cannot be loaded as {benchmark.hub_id} from the Hub: {reason(error)} (a gated data set "
                "wants its terms accepted there, and a login; --data-dir reads local copies)"
            ) from error
    if data_dir is not None and {"text", "label"} <= set(table.column_names):
        columns = {name: table[name][:] for name in table.column_names}
    else:
        columns = benchmark.convert(table)
    full = [
        row for row, pair in enumerate(zip(columns["text"], columns["label"], strict=True)) if not _is_empty(*pair)
    ]
    if len(full) < len(columns["text"]):
        logger.warning(
            f"{len(columns['text']) - len(full)} of {len(columns['text'])} rows of {benchmark.name}:{split} have no text "
            "or no label and are left out."
        )
        columns = {name: [values[row] for row in full] for name, values in columns.items()}
    return columns


def benchmark_splits(benchmark: Benchmark, data_dir: str | os.PathLike | None = None) -> dict[str, Path | HubSplit]:
    """The splits that there are: on the Hub, or with `data_dir` the files in `data_dir/NAME`.

    Raises:
        ProbeError: `data_dir` has no such folder.
    """
    if data_dir is None:
        return dict(benchmark.splits)
    folder = Path(data_dir) / benchmark.name
    if not folder.is_dir():
        raise ProbeError(
            f"{folder} is no folder; local copies lie in DIR/{benchmark.name}/SPLIT.jsonl.gz, and without --data-dir the "
            "rows come from the Hub"
        )
    return {path.name.split(".")[0]: path for path in sorted(folder.iterdir()) if kind_of(path)}


def _is_empty(text: Any, label: Any) -> bool:
    return text is None or label is None or (isinstance(text, str) and not text.strip())


def _as_text(source: str, row: int, text: Any, what: str = "text") -> Text:
    """A text, or chat messages; what a csv file took for a number is a text."""
    if isinstance(text, (int, float)):
        return str(text)
    if is_text(text):
        return text
    raise ProbeError(
        f"{source}: the {what} of row {row} is {str(text)[:60]!r}; it must be a text, or a list of chat messages with role and content"
    )


def _exchange(source: str, row: int, prompt: Any, reply: Any) -> list[dict[str, str]]:
    if prompt in (None, "", []) or not isinstance(reply, str) or not reply.strip():
        raise ProbeError(f"{source}: row {row} has no prompt, or no text as its reply")
    return exchange(_as_text(source, row, prompt, "prompt"), reply)


def _labelled(
    source: str, texts: list, values: list, columns: dict[str, list], label_names, problem_type: str | None
) -> LabelledTexts:
    if not texts:
        raise ProbeError(f"{source} holds no rows")
    for row, (text, value) in enumerate(zip(texts, values, strict=True)):
        if _is_empty(text, value):
            raise ProbeError(f"{source}: row {row} has no text or no label")
    texts = [_as_text(source, row, text) for row, text in enumerate(texts)]
    labels, names, found_type = read_labels(source, values, label_names, problem_type)
    return LabelledTexts(texts, labels, names, found_type, columns)
