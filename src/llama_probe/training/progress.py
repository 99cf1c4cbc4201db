"""The progress of heads in training: their scores, and the weights of the best evaluation, in memory and in checkpoints."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import ProbeError
from ..files import write_atomically
from ..heads.decision import NO_NUMBER_BECAUSE


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


class KeepBest(TrainerCallback):
    """Keeps the best weights of each head, stops when none improves any more, and loads them at the end.

    Args:
        trainer: a `ProbeTrainer`, with `heads` and their `progress`.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = weakref.proxy(trainer)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if not self.trainer.is_in_train or not args.load_best_model_at_end:
            return
        progress, expected = self.trainer.progress, f"eval_{args.metric}"
        if expected not in metrics:
            raise ProbeError(f"metric_for_best_model={args.metric!r} must be one of: {', '.join(sorted(metrics))}")
        for name, head in self.trainer.heads.items():
            if not progress[name].has_stopped(args.patience):
                value = metrics.get(f"eval_{self.trainer.metric_name(name, args.metric)}")
                is_number = value is not None and math.isfinite(value)
                score = (value if args.greater_is_better else -value) if is_number else -math.inf
                progress[name].note(score, state.epoch, head.state_dict())
        if all(head.best == -math.inf for head in progress.values()):
            raise ProbeError(f"none of {len(progress)} heads gives numbers: {NO_NUMBER_BECAUSE}")
        control.should_training_stop |= all(head.has_stopped(args.patience) for head in progress.values())

    def on_train_end(self, args, state, control, **kwargs):
        """Load the best weights into each head that was evaluated."""
        for name, head in self.trainer.heads.items():
            if args.load_best_model_at_end and self.trainer.progress[name].weights:
                head.load_state_dict(self.trainer.progress[name].weights)


def write_progress(folder: Path, progress: Mapping[str, Progress]) -> None:
    """Write the progress of heads into a checkpoint."""
    weights = {f"{name}/{key}": tensor for name, head in progress.items() for key, tensor in head.weights.items()}
    values = json.dumps({name: [head.scores, head.epochs] for name, head in progress.items()})
    write_atomically({folder / BEST_NAME: lambda path: save_file(weights, path, metadata={"progress": values})})


def read_progress(folder: Path) -> dict[str, Progress]:
    """Read the progress of heads from a checkpoint."""
    with safe_open(folder / BEST_NAME, framework="pt") as file:
        values = json.loads(file.metadata()["progress"])
    progress = {name: Progress(scores, epochs) for name, (scores, epochs) in values.items()}
    for key, tensor in load_file(folder / BEST_NAME).items():
        name, _, parameter = key.partition("/")
        progress[name].weights[parameter] = tensor
    return progress


def last_checkpoint(folder: Path) -> str | None:
    """Return the last complete checkpoint: the Trainer writes its state last, so a kill leaves one without it."""
    whole = [str(path.parent) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    numbered = [path for path in whole if path.rpartition("-")[2].isdecimal()]
    return max(numbered, key=lambda path: int(path.rpartition("-")[2]), default=None)
