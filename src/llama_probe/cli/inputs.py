"""Inputs of the commands that measure a head: the head with its backbone, and rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..backbone.loading import DtypeName, backbone_target, load_backbone
from ..data.labelled_texts import LabelledTexts, Labels
from ..data.prompts import PromptDataset, PromptFormat, Text
from ..data.row_files import MAX_TEXT
from ..data.row_sources import Source
from ..errors import ProbeError
from ..heads.configuration import ProbeConfig
from ..heads.match import check_backbone
from ..heads.probe import ProbeModel
from ..hub.folder import check_output, is_head_folder
from ..hub.transport import HubOptions
from .options import backbone_of


class ScoredHead:
    """A head whose backbone is loaded by `attach`: what the head refuses comes before that.

    Attributes:
        backbone: name of the backbone. Defaults to the one that the head records.
        prompts: format of the prompts, after `attach`.
    """

    prompts: PromptFormat

    def __init__(self, probe: str, backbone: str | None, dtype: DtypeName, trust_remote_code: bool):
        self.probe, self.dtype, self.backbone = probe, dtype, backbone_of(probe, backbone)
        options = HubOptions(trust_remote_code=trust_remote_code)
        self.head = ProbeModel.load_for(probe, backbone_target(self.backbone), options)

    def attach(self) -> None:
        """Load the backbone, and bind the head to it."""
        lm, tokenizer = load_backbone(self.backbone, self.dtype)
        check_backbone(self.probe, self.head.config, lm, alias=self.head.alias)
        self.head.to(lm.device).set_backbone(lm)
        self.prompts = PromptFormat.from_config(self.head.config, tokenizer)

    def dataset(self, texts: Sequence) -> PromptDataset:
        """Return texts without labels, rendered as the head was trained."""
        return self.prompts.encode_for(self.head.config, texts)


def read_rows(source: str, config: ProbeConfig, benign: bool, **options: Any) -> LabelledTexts:
    """Return labelled rows with the labels of a head."""
    names = list(config.id2label.values())
    label = names[1 - config.need_flagged_index("--benign")] if benign else None
    labels = Labels(names=names, problem_type=config.problem_type)
    return _read(labels, "test", rows=source, label=label, **options)


def read_texts(source: str, config: ProbeConfig, limit: int | None, split: str, **options: Any) -> list[Text]:
    """Return the texts of rows that need no labels; a random part of them if there are more than `limit`."""
    labels = Labels(names=list(config.id2label.values()), problem_type="single_label_classification")
    return _read(labels, split, rows=source, label=labels.names[0], max_rows=limit, **options).texts


def _read(
    labels: Labels, split: str, data_dir: str | os.PathLike | None = None, max_text: int = MAX_TEXT, **fields: Any
) -> LabelledTexts:
    return Source(**fields).read(labels, data_dir, split, max_text=max_text)


def check_head_folder(probe: str, option: str) -> None:
    """Raise `ProbeError` unless `--probe` names a head folder on this machine, which an option can write into."""
    if not is_head_folder(probe):
        raise ProbeError(f"{option} writes into a head folder on this machine, and --probe {probe} is none")
    check_output(probe)
