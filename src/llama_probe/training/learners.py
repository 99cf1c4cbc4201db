"""A candidate of a search, and the learner that trains it on states that it is fed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from ..heads.configuration import ProbeConfig
from ..heads.probe import ProbeModel
from .arguments import WARMUP
from .loss import ProbeLoss
from .recipe import Recipe


@dataclass
class Candidate:
    """One configuration. Its number tells it from the other candidates, its seed is for weights and dropout."""

    number: int
    config: ProbeConfig
    loss: ProbeLoss
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    batch_size: int = 32
    seed: int = 0

    @classmethod
    def create(cls, number: int, config: ProbeConfig, recipe: Recipe, labels: np.ndarray, seed: int) -> Candidate:
        """Return the candidate of a complete recipe. Balanced class weights are those of `labels`."""
        rates = recipe.learning_rate, recipe.weight_decay, recipe.per_device_train_batch_size
        return cls(number, config, ProbeLoss.create(recipe, config, labels), *rates, seed)


@dataclass
class History:
    """Scores of a candidate: the validation metric after each epoch."""

    scores: list[float] = field(default_factory=list)
    best_epoch: int = 0  # counted from 1
    status: str = "live"  # then pruned (too far behind), stopped (no longer improving), finished, or failed (diverged)

    @property
    def best(self) -> float:
        """The best score; minus infinity before the first epoch and for a failed candidate, so that it ranks last."""
        return -math.inf if self.status == "failed" else max(self.scores, default=-math.inf)


class Learner:
    """A candidate in training on `rows` an epoch: head, optimizer, schedule, and gradients of the current batch."""

    def __init__(self, candidate: Candidate, rows: int, epochs: int, device: torch.device):
        self.candidate = candidate
        torch.manual_seed(candidate.seed)
        self.probe = ProbeModel(candidate.config).to(device)
        self.parameters = list(self.probe.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=candidate.learning_rate, weight_decay=candidate.weight_decay
        )
        self.steps_per_epoch = math.ceil(rows / candidate.batch_size)
        self.total_steps = epochs * self.steps_per_epoch
        self.steps = self.pending = 0
        self.history = History()
        self.best_weights: dict[str, torch.Tensor] = {}

    def feed(
        self, x: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor, row_weights: torch.Tensor | None = None
    ) -> None:
        """Take in rows. The head is updated whenever a batch is complete.

        Args:
            x (`[layers_read, rows, tokens, hidden_size]`): normalised states.
            mask (`[rows, tokens]`): tokens that count.
            labels (`[rows, ...]`): labels.
            row_weights (`[rows, W]`, *optional*): see `probe_loss`.
        """
        start, size = 0, self.candidate.batch_size
        self.probe.train()
        while start < len(labels):
            stop = min(len(labels), start + size - self.pending)
            # Dropout must not depend on which other candidates are live.
            torch.manual_seed(hash((self.candidate.seed, self.candidate.number, self.steps, self.pending)) % 2**63)
            output = self.probe.score(x[:, start:stop], mask[start:stop])
            output.row_weights = None if row_weights is None else row_weights[start:stop]
            part = labels[start:stop]
            # A share of the mean over the whole batch, which the loss counts in labels.
            self.candidate.loss(output, part, size * part.numel() / len(part)).backward()
            self.pending += stop - start
            start = stop
            if self.pending == size:
                self.flush()

    def end_epoch(self, value: float | None) -> None:
        """Note the validation metric of the epoch, None if it is not finite. Keep the weights if it is the best."""
        history = self.history
        if value is None:
            history.status = "failed"
            return
        if value > history.best or not history.scores:
            history.best_epoch = len(history.scores) + 1
            self.best_weights = {name: tensor.clone() for name, tensor in self.probe.state_dict().items()}
        history.scores.append(value)

    def flush(self) -> None:
        """Update the head with the rows since the last update; the last batch of an epoch may be smaller."""
        if not self.pending:
            return
        if self.pending < self.candidate.batch_size:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad *= self.candidate.batch_size / self.pending
        warmup = max(1, int(WARMUP * self.total_steps))
        if self.steps < warmup:
            factor = self.steps / warmup
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (self.steps - warmup) / max(1, self.total_steps - warmup)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.candidate.learning_rate * factor
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps, self.pending = self.steps + 1, 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of a checkpoint at the end of an epoch; only the best weights if training is over."""
        found = {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        if self.history.status == "live":
            found |= {f"weights.{name}": tensor for name, tensor in self.probe.state_dict().items()}
            for index, state in self.optimizer.state_dict()["state"].items():
                found |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    def restore(self, tensors: dict[str, torch.Tensor], epoch: int, history: History) -> None:
        """Load a checkpoint that was written after `epoch` epochs."""
        parts: dict[str, dict] = {"weights": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, rest = name.split(".", 1)
            parts[part][rest] = tensor
        self.steps, self.history, self.best_weights = epoch * self.steps_per_epoch, history, parts["best"]
        if history.status != "live":
            return
        self.probe.load_state_dict(parts["weights"])
        state = self.optimizer.state_dict()
        for name, tensor in parts["optimizer"].items():
            index, key = name.split(".")
            state["state"].setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(state)
