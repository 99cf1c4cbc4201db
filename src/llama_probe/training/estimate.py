"""The estimate of a run before it starts: rows, tokens, time and bytes on disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from ..backbone.capture import collect_hidden_states
from ..backbone.passes import Pace, Pass, fair_order, length_batches, work_of
from ..data.batches import plan_states
from ..data.disk_states import prompts_to_read
from ..errors import ProbeError
from ..heads.configuration import ProbeConfig
from .arguments import ProbeTrainingArguments


logger = logging.get_logger(__name__)

_TRIAL_SECONDS, _TRIAL_TOKENS = 3.0, 512  # a trial pass ends after the first batch that exceeds the time
# Time for heads and files, as a share of the pass; measured with one head of 8 layers on the demo backbone.
_OVERHEAD = 0.4


@dataclass
class Estimate:
    """The work of a run.

    Attributes:
        rows, tokens: prompts, and their tokens, each once.
        tokens_per_second: of the backbone on these rows, from a trial; long rows take more time a token.
        bytes: of the hidden states that are added on disk, if they are cached.
        passes: times that the backbone reads the rows: with a cache 1, or the share that is not there yet.
    """

    rows: int
    tokens: int
    tokens_per_second: float
    bytes: int = 0
    passes: float = 1

    @property
    def seconds(self) -> float:
        return (self.passes + _OVERHEAD * max(1.0, self.passes)) * self.tokens / self.tokens_per_second

    def __str__(self) -> str:
        time = f"about {timedelta(seconds=round(self.seconds))} at {self.tokens_per_second:,.0f} tokens a second"
        kept = f"{self.bytes / 1e9:.2f} GB of" if self.passes <= 1 else "no"
        return f"{self.rows:,} rows, {self.tokens:,} tokens, {time}, {kept} hidden states on disk"


def decide_caching(args: ProbeTrainingArguments, needed: int, folder: Path, further_passes: int = 0) -> bool:
    """Return True if hidden states are cached. With `cache_states="auto"`, warn of the reason if they are not.

    Args:
        needed: bytes of the states that are not there yet.
        further_passes: times that the rows are read beside the epochs.
    """
    free = free_bytes(folder)
    is_auto = args.cache_states == "auto"
    obstacles = {
        "include_for_metrics=['inputs'] needs token ids": "inputs" in args.include_for_metrics,
        f"they need {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB free in {folder}": needed >= 0.9 * free,
        "one epoch": is_auto and args.num_train_epochs + further_passes <= 1 and args.cache_dir is None,
    }
    obstacle = next((reason for reason, applies in obstacles.items() if applies), None)
    if obstacle and args.cache_states is True:
        raise ProbeError(f"cache_states=True: {obstacle}; cache_states=False runs the backbone each epoch")
    if obstacle and is_auto:
        logger.warning(f"hidden states are not cached ({obstacle}): the backbone runs each epoch")
    return bool(args.cache_states) and obstacle is None


def free_bytes(folder: Path) -> int:
    """Return the bytes that are free where a folder is, or will be."""
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    return shutil.disk_usage(there).free


@torch.no_grad()
def trial_pace(lm: nn.Module, prompts: Sequence[Sequence[int]], layers: Sequence[int]) -> Pace:
    """Return the pace of a backbone on some of the prompts, by a trial of a few seconds."""
    lengths = list(map(len, prompts))
    largest, *others = fair_order([Pass(rows) for rows in length_batches(lengths, _TRIAL_TOKENS)])
    runs = others or [largest]  # the longest row alone may take a minute
    pace = Pace()
    begin = time.monotonic()
    for number, run in enumerate([runs[0], *runs]):
        ids = pad_sequence([torch.tensor(prompts[row]) for row in run.rows], batch_first=True)
        start = time.monotonic()
        collect_hidden_states(lm, layers, ids)[-1].cpu()  # waits for an accelerator
        if number:  # the first pass also sets up what later passes use
            pace.note(work_of([run], lengths), time.monotonic() - start)
            if time.monotonic() - begin > _TRIAL_SECONDS:
                break
    return pace


def seconds_of_reading(pace: Pace, lm: nn.Module, config: ProbeConfig, items: Sequence[dict]) -> float:
    """Return the seconds in which one process computes the states that a head reads of the items of a `PromptDataset`."""
    if not items:
        return 0.0
    prompts = prompts_to_read(config, items)
    return pace.seconds_of(work_of(plan_states(lm, prompts, config), list(map(len, prompts.prompts))))
