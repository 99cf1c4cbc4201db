"""`SourceReader`: the rows of the sources of a recipe, before they are divided."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from transformers.utils import logging

from ..data.augmentation import augment, harmless_documents
from ..data.labelled_texts import LabelledTexts, Labels
from ..data.row_sources import Source
from ..errors import ProbeError
from ..progress_bar import ProgressBar
from .recipe import Recipe


logger = logging.get_logger(__name__)


class SourceReader:
    """Reads the sources of a recipe, with the labels of the first source."""

    def __init__(self, recipe: Recipe, data_dir: str | os.PathLike | None):
        self.recipe = recipe
        self.data_dir = data_dir
        self.labels = recipe.labels
        self.not_commercial: Counter[str] = Counter()
        # In the result of a tool, words of a user around a document are an instruction.
        self.introduces = recipe.head.get("token_scope") != "tool"

    def training_rows(self) -> dict[str, LabelledTexts]:
        """Return the rows of each source of `train`, by its name."""
        for source in self.recipe.train:
            source.find(self.data_dir)  # raises before anything is read
        # Closed also where a source is refused: the message begins a line.
        rows = {}
        with ProgressBar(len(self.recipe.train), "sources", "sources") as bar:
            for source in self.recipe.train:
                rows[source.name] = self.read(source, "train")
                bar.update()
        return rows

    def read(self, source: Source, split: str, labels: Labels | None = None) -> LabelledTexts:
        """Return the rows of a source with the labels of the recipe, or with other labels."""
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
        rows = join_rows([self.read(source, split) for source in sources])
        if sources and rows is None:
            raise ProbeError(f"{name} has no rows whose licence allows commercial use")
        return rows

    def measured(self, learned_texts: set[str]) -> dict[str, LabelledTexts]:
        """Return the rows to measure on, by source, without texts that are learned from."""
        rows_by_source = {}
        for source in self.recipe.measure.sources:
            rows = self.read(source, "test")
            warning = f"rows of {source.name} are learned from, and not measured"
            if unseen := without_texts(learned_texts, rows, warning):
                rows_by_source[source.name] = unseen
        return rows_by_source

    def calibration(self) -> LabelledTexts | None:
        """Return the calibration rows with their documents, None if the recipe has none."""
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
        return join_rows([rows, harmless_documents(rows, count, self.recipe.seed, words, self.introduces)])

    def system_prompts(self) -> Sequence[str]:
        """Return the system prompts of the augmentation `system_prompt`."""
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


def join_rows(parts: Sequence[LabelledTexts | None]) -> LabelledTexts | None:
    """Return the rows of all parts, None if there are no rows."""
    with_rows = list(filter(None, parts))
    return LabelledTexts.join(with_rows) if with_rows else None


def without_texts(texts: set[str], rows: LabelledTexts, warning: str) -> LabelledTexts:
    """Return the rows whose text is not among `texts`, and warn of the number of the other rows."""
    left = rows.select([row for row, text in enumerate(rows.texts) if str(text) not in texts])
    if len(left) < len(rows):
        logger.warning(f"{len(rows) - len(left)} of {len(rows)} {warning}")
    return left
