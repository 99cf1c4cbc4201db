"""Texts with labels: made of the columns of a table, and divided into parts."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

import numpy as np
from transformers.utils import logging

from ..errors import ProbeError
from ..heads.rules import ProblemType
from .labels import read_labels
from .prompts import Place, Text, exchange, has_reply, is_text
from .row_files import MAX_TEXT, Columns, check_length, find_column, select_rows


logger = logging.get_logger(__name__)

_FEW = 2  # a label with so few rows may be a mistake


@dataclass
class LabelledTexts:
    """Texts with their labels.

    Attributes:
        labels: class indices `[rows]` int64; zeros and ones `[rows, num_labels]` float32 (multi-label), NaN for a label that is
            not known of a row; or values `[rows, 1]` float32 (regression). `[0]` for rows without labels.
        columns: further columns of the data, such as columns to report results by.
        flagged: names of the labels to flag; see `ProbeConfig`.
        places: place of what gives each row its label, such as a request inside a document; None where it is not known, or if
            no place is known.
    """

    texts: list[Text]
    labels: np.ndarray
    label_names: list[str]
    problem_type: str
    columns: Columns
    flagged: list[str] | None = None
    places: list[Place | None] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: Sequence[int]) -> LabelledTexts:
        """Return some of the rows."""
        texts = [self.texts[row] for row in rows]
        places = None if self.places is None else [self.places[row] for row in rows]
        columns = select_rows(self.columns, rows)
        return replace(self, texts=texts, labels=self.labels[list(rows)], columns=columns, places=places)

    @classmethod
    def join(cls, parts: Sequence[LabelledTexts]) -> LabelledTexts:
        """Return the rows of all parts, which must have the same labels. Drop columns that a part lacks."""
        first = parts[0]
        shared = [name for name in first.columns if all(name in part.columns for part in parts)]
        columns = {name: [value for part in parts for value in part.columns[name]] for name in shared}
        texts = [text for part in parts for text in part.texts]
        places = None
        if any(part.places is not None for part in parts):
            places = [place for part in parts for place in part.places or [None] * len(part)]
        labels = np.concatenate([part.labels for part in parts])
        return replace(first, texts=texts, labels=labels, columns=columns, places=places)

    def digest(self) -> str:
        """Return the sha256 of the texts, labels and places."""
        values = [self.texts, self.label_names]
        if self.places is not None and any(self.places):
            values.append(self.places)
        named = json.dumps(values, default=str)
        return hashlib.sha256(named.encode() + self.labels.tobytes()).hexdigest()

    def at_most(self, limit: int | None, seed: int) -> LabelledTexts:
        """Return `limit` random rows in their order, or all rows if there are fewer or `limit` is None."""
        if limit is None or limit >= len(self):
            return self
        if limit < 1:
            raise ProbeError(f"max_rows={limit} must be a whole number from 1")
        return self.select(sorted(np.random.default_rng(seed).permutation(len(self))[:limit].tolist()))

    def split(self, share: float, seed: int) -> tuple[LabelledTexts, LabelledTexts]:
        """Divide the rows into two parts, of which the second is a random share. Both parts have the same share of each class.

        Rows with the same text, or with replies to the same prompt, stay together.
        """
        from sklearn.model_selection import train_test_split

        group = self._groups()
        unique = np.unique(group)
        strata = None
        if self.problem_type == "single_label_classification":
            strata = self.labels[unique]
            several = np.bincount(strata)[strata] > 1  # the only text of a label stays in the larger part
            unique = unique[several]
            strata = strata[several]
        try:
            _, held_back = train_test_split(unique, test_size=share, random_state=seed, stratify=strata)
        except ValueError as error:
            raise ProbeError(f"{len(self)} rows cannot be split with a share of {share} held back: {error}") from None
        held = np.isin(group, held_back)
        return self.select(np.flatnonzero(~held).tolist()), self.select(np.flatnonzero(held).tolist())

    def folds(self, count: int, seed: int) -> list[np.ndarray]:
        """Return the row numbers of each fold, ascending, with the same rows together and the same shares of classes as in `split`."""
        from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

        group = self._groups()
        different = len(set(group))
        if different < count:
            raise ProbeError(f"{different} different texts are too few for {count} folds")
        is_single = self.problem_type == "single_label_classification"
        kind = StratifiedGroupKFold if is_single and np.bincount(self.labels).max() >= count else GroupKFold
        splitter = kind(count, shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The least populated class")
            return [held for _, held in splitter.split(group, self.labels, group)]

    def _groups(self) -> list[int]:
        """Return for each row the first row with the same text, or with a reply to the same prompt."""
        first_of: dict[str, int] = {}
        prompts = (text[:-1] if has_reply(text) else text for text in self.texts)
        return [first_of.setdefault(str(text), row) for row, text in enumerate(prompts)]

    def known_only(self, names: Sequence[str]) -> LabelledTexts:
        """Return the rows with NaN, for not known, for all labels but `names`."""
        if self.problem_type != "multi_label_classification" or not set(names) <= set(self.label_names):
            found = f"{self.problem_type} with the labels {', '.join(self.label_names)}"
            raise ProbeError(f"known_labels={list(names)} must be labels of multi-label rows, not of {found}")
        is_known = np.isin(self.label_names, names)
        if (self.labels[:, ~is_known] == 1).any():
            raise ProbeError(f"known_labels={list(names)} leaves out a label that some of the rows have")
        return replace(self, labels=np.where(is_known, self.labels, np.float32("nan")))

    def renamed(self, label_names: Sequence[str]) -> LabelledTexts:
        """Return the rows with other label names. Labels match by name if the new names include all old names, else by index."""
        old = self.label_names
        new = list(label_names)
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
    """The labels that rows may have: the section `labels` of a recipe. A field that is None comes from the rows.

    Args:
        names: names of the labels, by index.
        flagged: labels to find: thresholds, metrics and `halt_on` are for these.
        problem_type: one label a row, several labels a row, or a value.
    """

    names: list[str] | None = None
    flagged: list[str] | None = None
    problem_type: ProblemType | None = None


def check_labels(name: str, rows: LabelledTexts) -> None:
    """Check that the labels of training rows differ, except for a regression. Warn of labels that no row or few rows have."""
    if rows.problem_type == "regression":
        return
    indices = (rows.labels == 1).nonzero()[1] if rows.labels.ndim == 2 else rows.labels
    counts = dict(zip(rows.label_names, np.bincount(indices, minlength=len(rows.label_names)).tolist(), strict=True))
    present = [label for label, count in counts.items() if count]
    absent = [label for label, count in counts.items() if not count]
    if present and all(counts[label] == len(rows) for label in present):
        shared = ", ".join(map(repr, present))
        raise ProbeError(f"all rows of {name} have the label {shared}: there is nothing to tell apart")
    if absent:
        logger.warning(f"No training row has the label {', '.join(absent)}: the head will hardly give it")
    if max(counts.values()) <= _FEW:
        return
    for label in present:
        if counts[label] <= _FEW:
            alike = get_close_matches(label, [other for other in counts if other != label], 1, 0.75)
            doubt = f"; is it {alike[0]!r}?" if alike else ""
            logger.warning(f"Only {counts[label]} of {len(rows)} training rows have the label {label!r}{doubt}")


def label_rows(
    source: str,
    columns: Columns,
    text_column: str,
    label_column: str | None,
    labels: Labels,
    stated: Labels,
    prompt_column: str | None = None,
    max_text: int = MAX_TEXT,
) -> LabelledTexts:
    """Return columns as labelled rows; see `read_labels` for the meaning of labels.

    Args:
        text_column: column of the texts or chat messages.
        label_column: column of the labels, None for rows without labels.
        labels: the labels that rows may have.
        stated: the names that the data gives its labels, and the labels to flag; see `LabelledTexts.renamed`.
        prompt_column: column of the prompts, if the texts are replies to them.
    """
    texts = find_column(source, columns, text_column)
    if not texts:
        raise ProbeError(f"{source} holds no rows")
    texts = [_read_text(f"{source}: row {row}", text, max_text) for row, text in enumerate(texts)]
    if prompt_column is not None:
        for row, prompt in enumerate(find_column(source, columns, prompt_column)):
            if not isinstance(texts[row], str):
                raise ProbeError(f"{source}: row {row} has a prompt, and its reply is not a text")
            texts[row] = exchange(_read_text(f"{source}: the prompt of row {row}", prompt, max_text), texts[row])
    others = {name: cells for name, cells in columns.items() if name not in (text_column, label_column, prompt_column)}
    if label_column is None:
        return LabelledTexts(texts, np.empty(0), labels.names or [], labels.problem_type or "", others)
    values = find_column(source, columns, label_column)
    if None in values:
        raise ProbeError(f"{source}: row {values.index(None)} has no label")
    if labels.problem_type == "regression":
        stated = Labels()
    indices, names, problem_type = read_labels(source, values, stated.names or labels.names, labels.problem_type)
    rows = LabelledTexts(texts, indices, names, problem_type, others, stated.flagged)
    return rows.renamed(labels.names) if stated.names and labels.names else rows


def is_empty(text: object) -> bool:
    """Return True if a cell holds no text."""
    return text is None or (isinstance(text, str) and not text.strip())


def _read_text(name: str, text: object, max_text: int) -> Text:
    if is_empty(text):
        raise ProbeError(f"{name} has no text")
    text = str(text) if isinstance(text, (int, float)) else text
    if not is_text(text):
        raise ProbeError(f"{name}: {str(text)[:60]!r} must be a text, or a list of chat messages")
    check_length(name, text, max_text)
    return text
