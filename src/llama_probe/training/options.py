"""Settings of a training run that are options of `llama-probe train` and `sweep`. This module is imported quickly."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..data.sources import setting


@dataclass
class RunOptions:
    """Settings of the place and the format in which a head is trained. The metadata of each field has its help.

    Attributes:
        backbone: `"demo"`, a folder or a Hub id. dtype: of its weights.
        prompt_format, system_prompt, max_length: see `PromptFormat`.
        novelty: fit it if the head can tell it and there are rows enough.
        resume: from the checkpoints of a stopped run. The number of processes may differ.
    """

    output: Path = field(metadata={"help": "Folder for the head."})
    backbone: str = "demo"
    prompt_format: str = setting("chat", "chat (the model's template) or raw.")
    system_prompt: str | None = setting(None, "A system turn of your own.")
    max_length: int | None = setting(512, "Cut prompts to this many tokens.")
    dtype: str = "auto"
    cache: bool = setting(True, "Run the backbone once and keep its hidden states on disk while training.")
    cache_dir: Path | None = setting(None, "Keep the hidden states here for later runs.")
    novelty: bool = setting(True, "Fit novelty: how unlike the training data a prompt is.")
    resume: bool = setting(False, "Resume a run that was stopped.")
    overwrite: bool = setting(False, "Replace the head that --output holds.")
