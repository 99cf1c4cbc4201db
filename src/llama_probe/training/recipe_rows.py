"""The rows of a recipe: read, split, augmented, and divided among the heads of a run."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from transformers.utils import logging

from ..data.augmentation import augment, harmless_documents
from ..data.known import slices_of
from ..data.labelled_texts import LabelledTexts, Labels, check_labels
from ..data.row_files import Columns
from ..data.row_sources import SOURCE, Source
from ..distributed import on_main, world_size
from ..errors import ProbeError
from ..files import JSON, short_path
from .recipe import FEW_ROWS, FOLDS, VALIDATION_SHARE, Held, Recipe


logger = logging.get_logger(__name__)


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
    reader = _Reader(recipe, data_dir)
    held_validation, held_test = recipe.named_parts(data_dir)
    for source in recipe.train:
        source.find(data_dir)  # raises before anything is read
    # Closed also where a source is refused: the message begins a line.
    with logging.tqdm(recipe.train, desc="sources", unit=" sources", leave=False) as bar:
        by_source = {source.name: reader.read(source, "train") for source in bar}
    whole = _join([by_source[source.name] for source in recipe.train if not source.extra])
    extra = _join([by_source[source.name] for source in recipe.train if source.extra])
    if whole is None:
        raise ProbeError("train has no rows to judge by: at least one source needs extra=False and a licence")
    test = reader.join("test", held_test.sources, "test")
    if held_test.share:
        whole, test = whole.split(held_test.share, recipe.seed)
    test = None if test is None else test.at_most(held_test.max_rows, recipe.seed)
    plain = whole.at_most(recipe.max_rows, recipe.seed)
    folds = _number_of_folds(recipe, held_validation, plain)
    validation = reader.join("validation", held_validation.sources, "validation")
    if not folds:
        if validation is None:
            plain, validation = plain.split(held_validation.share or VALIDATION_SHARE, recipe.seed)
        validation = validation.at_most(held_validation.max_rows, recipe.seed)
    if extra:
        judged_texts = set(map(str, _join([plain if folds else validation, test]).texts))
        extra = _without(judged_texts, extra, "extra rows are skipped: they are validation or test rows as well")
        if not extra:
            raise ProbeError("the extra sources of train have no rows beside the validation and test rows")
    learned = _join([plain, extra])
    check_labels(", ".join(source.name for source in recipe.train), learned)
    documents = reader.documents()
    all_documents = list(documents.values())
    learned_texts = {str(text) for part in (learned, *all_documents) for text in part.texts}
    calibration = reader.calibration()
    for name, part in (("validation", validation), ("test", test), ("calibration", calibration)):
        if part is not None:
            _without(learned_texts, part, f"{name} rows have a text that is among the training rows")
    augmentations = recipe.augmentations
    learned_documents, held_documents = all_documents, []
    judged = validation
    has_documents = "document" in augmentations.names and validation is not None and not held_validation.sources
    if has_documents:
        learned_documents, held_documents = _split_documents(all_documents, recipe.seed)
    augmented = reader.augmented(plain, augmentations.names, _join(learned_documents), reader.system_prompts())
    train = LabelledTexts.join([learned, *augmented])
    if has_documents and (held_documents or not all_documents):
        validation = _join([validation, *reader.documents_around(validation, _join(held_documents))])
    measured = reader.measured(learned_texts)
    ablations: dict[str, Ablation] = {}
    for ablation, names in recipe.hold_out.items():
        held = {name: by_source.get(name) or documents.get(name) for name in names}
        held = {name: rows for name, rows in held.items() if rows}
        if not held:
            continue
        left_out = _rows_like(held, train, ablation)
        excluded = _rows_like(held, validation, ablation)
        for name in held.keys() - by_source.keys():  # a kind of documents: measured with and without requests inside
            held[name] = _join(reader.documents_around(judged, held[name]))
        ablations[ablation] = Ablation(left_out, excluded, held)
    _check_slice_columns(recipe, [measured, *(ablation.measured for ablation in ablations.values())])
    named_test = held_test.sources[0].rows if len(held_test.sources) == 1 else None
    # Augmentations are learned once.
    num_augmented = len(train) - len(learned)
    augmented_weights: list[list[float] | None] = []
    for name, part in zip(augmentations.names, augmented, strict=True):
        weight = augmentations.document_weight if name == "document" else 1
        augmented_weights += [None if weight == 1 else [float(weight)]] * len(part)
    by_name = {source.name: source for source in recipe.train}
    sources = [by_name[name] for name in train.columns[SOURCE][: len(learned)]]
    rows = RecipeRows(
        train=train,
        num_plain=len(plain),
        num_extra=len(extra or ()),
        validation=validation,
        test=test,
        folds=[fold.tolist() for fold in plain.folds(folds, recipe.seed)] if folds else [],
        calibration=calibration,
        measured=measured,
        repeats=[source.repeat for source in sources] + [1] * num_augmented,
        weights=[source.weights for source in sources] + augmented_weights,
        ablations=ablations,
        slices=slices_of({} if test is None else test.columns, named_test, recipe.slice_columns),
    )
    described = _describe(recipe, held_validation, held_test, rows)
    if judged is not validation:
        described["validation"]["documents"] = len(validation) - len(judged)
    if all_documents:
        described["documents"] = {
            "source": _names(augmentations.documents),
            "rows": sum(map(len, all_documents)),
        }
    if left_out := +reader.not_commercial:  # without the sources that were not touched
        described["train"]["not_commercial"] = dict(left_out)
    return replace(rows, described=described)


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


class _Reader:
    """Reads the sources of a recipe, with the labels of the first source."""

    def __init__(self, recipe: Recipe, data_dir: str | os.PathLike | None):
        self.recipe = recipe
        self.data_dir = data_dir
        self.labels = recipe.labels
        self.not_commercial: Counter[str] = Counter()
        # In the result of a tool, words of a user around a document are an instruction.
        self.introduces = recipe.head.get("token_scope") != "tool"

    def read(self, source: Source, split: str, labels: Labels | None = None) -> LabelledTexts:
        counted = None if self.recipe.licence is None else self.not_commercial
        rows = source.read(
            labels or self.labels, self.data_dir, split, self.recipe.seed, self.recipe.max_text, counted
        )
        if labels is not None or not len(rows):
            return rows
        if wrong := sorted(set(self.recipe.labels.flagged or ()) - set(rows.label_names)):
            raise ProbeError(f"flagged={wrong} must be among the labels {', '.join(rows.label_names)}")
        flagged = self.recipe.labels.flagged or rows.flagged
        if self.labels.names is None:
            self.labels = Labels(names=rows.label_names, flagged=flagged, problem_type=rows.problem_type)
        return replace(rows, flagged=flagged)

    def join(self, name: str, sources: Sequence[Source], split: str) -> LabelledTexts | None:
        """Return the rows of the sources of a section, None if there are no sources."""
        rows = _join([self.read(source, split) for source in sources])
        if sources and rows is None:
            raise ProbeError(f"{name} has no rows whose licence allows commercial use")
        return rows

    def measured(self, learned_texts: set[str]) -> dict[str, LabelledTexts]:
        """Return the rows to measure on, by source, without texts that are learned from."""
        rows_by_source = {}
        for source in self.recipe.measure.sources:
            rows = self.read(source, "test")
            warning = f"rows of {source.name} are learned from, and not measured"
            if unseen := _without(learned_texts, rows, warning):
                rows_by_source[source.name] = unseen
        return rows_by_source

    def calibration(self) -> LabelledTexts | None:
        sources = self.recipe.calibration.sources
        if not sources:
            return None
        names = self.labels.names or []
        flagged = self.labels.flagged
        harmless = next((name for name in names if name not in (flagged or ())), None)
        if len(names) != 2 or flagged is None or harmless is None:
            raise ProbeError(f"calibration needs one flagged label of two, not {flagged} of {', '.join(names)}")
        rows = self.join("calibration", [replace(source, label=harmless) for source in sources], "train")
        documents = self.recipe.calibration.documents
        if not documents:
            return rows
        count = round(documents * len(rows)) if isinstance(documents, float) else documents
        words = self.recipe.augmentations.document_words
        return _join([rows, harmless_documents(rows, count, self.recipe.seed, words, self.introduces)])

    def system_prompts(self) -> Sequence[str]:
        source = self.recipe.augmentations.system_prompts
        if source is None:
            return []
        return [text for text in self._unlabelled(source, "all").texts if isinstance(text, str)]

    def documents(self) -> dict[str, LabelledTexts]:
        """Return the texts of documents by source. Without sources documents are made of other rows."""
        sources = self.recipe.augmentations.documents
        by_source = {source.name: self._unlabelled(source, "train") for source in sources}
        by_source = {name: rows for name, rows in by_source.items() if len(rows)}
        if sources and not by_source:
            raise ProbeError("augmentations.documents has no rows whose licence allows commercial use")
        return by_source

    def augmented(
        self,
        rows: LabelledTexts,
        names: Sequence[str],
        documents: LabelledTexts | None,
        system_prompts: Sequence[str] = (),
    ) -> list[LabelledTexts]:
        """Return changed rows for each augmentation, with the settings of the recipe; see `augment`."""
        settings = self.recipe.augmentations
        return augment(
            rows,
            names,
            self.recipe.seed,
            system_prompts,
            settings.share,
            documents=documents,
            document_words=settings.document_words,
            introduces=self.introduces,
        )

    def documents_around(self, rows: LabelledTexts, documents: LabelledTexts | None) -> list[LabelledTexts]:
        """Return documents with rows inside, and documents alone: as many a row as there are for the training rows."""
        names = [name for name in self.recipe.augmentations.names if name == "document"]
        return self.augmented(rows, names, documents)

    def _unlabelled(self, source: Source, split: str) -> LabelledTexts:
        labels = Labels(names=["text", "none"], problem_type="single_label_classification")
        return self.read(replace(source, label="text"), split, labels)


def _join(parts: Sequence[LabelledTexts | None]) -> LabelledTexts | None:
    """Return the rows of all parts, None if there are no rows."""
    with_rows = list(filter(None, parts))
    return LabelledTexts.join(with_rows) if with_rows else None


def _split_documents(documents: Sequence[LabelledTexts], seed: int) -> tuple[list[LabelledTexts], list[LabelledTexts]]:
    """Return the texts of documents to learn from, and texts for the validation rows. A source of one text is learned from."""
    learned, held = [], []
    for rows in documents:
        if len(set(map(str, rows.texts))) < 2:
            learned.append(rows)
            continue
        more, less = rows.split(VALIDATION_SHARE, seed)
        learned.append(more)
        held.append(less)
    return learned, held


def _without(texts: set[str], rows: LabelledTexts, warning: str) -> LabelledTexts:
    """Return the rows whose text is not among `texts`, and warn of the number of the other rows."""
    left = rows.select([row for row, text in enumerate(rows.texts) if str(text) not in texts])
    if len(left) < len(rows):
        logger.warning(f"{len(rows) - len(left)} of {len(rows)} {warning}")
    return left


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
    if "extra" in described and (weights := next((source.weights for source in extra if source.weights), None)):
        described["extra"]["weights"] = weights
    return described
