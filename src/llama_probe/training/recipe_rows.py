"""The rows of a recipe: read, split, augmented, and divided among the heads of a run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..data.known import slices_of
from ..data.labelled_texts import LabelledTexts, check_labels
from ..data.row_files import Columns
from ..data.row_sources import SOURCE, Source
from ..distributed import on_main, world_size
from ..errors import ProbeError
from ..files import JSON, short_path
from .recipe import FEW_ROWS, FOLDS, VALIDATION_SHARE, Held, Recipe
from .source_reader import SourceReader, join_rows, without_texts


@dataclass(frozen=True)
class Ablation:
    """A head that leaves out sources."""

    left_out: list[int]  # rows of `train`
    excluded_from_validation: list[int]  # rows of `validation`
    measured: dict[str, LabelledTexts]  # the rows of the sources, to measure the head on


@dataclass(frozen=True)
class RecipeRows:
    """The rows of a recipe, by what they are for. A part that the recipe does not have is None."""

    train: LabelledTexts  # plain rows, then rows of `extra` sources, then augmentations
    num_plain: int
    num_extra: int
    validation: LabelledTexts | None  # None with folds
    test: LabelledTexts | None
    folds: list[list[int]]  # row numbers of `train`
    calibration: LabelledTexts | None
    measured: dict[str, LabelledTexts]  # further rows, by source
    repeats: list[int]  # how often each row of `train` is learned in an epoch
    weights: list[list[float] | None]  # of each row of `train` in the loss, None for 1
    ablations: dict[str, Ablation]
    slices: Columns  # of the test rows
    described: dict[str, JSON] = field(default_factory=dict)  # `source` and `rows` of each part, for `results.json`

    @property
    def judged(self) -> LabelledTexts:
        """The rows that heads are chosen by: `validation`, or with folds the plain rows of `train`."""
        return self.validation if self.validation is not None else self.train.select(range(self.num_plain))

    def parts(self) -> dict[str, LabelledTexts]:
        """Return all rows by the name of their part."""
        named = {name: getattr(self, name) for name in ("train", "validation", "test", "calibration")}
        named |= {f"measure.{name}": rows for name, rows in self.measured.items()}
        for ablation, held in self.ablations.items():
            named |= {f"ablation-{ablation}.{name}": rows for name, rows in held.measured.items()}
        return {name: rows for name, rows in named.items() if rows is not None}

    def digest(self) -> dict[str, str]:
        """Return a digest of each part that heads learn from or are chosen by."""
        # null without weights, as in the setup of runs that earlier code has begun
        learned = json.dumps([self.repeats, self.weights if any(self.weights) else None, self.folds])
        learned += json.dumps({name: ablation.left_out for name, ablation in self.ablations.items()})
        digests = {"train": self.train.digest(), "learned": hashlib.sha256(learned.encode()).hexdigest()}
        return digests | ({} if self.validation is None else {"validation": self.validation.digest()})


def read_rows(recipe: Recipe, data_dir: str | os.PathLike | None = None) -> RecipeRows:
    """Read and divide the rows of a recipe."""
    if world_size() > 1:  # other ranks find the rows that the main rank has fetched
        on_main(lambda: bool(_read_rows(recipe, data_dir)))
    return _read_rows(recipe, data_dir)


def _read_rows(recipe: Recipe, data_dir: str | os.PathLike | None) -> RecipeRows:
    reader = SourceReader(recipe, data_dir)
    held_validation, held_test = recipe.named_parts(data_dir)
    by_source = reader.training_rows()
    split = _split(reader, by_source, held_validation, held_test)
    learned = join_rows([split.plain, split.extra])
    check_labels(", ".join(source.name for source in recipe.train), learned)
    documents = _read_documents(reader, split.validation is not None and not held_validation.sources)
    calibration = reader.calibration()
    learned_texts = {str(text) for part in (learned, *documents.by_source.values()) for text in part.texts}
    for name, part in (("validation", split.validation), ("test", split.test), ("calibration", calibration)):
        if part is not None:
            without_texts(learned_texts, part, f"{name} rows have a text that is among the training rows")
    augmented = reader.augmented(split.plain, recipe.augmentations.names, documents.learned, reader.system_prompts())
    train = LabelledTexts.join([learned, *augmented])
    around_validation = documents.around(reader, split.validation)
    validation = join_rows([split.validation, *around_validation])
    measured = reader.measured(learned_texts)
    ablations = _ablations(reader, by_source, documents, split, train, validation)
    _check_slice_columns(recipe, [measured, *(ablation.measured for ablation in ablations.values())])
    named_test = held_test.sources[0].rows if len(held_test.sources) == 1 else None
    by_name = {source.name: source for source in recipe.train}
    sources = [by_name[name] for name in train.columns[SOURCE][: len(learned)]]
    rows = RecipeRows(
        train=train,
        num_plain=len(split.plain),
        num_extra=len(split.extra or ()),
        validation=validation,
        test=split.test,
        folds=split.folds,
        calibration=calibration,
        measured=measured,
        repeats=[source.repeat for source in sources] + [1] * (len(train) - len(learned)),  # augmentations: once
        weights=[source.weights for source in sources] + _weights_of(recipe, augmented),
        ablations=ablations,
        slices=slices_of({} if split.test is None else split.test.columns, named_test, recipe.slice_columns),
    )
    described = _describe(recipe, held_validation, held_test, rows)
    if around_validation:
        described["validation"]["documents"] = sum(map(len, around_validation))
    if documents.by_source:
        num_documents = sum(map(len, documents.by_source.values()))
        described["documents"] = {"source": _names(recipe.augmentations.documents), "rows": num_documents}
    if left_out := +reader.not_commercial:  # without the sources that were not touched
        described["train"]["not_commercial"] = dict(left_out)
    return replace(rows, described=described)


@dataclass(frozen=True)
class _Split:
    """The rows of `train`, `validation` and `test`, divided. A part that the recipe does not have is None."""

    plain: LabelledTexts
    extra: LabelledTexts | None
    validation: LabelledTexts | None  # None with folds
    test: LabelledTexts | None
    folds: list[list[int]]  # row numbers of `plain`


def _split(
    reader: SourceReader, by_source: Mapping[str, LabelledTexts], held_validation: Held, held_test: Held
) -> _Split:
    """Hold back test rows, then validation rows, or divide the rows into folds."""
    recipe = reader.recipe
    whole = join_rows([by_source[source.name] for source in recipe.train if not source.extra])
    extra = join_rows([by_source[source.name] for source in recipe.train if source.extra])
    if whole is None:
        raise ProbeError("train has no rows to judge by: at least one source needs extra=False and a licence")
    test = reader.join("test", held_test.sources, "test")
    if held_test.share:
        whole, test = whole.split(held_test.share, recipe.seed)
    test = None if test is None else test.at_most(held_test.max_rows, recipe.seed)
    plain = whole.at_most(recipe.max_rows, recipe.seed)
    num_folds = _number_of_folds(recipe, held_validation, plain)
    validation = reader.join("validation", held_validation.sources, "validation")
    if not num_folds:
        if validation is None:
            plain, validation = plain.split(held_validation.share or VALIDATION_SHARE, recipe.seed)
        validation = validation.at_most(held_validation.max_rows, recipe.seed)
    if extra:
        judged_texts = set(map(str, join_rows([plain if num_folds else validation, test]).texts))
        extra = without_texts(judged_texts, extra, "extra rows are skipped: they are validation or test rows as well")
        if not extra:
            raise ProbeError("the extra sources of train have no rows beside the validation and test rows")
    folds = [fold.tolist() for fold in plain.folds(num_folds, recipe.seed)] if num_folds else []
    return _Split(plain, extra, validation, test, folds)


@dataclass(frozen=True)
class _Documents:
    """The texts of documents. Without sources of documents, a document is made of harmless rows of its own part."""

    by_source: Mapping[str, LabelledTexts]
    learned: LabelledTexts | None  # texts for the training rows
    held: LabelledTexts | None  # texts for the validation rows
    is_judged: bool  # documents are added to the validation rows

    def around(self, reader: SourceReader, validation: LabelledTexts | None) -> list[LabelledTexts]:
        """Return the documents among the validation rows."""
        return reader.documents_around(validation, self.held) if self.is_judged else []


def _read_documents(reader: SourceReader, is_held_back: bool) -> _Documents:
    """Read the texts of documents, and hold a part of each source back for validation rows that are held back too."""
    by_source = reader.documents()
    if not is_held_back or "document" not in reader.recipe.augmentations.names:
        return _Documents(by_source, join_rows(list(by_source.values())), None, is_judged=False)
    learned: list[LabelledTexts] = []
    held: list[LabelledTexts] = []
    for rows in by_source.values():
        if len(set(map(str, rows.texts))) < 2:  # a source of one text is learned from
            learned.append(rows)
            continue
        larger, smaller = rows.split(VALIDATION_SHARE, reader.recipe.seed)
        learned.append(larger)
        held.append(smaller)
    return _Documents(by_source, join_rows(learned), join_rows(held), is_judged=bool(held) or not by_source)


def _ablations(
    reader: SourceReader,
    by_source: Mapping[str, LabelledTexts],
    documents: _Documents,
    split: _Split,
    train: LabelledTexts,
    validation: LabelledTexts | None,
) -> dict[str, Ablation]:
    """Return the ablations of `hold_out`, without the ablations whose sources have no rows."""
    ablations: dict[str, Ablation] = {}
    for ablation, names in reader.recipe.hold_out.items():
        held = {name: by_source.get(name) or documents.by_source.get(name) for name in names}
        held = {name: rows for name, rows in held.items() if rows}
        if not held:
            continue
        measured = dict(held)
        for name in held.keys() - by_source.keys():  # a kind of documents: measured with and without requests inside
            measured[name] = join_rows(reader.documents_around(split.validation, held[name]))
        ablations[ablation] = Ablation(
            left_out=_rows_like(held, train, ablation),
            excluded_from_validation=_rows_like(held, validation, ablation),
            measured=measured,
        )
    return ablations


def _weights_of(recipe: Recipe, augmented: Sequence[LabelledTexts]) -> list[list[float] | None]:
    """Return the weights of augmented rows, None for 1."""
    weights: list[list[float] | None] = []
    for name, part in zip(recipe.augmentations.names, augmented, strict=True):
        weight = recipe.augmentations.document_weight if name == "document" else 1
        weights += [None if weight == 1 else [float(weight)]] * len(part)
    return weights


def _number_of_folds(recipe: Recipe, validation: Held, rows: LabelledTexts) -> int | None:
    """Return the number of folds of the recipe. `FOLDS` for few rows if the recipe does not say what validates."""
    shared = {"augmentations": recipe.augmentations.names, "hold_out": recipe.hold_out}  # rows of several folds
    used = [name for name, value in shared.items() if value]
    if validation.folds and used:
        raise ProbeError(f"{used[0]} cannot be used with folds: set validation.share, or validation.sources")
    is_open = validation.folds is None and not (validation.share or validation.sources or used)
    return FOLDS if is_open and len(rows) < FEW_ROWS else validation.folds


def _check_slice_columns(recipe: Recipe, measured: Sequence[dict[str, LabelledTexts]]) -> None:
    columns = {name for parts in measured for rows in parts.values() for name in rows.columns}
    if unknown := sorted(set(recipe.measure.slice_columns) - columns):
        raise ProbeError(f"measure.slice_columns={unknown} must be columns of the rows: {', '.join(sorted(columns))}")


def _rows_like(held: dict[str, LabelledTexts], rows: LabelledTexts, ablation: str) -> list[int]:
    """Return the numbers of the rows that have words or a whole text of the sources that an ablation leaves out."""
    texts = {str(text) for part in held.values() for text in part.texts}
    named = zip(rows.columns[SOURCE], rows.texts, strict=True)
    is_held = np.array([not held.keys().isdisjoint(names.split("+")) or str(text) in texts for names, text in named])
    left = rows.labels[~is_held]
    if not len(left) or (left.ndim == 1 and len(set(left.tolist())) < 2):
        raise ProbeError(f"hold_out.{ablation} leaves no rows of several labels to learn from, or to choose by")
    return np.flatnonzero(is_held).tolist()


def _names(sources: Sequence[Source]) -> str:
    return ", ".join(dict.fromkeys(short_path(source.rows) for source in sources))


def _describe(recipe: Recipe, validation: Held, test: Held, rows: RecipeRows) -> dict[str, JSON]:
    """Return `source` and `rows` of each part, and the `weights` of extra rows."""
    extra = [source for source in recipe.train if source.extra]
    share = f"{validation.share or VALIDATION_SHARE:.0%} of train"
    parts = {
        "train": (_names([source for source in recipe.train if not source.extra]), len(rows.train) - rows.num_extra),
        "validation": (
            f"{len(rows.folds)} folds of train" if rows.folds else _names(validation.sources) or share,
            len(rows.judged),
        ),
        "extra": (_names(extra), rows.num_extra),
        "test": (_names(test.sources) or f"{test.share or 0:.0%} of train", len(rows.test or ())),
        "calibration": (_names(recipe.calibration.sources), len(rows.calibration or ())),
    }
    described: dict[str, JSON] = {
        name: {"source": source, "rows": count} for name, (source, count) in parts.items() if count
    }
    weights = next((source.weights for source in extra if source.weights), None)
    if "extra" in described and weights:
        described["extra"]["weights"] = weights
    return described
