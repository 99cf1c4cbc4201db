"""Settings of a training run that are options of `llama-probe train` and `sweep`. This module is imported quickly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..backbone.loading import DtypeName
from ..data.sources import setting
from ..errors import ProbeError
from ..heads import get_probe_type
from ..heads.rules import RenderedFormat
from ..hub.folder import is_head_folder


MAX_LENGTH = 512  # tokens of a prompt, if the user does not say
CHECKPOINTS, SETUP_NAME = ".checkpoints", "setup.json"  # what a stopped run leaves in its folder
SWEEP_NAME, HEAD_FOLDER = "sweep.json", "head"  # what a sweep leaves in its folder


@dataclass
class RunOptions:
    """Settings of the place and the format in which a head is trained. The metadata of each field has its help.

    Attributes:
        backbone: `"demo"`, a folder or a Hub id. dtype: of its weights.
        resume: from the checkpoints of a stopped run. The number of processes may differ.
    """

    output: Path = field(metadata={"help": "Folder for the head."})
    backbone: str = "demo"
    prompt_format: RenderedFormat = setting("chat", "The model's chat template, or texts as they are.")
    system_prompt: str | None = setting(None, "A system turn of your own.")
    max_length: int | None = setting(MAX_LENGTH, "Cut prompts to this many tokens.")
    dtype: DtypeName = "auto"
    cache: bool = setting(True, "Run the backbone once and keep its hidden states on disk while training.")
    cache_dir: Path | None = setting(None, "Keep the hidden states here for later runs.")
    novelty: bool = setting(True, "Fit novelty: how unlike the training data a prompt is.")
    resume: bool = setting(False, "Resume a run that was stopped.")
    overwrite: bool = setting(False, "Replace the head that --output holds.")

    def __post_init__(self):
        if self.max_length is not None and self.max_length < 1:
            raise ProbeError(f"max_length={self.max_length} must be at least 1")
        if self.cache_dir is not None and self.cache is False:
            raise ProbeError(f"cache_dir={str(self.cache_dir)!r} and cache=False (--no-cache) exclude each other")

    def check_free(self) -> None:
        """Raise `ProbeError` if `output` holds a head that may not be replaced."""
        stopped = self.resume and (self.output / CHECKPOINTS / SETUP_NAME).is_file()
        if not self.overwrite and not stopped and is_head_folder(self.output):
            raise ProbeError(f"{self.output} holds a finished head: --overwrite replaces it")


@dataclass
class SweepOptions:
    """Settings of a search. The metadata of each field has its help."""

    # The default is that of arXiv 2601.13288.
    probe_types: Sequence[str] = setting(("pooling", "gate", "mha"), "A kind to search. Repeatable.", "probe-type")
    trials: int = setting(100, "Configurations to draw.")
    keep: float = setting(0.5, "Share of configurations that continues after the epochs 1, 2, 4, ...; 1 for all.")
    resume: bool = setting(False, "Resume a sweep that was stopped.")

    def __post_init__(self):
        for name in self.probe_types:
            get_probe_type(name)  # raises
        if self.trials < 1:
            raise ProbeError(f"trials={self.trials} must be at least 1")
        if not 0 < self.keep <= 1:
            raise ProbeError(f"keep={self.keep} must be above 0 and at most 1")
