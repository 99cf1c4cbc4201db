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
from torch import nn
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import ProbeError
from ..files import write_atomically
from ..heads.decision import NO_NUMBER_BECAUSE


BEST_NAME = "best.safetensors"  # of a checkpoint


@dataclass
class Progress:
    """The progress of a head until it stopped: scores of the evaluations, epochs, and weights of the best evaluation."""

    scores: list[float] = field(default_factory=list)  # larger is better; minus infinity if the head diverged
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


class BestEpochs(TrainerCallback):
    """Keeps the weights of each head's best evaluation, and gives them to the head at the end of the training."""

    def __init__(self, heads: Mapping[str, nn.Module]):
        self.heads = heads
        self.progress = {name: Progress() for name in heads}

    def note(self, scores: Mapping[str, float | None], epochs: float, patience: int | None) -> bool:
        """Note the scores of the heads that have not stopped, larger is better, None for a head that diverged.

        Returns:
            True if all heads have stopped.
        """
        for name, head in self.heads.items():
            if not self.progress[name].has_stopped(patience):
                score = scores[name]
                is_number = score is not None and math.isfinite(score)
                self.progress[name].note(score if is_number else -math.inf, epochs, head.state_dict())
        if all(head.best == -math.inf for head in self.progress.values()):
            raise ProbeError(f"none of {len(self.heads)} heads gives numbers: {NO_NUMBER_BECAUSE}")
        return all(head.has_stopped(patience) for head in self.progress.values())

    def on_train_end(self, args, state, control, **kwargs):
        """Give each head the weights of its best evaluation."""
        if args.load_best_model_at_end:
            self.load_weights()

    def load_weights(self) -> None:
        """Give each head the weights of its best evaluation, if there are any."""
        for name, head in self.heads.items():
            if self.progress[name].weights:
                head.load_state_dict(self.progress[name].weights)


def write_progress(path: Path, progress: Mapping[str, Progress]) -> None:
    """Write the progress of heads, with the weights of the best evaluations, into a file."""
    weights = {f"{name}/{key}": tensor for name, head in progress.items() for key, tensor in head.weights.items()}
    values = json.dumps({name: [head.scores, head.epochs] for name, head in progress.items()})
    write_atomically(path, lambda part: save_file(weights, part, metadata={"progress": values}))


def read_progress(path: Path) -> dict[str, Progress]:
    """Read the progress of heads from a file of `write_progress`."""
    with safe_open(path, framework="pt") as file:
        values = json.loads(file.metadata()["progress"])
    progress = {name: Progress(scores, epochs) for name, (scores, epochs) in values.items()}
    for key, tensor in load_file(path).items():
        name, _, parameter = key.rpartition("/")
        progress[name].weights[parameter] = tensor
    return progress


def last_checkpoint(folder: Path) -> str | None:
    """Return the last complete checkpoint: the Trainer writes its state last, so a kill leaves one without it."""
    whole = [str(path.parent) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    return max(whole, key=lambda path: int(path.rpartition("-")[2]), default=None)
