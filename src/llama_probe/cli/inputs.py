"""Inputs of several commands: heads with their backbone, and rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import transformers

from ..backbone.loading import DEMO, DEMO_MODEL_ID, DtypeName, backbone_target, load_backbone
from ..data.known import find_benchmark
from ..data.labelled_texts import LabelledTexts, Labels
from ..data.prompts import PromptDataset, PromptFormat, Text, split_reply
from ..data.row_files import MAX_TEXT
from ..data.row_sources import Source
from ..errors import ProbeError
from ..heads.configuration import ProbeConfig
from ..heads.probe import ProbeModel
from ..hub.folder import check_output, is_head_folder, read_config_values
from ..hub.resolve import resolve_head
from ..serving.loading import read_heads
from .options import BACKBONE, COUNT


@dataclass(kw_only=True)
class HeadOptions:
    """Options of all commands that load heads and their backbone."""

    backbone: Annotated[str | None, BACKBONE] = None
    dtype: DtypeName = "auto"

    def backbone_of(self, probe: str) -> str:
        """Return the name of the backbone: the option, or else the name that the head records."""
        if self.backbone is not None:
            return self.backbone
        config = read_config_values(resolve_head(probe, only_config=True))
        recorded = config.get("base_model_name_or_path")
        return DEMO if recorded in (None, DEMO_MODEL_ID) else recorded

    def read(self, probes: Sequence[str]) -> dict[str, ProbeModel]:
        """Return heads by name, checked against the config of their backbone."""
        return read_heads(probes, backbone_target(self.backbone_of(probes[0])))

    def attach(
        self, heads: dict[str, ProbeModel], probe: str
    ) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
        """Load the backbone of the head `probe`. Return it with the heads, and its tokenizer."""
        from ..serving.auto import AutoModelForProbedGeneration  # takes seconds to import

        lm, tokenizer = load_backbone(self.backbone_of(probe), self.dtype)
        return AutoModelForProbedGeneration.from_causal_lm(lm, heads), tokenizer


class ScoredHead:
    """A head, and after `attach` its backbone `model` and the format `prompts` of its texts.

    A command checks its options and rows against the head before it loads the backbone.

    Args:
        max_length: number of tokens to which texts are cut; see `length_limit`.
    """

    model: transformers.PreTrainedModel
    prompts: PromptFormat

    def __init__(self, probe: str, options: HeadOptions, max_length: int | None = None):
        self.probe, self.options, self.max_length = probe, options, max_length
        self.heads = options.read([probe])
        (self.head,) = self.heads.values()

    def attach(self) -> None:
        """Load the backbone, and bind the head to it."""
        from ..serving.texts import format_to_score  # takes seconds to import

        self.model, tokenizer = self.options.attach(self.heads, self.probe)
        self.head.set_backbone(self.model)
        self.prompts = format_to_score(self.head.config, tokenizer, self.max_length)

    def dataset(self, texts: Sequence[Text]) -> PromptDataset:
        """Return texts without labels in the prompt format of the head."""
        return self.prompts.encode_for(self.head.config, texts)


@dataclass(kw_only=True)
class TextRows:
    """Options of commands that read rows of texts."""

    text_column: str = "text"
    prompt_column: str | None = None
    data_dir: Path | None = None
    max_text: Annotated[int, COUNT] = MAX_TEXT

    def texts(self, source: str, config: ProbeConfig, limit: int | None, split: str) -> list[Text]:
        """Return the texts of rows that need no labels, at most `limit` of them, at random.

        `text_column` is for files. A data set known by name has a column of its own.
        """
        labels = Labels(names=list(config.id2label.values()), problem_type="single_label_classification")
        own = {} if find_benchmark(source) is None else {"text_column": "text"}
        return self._read(source, config, labels, split, label=labels.names[0], max_rows=limit, **own).texts

    def _read(self, source: str, config: ProbeConfig, labels: Labels, split: str, **fields) -> LabelledTexts:
        columns = {"text_column": self.text_column, "prompt_column": self.prompt_column} | fields
        rows = Source(rows=source, **columns).read(labels, self.data_dir, split, max_text=self.max_text)
        for text in rows.texts if config.reads_reply else ():
            split_reply(text)  # raises
        return rows


@dataclass(kw_only=True)
class LabelledRows(TextRows):
    """Options of commands that read labelled rows."""

    label_column: str = "label"
    benign: bool = False

    def labelled(self, source: str, config: ProbeConfig) -> LabelledTexts:
        """Return the rows with the labels of a head."""
        names = list(config.id2label.values())
        label = names[1 - config.need_flagged_index("--benign")] if self.benign else None
        labels = Labels(names=names, problem_type=config.problem_type)
        return self._read(source, config, labels, "test", label=label, label_column=self.label_column)


def check_head_folder(probe: str, option: str) -> None:
    """Raise `ProbeError` unless `--probe` names a head folder on this machine, into which `option` can write."""
    if not is_head_folder(probe):
        raise ProbeError(f"{option} writes into a head folder on this machine, and --probe {probe} is none")
    check_output(probe)
