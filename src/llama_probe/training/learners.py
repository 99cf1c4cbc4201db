"""A candidate of a search, and the head that learns beside others from states that it is fed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from ..heads.configuration import ProbeConfig
from ..heads.decision import ProbeOutput
from ..heads.probe import ProbeModel
from .trainer import WARMUP, ProbeLoss


@dataclass
class Candidate:
    """One configuration.

    Attributes:
        number: tells it from the others.
        config: of the head.
        loss: of its training.
        learning_rate, weight_decay, batch_size: as in `TrainingArguments`.
        seed: of its weights and its dropout.
    """

    number: int
    config: ProbeConfig
    loss: ProbeLoss
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    batch_size: int = 32
    seed: int = 0


@dataclass
class History:
    """What became of a candidate.

    Attributes:
        scores: the validation metric after each epoch.
        best_epoch: counted from 1; 0 before the first.
        status: `"live"`, `"pruned"` (too far behind), `"stopped"` (no longer improving), `"finished"`, or `"failed"` (its
            scores were no numbers).
    """

    scores: list[float] = field(default_factory=list)
    best_epoch: int = 0
    status: str = "live"

    @property
    def best(self) -> float:
        """The best score; minus infinity before the first epoch, and of one that failed, so that it comes last."""
        return -math.inf if self.status == "failed" else max(self.scores, default=-math.inf)

    def note(self, value: float | None) -> bool:
        """Adds the score of an epoch, and says whether it is the best. `None` is that of a training that ran away."""
        if value is None:
            self.status = "failed"
            return False
        better = value > self.best or not self.scores
        self.scores.append(value)
        if better:
            self.best_epoch = len(self.scores)
        return better


class Learner:
    """A candidate in training: head, optimizer, schedule, and the gradients of a batch that is not complete yet."""

    def __init__(self, candidate: Candidate, rows: int, epochs: int, device: torch.device):
        self.candidate = candidate
        torch.manual_seed(candidate.seed)
        self.probe = ProbeModel(candidate.config).to(device)
        self.parameters = list(self.probe.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=candidate.learning_rate, weight_decay=candidate.weight_decay
        )
        self.total_steps = epochs * math.ceil(rows / candidate.batch_size)
        self.steps = 0
        self.pending = 0
        self.history = History()
        self.best_weights: dict[str, torch.Tensor] = {}

    def feed(
        self, x: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor, row_weights: torch.Tensor | None = None
    ) -> None:
        """Takes in rows, and updates the head whenever a batch is complete.

        Args:
            x (`[layers_read, rows, tokens, hidden_size]`): normalised states. mask (`[rows, tokens]`). labels: of the rows.
            row_weights (`[rows, W]`, *optional*): see `probe_loss`.
        """
        start, size = 0, self.candidate.batch_size
        self.probe.train()
        while start < len(labels):
            stop = min(len(labels), start + size - self.pending)
            # Dropout depends on the candidate and its step alone, not on which others are still alive.
            torch.manual_seed(hash((self.candidate.seed, self.candidate.number, self.steps, self.pending)) % 2**63)
            weights = None if row_weights is None else row_weights[start:stop]
            output = self.probe.score(x[:, start:stop], mask[start:stop], row_weights=weights)
            self._loss(output, labels[start:stop]).backward()
            self.pending += stop - start
            start = stop
            if self.pending == size:
                self._update()

    def end_epoch(self, value: float | None) -> None:
        """Notes the epoch's validation metric, and keeps the weights where it is the best."""
        if self.history.note(value):
            self.best_weights = {name: tensor.clone() for name, tensor in self.probe.state_dict().items()}

    def flush(self) -> None:
        """Updates the head with the last, smaller batch of an epoch."""
        if self.pending:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad *= self.candidate.batch_size / self.pending
            self._update()

    def _loss(self, output: ProbeOutput, labels: torch.Tensor) -> torch.Tensor:
        # The mean over a whole batch, of which these rows are a part.
        return self.candidate.loss(output, labels, self.candidate.batch_size * labels.numel() / len(labels))

    def _update(self) -> None:
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
        self.steps += 1
        self.pending = 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint at the end of an epoch needs."""
        found = {f"weights.{name}": tensor for name, tensor in self.probe.state_dict().items()}
        found |= {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    def restore(self, tensors: dict[str, torch.Tensor], steps: int, history: History) -> None:
        """Goes back to a checkpoint."""
        parts: dict[str, dict] = {"weights": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, rest = name.split(".", 1)
            parts[part][rest] = tensor
        self.probe.load_state_dict(parts["weights"])
        self.best_weights = parts["best"]
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.steps, self.history = steps, history
