"""The options of a head that a command runs over rows, and its data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..backbone.loading import DtypeName, backbone_target, load_backbone
from ..data.prompts import PromptFormat
from ..data.sources import setting
from ..data.states import PromptDataset
from ..heads.match import check_backbone
from ..heads.probe import ProbeModel
from ..hub.resolve import resolve_head
from .options import BACKBONE, DTYPE, PROBE, TRUST_REMOTE_CODE, backbone_of


@dataclass
class HeadOptions:
    """A head and its backbone, loaded in two steps: what the head refuses comes before the backbone.

    Attributes:
        backbone: defaults to the one that the head records, which `load` sets.
        head, prompts: set by `load` and `attach`.
    """

    probe: str = field(metadata={"help": PROBE})
    backbone: str | None = setting(None, f"{BACKBONE} Default: the head's own.")
    dtype: DtypeName = setting("auto", DTYPE)
    trust_remote_code: bool = setting(False, TRUST_REMOTE_CODE, "trust-remote-code")
    head: ProbeModel = field(init=False, repr=False)
    prompts: PromptFormat = field(init=False, repr=False)

    def load(self) -> ProbeModel:
        """Load the head without its backbone."""
        self.backbone = backbone_of(self.probe, self.backbone)
        folder = resolve_head(self.probe, backbone_target(self.backbone))
        self.head = ProbeModel.from_pretrained(folder, trust_remote_code=self.trust_remote_code)
        return self.head

    def attach(self) -> None:
        """Load the backbone, and bind the head to it."""
        lm, tokenizer = load_backbone(self.backbone, self.dtype)
        check_backbone(self.probe, self.head.config, lm)
        self.head.to(lm.device).set_backbone(lm)
        self.prompts = PromptFormat.from_config(self.head.config, tokenizer)

    def dataset(self, texts: Sequence) -> PromptDataset:
        """Return texts without labels, rendered as the head was trained."""
        ids, masks, _ = self.prompts.encode_for(self.head.config, texts)
        return PromptDataset(ids, np.zeros(len(ids)), masks)
