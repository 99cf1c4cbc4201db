"""The progress of heads in training: their scores, and the weights of the best evaluation, in memory and in checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import write_atomically


BEST_NAME = "best.safetensors"  # of a checkpoint


@dataclass
class Progress:
    """The progress of a head.

    Attributes:
        scores: the metric of each evaluation until the head stopped, larger is better; minus infinity if it diverged.
        epochs: epochs until then.
    """

    scores: list[float] = field(default_factory=list)
    epochs: float = 0.0
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def best(self) -> float:
        """The best score; minus infinity before the first."""
        return max(self.scores, default=-math.inf)

    def has_stopped(self, patience: int | None) -> bool:
        """Return True if there was no better score in `patience` evaluations."""
        waited = len(self.scores) - 1 - self.scores.index(self.best) if self.scores else 0
        return patience is not None and waited >= patience

    def note(self, score: float, epochs: float, weights: Mapping[str, torch.Tensor]) -> None:
        """Note an evaluation. Keep the weights if it is the best."""
        if score > self.best or not self.scores:
            self.weights = {
                name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()
            }
        self.scores.append(score)
        self.epochs = epochs


def write_progress(folder: Path, progress: Mapping[str, Progress]) -> None:
    """Write the progress of heads into a checkpoint."""
    weights = {f"{name}/{key}": tensor for name, head in progress.items() for key, tensor in head.weights.items()}
    values = json.dumps({name: [head.scores, head.epochs] for name, head in progress.items()})
    write_atomically(folder / BEST_NAME, lambda path: save_file(weights, path, metadata={"progress": values}))


def read_progress(folder: Path) -> dict[str, Progress]:
    """Read the progress of heads from a checkpoint."""
    with safe_open(folder / BEST_NAME, framework="pt") as file:
        values = json.loads(file.metadata()["progress"])
    progress = {name: Progress(scores, epochs) for name, (scores, epochs) in values.items()}
    for key, tensor in load_file(folder / BEST_NAME).items():
        name, _, parameter = key.rpartition("/")
        progress[name].weights[parameter] = tensor
    return progress


def last_checkpoint(folder: Path) -> str | None:
    """Return the last complete checkpoint: the Trainer writes its state last, so a kill leaves one without it."""
    whole = [str(path.parent) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    return max(whole, key=lambda path: int(path.rpartition("-")[2]), default=None)
