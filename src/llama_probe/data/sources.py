"""Sources of the rows of a training run, and their split into parts."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from typing import Any

from transformers.utils import logging

from ..errors import ProbeError
from ..heads.rules import ProblemType
from .augmentation import AUGMENTATIONS, SHARE, augment, check_augmentations
from .files import MAX_TEXT
from .known import BENCHMARKS, Benchmark, find_benchmark
from .tables import TablePlace, read_table
from .texts import LabelledTexts, benchmark_splits, check_labels, read_labelled


logger = logging.get_logger(__name__)

FEW_ROWS, FOLDS, VALIDATION_SHARE = 400, 5, 0.15

ROWS_HELP = (
    f"a data set by name or NAME:SPLIT ({', '.join(BENCHMARKS)}), a csv, jsonl(.gz) or parquet file, a folder, or a Hub data set, "
    "ID@REVISION:CONFIGURATION:SPLIT or less of it"
)


def setting(default: Any, help: str, option: str | None = None) -> Any:
    """Declare a field of a dataclass that becomes an option of the command line.

    Args:
        default: the default, or a function that makes it.
        option: name of the option, if it is not that of the field.
    """
    given = {"default_factory" if callable(default) else "default": default}
    return field(**given, metadata={"help": help} | ({"option": option} if option else {}))


@dataclass
class DataSources:
    """Sources of the training, validation, test and extra rows. The metadata of each field has its help.

    If `train` is one data set known by name, `eval` and `test` default to its validation and test splits, and
    `slice_columns` to those of the table if `test` is known by name. A single source may be given as a text.

    Raises:
        ProbeError: a value is not allowed, or two of them exclude each other.
    """

    train: list[str] = field(metadata={"help": f"Training rows: {ROWS_HELP}. Given again, the rows of all of them."})
    eval: str | None = setting(
        None, "Validation rows; default: those of a named --train, else a part of the training rows."
    )
    test: str | None = setting(
        None, "Test rows, scored once at the end; nothing is chosen by them. Default: those of a named --train."
    )
    extra: list[str] = setting(
        list, "Further rows to train on, of another source; nothing is chosen or measured by them. May be given again."
    )
    extra_weights: list[float] = setting(
        lambda: [1.0],
        "Weight of the rows of --extra in the loss; the other rows weigh 1. Given again, the members of a head of "
        "several take turns: with 0 and 0.3 every other one learns without them.",
        "--extra-weight",
    )
    text_column: str = setting("text", "Column of the texts.")
    label_column: str = setting("label", "Column of the labels.")
    label_names: list[str] | None = setting(None, "Names of the labels 0, 1, ..., with commas.")
    flagged: list[str] | None = setting(
        None,
        "Label to find, by name: halt_on halts on it; of two labels, thresholds and metrics are for it. Repeatable. Default: that "
        "of a named --train, else none.",
        "--flag",
    )
    problem_type: ProblemType | None = setting(None, "What labels are. Default: told by the labels.")
    validation_share: float | None = setting(
        None,
        "Share of the training rows held back instead of --eval or --folds; "
        f"{VALIDATION_SHARE} where rows are held back and it is not given.",
    )
    test_share: float | None = setting(
        None, "Share of the training rows held back as test rows, before anything else, without --test."
    )
    folds: int | None = setting(
        0,
        "Without --eval: train on all rows, and validate each of this many folds by a head trained on the others; 0 "
        f"holds a share back. Default: {FOLDS} for fewer than {FEW_ROWS} rows, else 0.",
    )
    slice_columns: list[str] = setting(
        list, "Report test rows also by this column; a named data set may have its own.", "--slice-column"
    )
    max_rows: list[int] | None = setting(
        None,
        "Use at most this many training rows, drawn at random. Given again, this many of each --train in turn; 0 for all.",
    )
    augment: list[str] = setting(
        list,
        f"Add wrapped copies of training rows: {', '.join(AUGMENTATIONS)}. What is added comes from rows "
        "without a flagged label, and from --system-prompts. Repeatable.",
    )
    augment_share: float = setting(
        SHARE, "Copies that each --augment makes, as a share of the training rows: as many of each label."
    )
    system_prompts: str | None = setting(
        None, "File with texts for --augment system_prompt, in the column of the texts."
    )
    max_extra_rows: int | None = setting(None, "Use at most this many rows of each --extra, drawn at random.")
    max_eval_rows: int | None = None
    data_dir: str | os.PathLike | None = setting(
        None, "Local copies of the data sets known by name, read instead of the Hub: DIR/NAME/SPLIT.jsonl.gz."
    )
    prompt_column: str | None = setting(
        None, "Column of the prompts, where the texts are the replies to them; for heads that read replies."
    )
    max_text: int = setting(
        MAX_TEXT, "Characters of the longest text; a file may have 512 times as many. Guards the memory."
    )

    def __post_init__(self) -> None:
        self.train = [self.train] if isinstance(self.train, str) else self.train
        self.max_rows = [self.max_rows] if isinstance(self.max_rows, int) else self.max_rows
        self._check()
        if len(self.train) == 1 and (known := find_benchmark(self.train[0])):
            name, others = known[0].name, set(benchmark_splits(known[0], self.data_dir)) - {known[1] or "train"}
            if not (self.eval or self.folds or self.validation_share) and "validation" in others:
                self.eval = f"{name}:validation"
            if self.test is None and self.test_share is None and "test" in others:
                self.test = f"{name}:test"
        if self.validation_share is None:
            self.validation_share = VALIDATION_SHARE
        elif self.folds is None:
            self.folds = 0
        if not self.slice_columns and (tested := self._benchmark(self.test)):
            self.slice_columns = list(tested.slices)
        sources = [source for source in (*self.train, self.eval, self.test, *self.extra) if source is not None]
        files = [source for source in sources if find_benchmark(source) is None]
        for source in files:
            TablePlace.parse(source)  # raises for a file that does not exist
        prompts = {known.exchange[0] for known in map(self._benchmark, sources) if known and known.exchange}
        own = (self.text_column, self.label_column) != ("text", "label") or self.prompt_column not in (None, *prompts)
        if own and not files:
            raise ProbeError(f"text_column, label_column, prompt_column are for files, not for {', '.join(sources)}")

    def _check(self) -> None:
        if self.folds is not None and (self.folds < 0 or self.folds == 1):
            raise ProbeError(f"folds={self.folds} must be 0 (hold a part back) or at least 2")
        limits = self.max_rows
        if limits is not None and (len(limits) not in (1, len(self.train)) or min(limits) < (len(limits) == 1)):
            raise ProbeError(f"max_rows={limits} must be one number from 1, or one from 0 for each of train")
        check_augmentations(self.augment, self.augment_share, self.system_prompts is not None)
        if self.system_prompts is not None and "system_prompt" not in self.augment:
            raise ProbeError(f"system_prompts={self.system_prompts!r} needs augment=['system_prompt']")
        for name in ("max_text", "max_extra_rows", "max_eval_rows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ProbeError(f"{name}={value} must be at least 1")
        for name in ("validation_share", "test_share"):
            if (value := getattr(self, name)) is not None and not 0 < value < 1:
                raise ProbeError(f"{name}={value} must lie between 0 and 1")
        for group in (("eval", "folds", "validation_share"), ("test", "test_share")):
            given = [f"{name}={getattr(self, name)}" for name in group if getattr(self, name)]
            if len(given) > 1:
                raise ProbeError(f"{' and '.join(given)} cannot be used together: leave one out")
        weights = self.extra_weights
        if min(weights) < 0 or not 0 < sum(weights) < math.inf or (weights != [1.0] and not self.extra):
            raise ProbeError(f"extra_weights={weights} must be at least 0, not all 0, and needs extra")

    @staticmethod
    def _benchmark(source: str | None) -> Benchmark | None:
        known = find_benchmark(source)
        return None if known is None else known[0]

    def read(self, seed: int) -> dict[str, LabelledTexts]:
        """Return the rows of `train`, `validation` and, if given, `test` and `extra`.

        With folds, `train` and `validation` are the same object.

        Args:
            seed: seed of the splits and of the rows that are drawn.

        Raises:
            ProbeError: a source cannot be read, the parts do not have the same labels, or there is one label alone to
                learn.
        """
        parts = self._read_train(seed)
        train = parts.pop("train")
        few = self.eval is None and len(train) < FEW_ROWS
        if few if self.folds is None else self.folds:
            validation = train
            if self.augment:
                raise ProbeError(f"augment={self.augment} cannot be used with folds: set eval or validation_share")
        elif self.eval is None:
            train, validation = train.split(self.validation_share, seed)
        else:
            validation = self._read(self.eval, "validation", train)
        if validation is not train:
            validation = validation.at_most(self.max_eval_rows, seed)
        if self.test is not None:
            parts["test"] = self._read(self.test, "test", train)
        tested, there = self._benchmark(self.test), parts["test"].columns if "test" in parts else {}
        missing = [column for column in self.slice_columns if column not in there]
        if not set(missing) <= set(tested.slices if tested else ()):  # a local copy may lack a slice of the table
            raise ProbeError(f"slice_columns={missing} must be columns of test rows: {', '.join(there) or 'none'}")
        self.slice_columns = [column for column in self.slice_columns if column in there]
        tests = {name: rows.at_most(self.max_eval_rows, seed) for name, rows in parts.items()}
        parts = {"train": train, "validation": validation, **tests}
        if self.extra:
            parts["extra"] = self._read_extra(parts, seed)
        self._check_parts(parts)
        if self.augment:
            parts["train"] = self._augment(train, seed)
        return parts

    def _read_train(self, seed: int) -> dict[str, LabelledTexts]:
        """Return the rows of all sources of `train`, and of `test` if a share of these is held back."""
        found: dict[str, list[LabelledTexts]] = {}
        limits = self.max_rows or [0]
        several = len(limits) > 1
        for number, source in enumerate(self.train):
            rows = self._read(source, "train", found["train"][0] if found else None)
            if self.test_share is not None:
                rows, test = rows.split(self.test_share, seed)
                found.setdefault("test", []).append(test)
            found.setdefault("train", []).append(rows.at_most(limits[number] or None if several else None, seed))
        parts = {name: LabelledTexts.join(each) for name, each in found.items()}
        if not several:
            parts["train"] = parts["train"].at_most(limits[0] or None, seed)
        return parts

    def _augment(self, rows: LabelledTexts, seed: int) -> LabelledTexts:
        prompts = []
        if "system_prompt" in self.augment:
            columns, _ = read_table(self.system_prompts, text_columns=[self.text_column])
            if self.text_column not in columns:
                raise ProbeError(f"system_prompts={self.system_prompts!r} has no column {self.text_column!r}")
            prompts = [text for text in columns[self.text_column] if text]
        return augment(rows, self.augment, seed, prompts, self.augment_share)

    def _check_parts(self, parts: dict[str, LabelledTexts]) -> None:
        """Check that there is something to learn, and warn of rows and labels that make the scores misleading."""
        train = parts["train"]
        texts = set(map(str, train.texts))
        for name in ("validation", "test"):
            rows = parts.get(name, train)
            if rows is not train and (seen := sum(str(text) in texts for text in rows.texts)):
                logger.warning(f"{seen} of {len(rows)} {name} rows have a text that is among the training rows")
        learned = [parts[name] for name in ("train", "extra") if name in parts]
        check_labels(", ".join(self.train), LabelledTexts.join(learned))

    def _read_extra(self, parts: dict[str, LabelledTexts], seed: int) -> LabelledTexts:
        """Return the rows of all sources of `extra` without validation and test rows."""
        train = parts["train"]
        judged = {str(text) for name in ("validation", "test") if name in parts for text in parts[name].texts}
        found = []
        for source in self.extra:
            benchmark = self._benchmark(source)
            has_train = benchmark is None or "train" in benchmark_splits(benchmark, self.data_dir)
            rows = self._read(source, "train" if has_train else "test", train)
            allowed = rows.select([row for row, text in enumerate(rows.texts) if str(text) not in judged])
            found.append(allowed.at_most(self.max_extra_rows, seed))
            if left_out := len(rows) - len(allowed):
                logger.warning(f"{left_out} rows of {source} are skipped: they are validation or test rows as well")
        if not any(map(len, found)):
            raise ProbeError(f"extra={self.extra} has no rows beside the validation and test rows")
        return replace(LabelledTexts.join(found), columns={})

    def _read(self, source: str, split: str, like: LabelledTexts | None = None) -> LabelledTexts:
        names = self.label_names if like is None else like.label_names
        kind = self.problem_type if like is None else like.problem_type
        text, label, prompt = self.text_column, self.label_column, self.prompt_column
        if benchmark := self._benchmark(source):
            text, label = "text", "label"
            if prompt is not None and benchmark.exchange is not None:
                prompt = benchmark.exchange[0]
        rows = read_labelled(source, text, label, names, kind, split, self.data_dir, prompt, self.max_text)
        if wrong := sorted(set(self.flagged or ()) - set(rows.label_names)):
            raise ProbeError(f"flagged={wrong} must be labels of {source}: {', '.join(rows.label_names)}")
        return replace(rows, flagged=self.flagged or rows.flagged)
