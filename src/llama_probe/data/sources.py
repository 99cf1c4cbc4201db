"""Where the rows of a training run come from, and how they are split."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

import numpy as np
from transformers.utils import logging

from ..errors import ProbeError
from .known import find_benchmark
from .texts import LabelledTexts, benchmark_splits, read_labelled


logger = logging.get_logger(__name__)

FEW_ROWS, FOLDS, VALIDATION_SHARE = 400, 5, 0.15


@dataclass
class DataSources:
    """Where the rows come from.

    Attributes:
        train, eval, test: names of data sets (`NAME` or `NAME:SPLIT`), files, folders or Hub data sets. Where train is
            known by name, `eval` and `test` are its validation and test splits, if it has them and nothing else is asked for.
            Without `eval`, `validation_share` of train (0.15 where left out) is held back, or folds of it take turns.
            `test` is scored once at the end, and nothing is chosen by it; `test_share` of train can be held back for it first.
        extra: further rows to train on, of other sources: neither the head, nor its temperature and threshold, is chosen or
            measured by them. Their labels are read as those of train, by name or else in their order; rows whose text is
            among the validation or test rows are left out.
        extra_weights: what these rows count for in the loss, where those of train count for 1. Of several numbers, the members of a
            head that has them (`multimax`) take turns: with 0 and 0.3 every other one learns from train alone.
        text_column, label_column, label_names, problem_type, prompt_column: see `read_labelled`.
        slice_columns: columns of the test rows to report by; those of the table where test is known by name.
        folds: without `eval`, train on all rows, and validate on the scores that each of so many folds gets from a head
            trained on the others; 0 holds a part back instead, `None` is 5 folds for fewer than 400 rows, which are too
            few to hold any back, unless `validation_share` says how many to hold back.
        max_rows: read at most so many training rows. max_extra_rows: and so many of each source of `extra`. max_eval_rows: and so
            many validation and so many test rows.
        data_dir: local copies of the data sets known by name, see `read_benchmark`.

    Raises:
        ProbeError: `data_dir` has no copy of train, columns are named where every source has its own, `folds` is no
            number of folds, a share does not lie between 0 and 1, more than one of `eval`, `folds` and `validation_share` is
            given, or `extra_weights` are no weights or given without `extra`.
    """

    train: str = field(metadata={"help": "Training rows."})
    eval: str | None = field(
        default=None,
        metadata={"help": "Validation rows. Default: those of a named --train, else a part of the training rows."},
    )
    test: str | None = field(
        default=None,
        metadata={
            "help": "Test rows, scored once at the end and never used to choose. Default: those of a named --train."
        },
    )
    extra: list[str] = field(
        default_factory=list,
        metadata={"help": "Further training rows from another source, never used to choose or measure. Repeatable."},
    )
    extra_weights: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={
            "help": "Loss weight of the --extra rows. If repeated, the members of a multimax head take turns: with 0 and 0.3 every other one learns without them.",
            "option": "extra-weight",
        },
    )
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    label_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the labels 0, 1, ..., with commas."}
    )
    problem_type: str | None = field(
        default=None,
        metadata={
            "help": "single_label_classification, multi_label_classification or regression. Default: inferred from the labels."
        },
    )
    validation_share: float | None = field(
        default=None,
        metadata={
            "help": "Share of the training rows held back instead of --eval or --folds. Default: 0.15 if rows are held back."
        },
    )
    test_share: float | None = field(
        default=None,
        metadata={"help": "Share of the training rows held back as test rows, before anything else, without --test."},
    )
    folds: int | None = field(
        default=0,
        metadata={
            "help": "Without --eval: train on all rows and validate each fold with a head trained on the others; 0 holds a share back. Default: 5 for fewer than 400 rows, else 0."
        },
    )
    slice_columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Report test rows also by this column. Named data sets have their own. Repeatable.",
            "option": "slice-column",
        },
    )
    max_rows: int | None = field(default=None, metadata={"help": "Use at most this many training rows."})
    max_extra_rows: int | None = field(
        default=None, metadata={"help": "Use at most this many rows of each --extra, drawn at random."}
    )
    max_eval_rows: int | None = None
    data_dir: str | os.PathLike | None = field(
        default=None,
        metadata={
            "help": "Local copies of the data sets known by name, read instead of the Hub: DIR/NAME/SPLIT.jsonl.gz."
        },
    )
    prompt_column: str | None = field(
        default=None,
        metadata={"help": "Column of the prompts, if the texts are replies to them; for heads that read replies."},
    )

    def __post_init__(self) -> None:
        if self.folds is not None and (self.folds < 0 or self.folds == 1):
            raise ProbeError(f"folds={self.folds} must be 0 (hold a part back) or at least 2")
        for name in ("max_rows", "max_extra_rows", "max_eval_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ProbeError(f"{name}={value} must be at least 1")
        if self.label_names is not None and (
            not all(map(str.strip, self.label_names)) or len(set(self.label_names)) < len(self.label_names)
        ):
            raise ProbeError(f"label_names={self.label_names} must be different names, none of them empty")
        for name in ("validation_share", "test_share"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ProbeError(f"{name}={value} must lie between 0 and 1")
        ways = [] if self.eval is None else [f"the validation rows of {self.eval}"]
        ways += [f"{name}={getattr(self, name)}" for name in ("folds", "validation_share") if getattr(self, name)]
        if len(ways) > 1:
            raise ProbeError(f"{ways[1]} and {ways[0]} cannot both be used: leave one out")
        if self.test is not None and self.test_share is not None:
            raise ProbeError(
                f"test_share={self.test_share} and the test rows of {self.test} cannot both be used: leave one out"
            )
        weights = self.extra_weights
        if not weights or min(weights) < 0 or not math.isfinite(sum(weights)) or not any(weights):
            raise ProbeError(f"extra_weights={weights} must be numbers of at least 0, not all of them 0")
        if weights != [1.0] and not self.extra:
            raise ProbeError(f"extra_weights={weights} are for the rows of extra, and there are none")
        known = find_benchmark(self.train)
        if known is not None:
            benchmark, split = known
            others = set(benchmark_splits(benchmark, self.data_dir)) - {split or "train"}
            if not ways and "validation" in others:
                self.eval = f"{benchmark.name}:validation"
            if self.test is None and self.test_share is None and "test" in others:
                self.test = f"{benchmark.name}:test"
        if self.validation_share is None:
            self.validation_share = VALIDATION_SHARE
        elif self.folds is None:
            self.folds = 0
        tested = find_benchmark(self.test) if self.test else None
        if tested is not None and not self.slice_columns:
            self.slice_columns = list(tested[0].slices)
        sources = [source for source in (self.train, self.eval, self.test, *self.extra) if source is not None]
        named = [find_benchmark(source) for source in sources]
        if all(named):
            asked = {benchmark.exchange[0] for benchmark, _ in named if benchmark.exchange}
            own = (self.text_column, self.label_column) != ("text", "label")
            if own or self.prompt_column not in (None, *asked):
                allowed = "".join(f" (allowed: prompt_column={name!r})" for name in sorted(asked))
                raise ProbeError(
                    f"{', '.join(sources)} have their own columns; text_column, label_column and prompt_column are for "
                    f"files{allowed}"
                )

    def read(self, seed: int) -> dict[str, LabelledTexts]:
        """Rows of `train`, `validation` and, where given, `test` and `extra`. With folds, the first two are the same object.

        Raises:
            ProbeError: a source cannot be read, the parts do not have the same labels, or there is one label alone to learn.
        """
        parts = {"train": self._read(self.train, "train")}
        held_back = None
        if self.test_share is not None:
            parts["train"], held_back = parts["train"].split(self.test_share, seed)
        parts["train"] = parts["train"].at_most(self.max_rows, seed)
        few = self.eval is None and len(parts["train"]) < FEW_ROWS
        folds = FOLDS * few if self.folds is None else self.folds
        if folds:
            parts["validation"] = parts["train"]
        elif self.eval is None:
            parts["train"], parts["validation"] = parts["train"].split(self.validation_share, seed)
        else:
            parts["validation"] = self._read(self.eval, "validation", parts["train"])
        if not folds:
            parts["validation"] = parts["validation"].at_most(self.max_eval_rows, seed)
        if held_back is not None:
            parts["test"] = held_back
        elif self.test is not None:
            parts["test"] = self._read(self.test, "test", parts["train"])
            if known := find_benchmark(self.test):  # a local copy may lack what the table would slice by
                absent = set(known[0].slices) - set(parts["test"].columns)
                self.slice_columns = [column for column in self.slice_columns if column not in absent]
        if self.slice_columns and "test" not in parts:
            raise ProbeError(
                f"slice_columns={self.slice_columns} are for test rows, and there are none: pass test or test_share as well"
            )
        if "test" in parts:
            for column in self.slice_columns:
                if column not in parts["test"].columns:
                    raise ProbeError(f"{self.test or self.train} has no column {column!r} to slice by")
            parts["test"] = parts["test"].at_most(self.max_eval_rows, seed)
        if self.extra:
            parts["extra"] = self._read_extra(parts, seed)
        self._tell_seen(parts)
        learned = np.concatenate([parts[name].labels for name in ("train", "extra") if name in parts])
        if parts["train"].problem_type == "single_label_classification" and len(np.unique(learned)) == 1:
            raise ProbeError(
                f"all rows to learn from have the label {parts['train'].label_names[learned[0]]!r}, so there is nothing to tell "
                "apart: give rows of another label as well"
            )
        names = parts["train"].label_names
        holds = learned.any(axis=0) if learned.ndim == 2 else np.bincount(learned, minlength=len(names))
        absent = [name for name, rows in zip(names, holds, strict=True) if not rows]
        if absent and parts["train"].problem_type != "regression":
            logger.warning(f"No row to learn from has the label {', '.join(absent)}: the head will hardly give it")
        return parts

    def _tell_seen(self, parts: dict[str, LabelledTexts]) -> None:
        """Warns of rows that are judged by although they are learned from: scores on these say little."""
        learned = set(map(str, parts["train"].texts))
        for name in ("validation", "test"):
            if name not in parts or parts[name] is parts["train"]:
                continue
            if seen := sum(str(text) in learned for text in parts[name].texts):
                logger.warning(
                    f"{seen} of {len(parts[name])} {name} rows have a text that is among the training rows: scores on them are "
                    "too good. Leave them out of one of the two"
                )

    def _read_extra(self, parts: dict[str, LabelledTexts], seed: int) -> LabelledTexts:
        """All sources of `extra`, without what is judged by.

        Raises:
            ProbeError: a source cannot be read, or no row is left.
        """
        train = parts["train"]
        judged = {text for name in ("validation", "test") if name in parts for text in map(str, parts[name].texts)}
        found = []
        for source in self.extra:
            known = find_benchmark(source)
            if known is None:
                rows = self._read(source, "train", train)
            else:
                split = "train" if "train" in benchmark_splits(known[0], self.data_dir) else "test"
                rows = read_labelled(source, split=split, data_dir=self.data_dir)
                if rows.problem_type != train.problem_type:
                    raise ProbeError(f"{source} is {rows.problem_type}, and {self.train} {train.problem_type}")
                rows = rows.renamed(train.label_names)
            allowed = rows.select([row for row, text in enumerate(rows.texts) if str(text) not in judged])
            found.append(allowed.at_most(self.max_extra_rows, seed))
            if left_out := len(rows) - len(allowed):
                logger.warning(f"{left_out} rows of {source} are left out: they are validation or test rows as well")
        if not any(map(len, found)):
            raise ProbeError(
                f"no rows of {', '.join(self.extra)} are left: all of them are validation or test rows as well (with folds every "
                "row of train is a validation row). Give other rows, or leave extra out"
            )
        return LabelledTexts(
            [text for rows in found for text in rows.texts],
            np.concatenate([rows.labels for rows in found]),
            train.label_names,
            train.problem_type,
            {},
        )

    def _read(self, source: str, split: str, like: LabelledTexts | None = None) -> LabelledTexts:
        names = self.label_names if like is None else like.label_names
        kind = self.problem_type if like is None else like.problem_type
        text, label, prompt = self.text_column, self.label_column, self.prompt_column
        if known := find_benchmark(source):
            text, label = "text", "label"
            if prompt is not None and known[0].exchange is not None:
                prompt = known[0].exchange[0]
        return read_labelled(source, text, label, names, kind, split, self.data_dir, prompt)
