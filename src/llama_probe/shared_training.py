"""Many heads trained side by side: the backbone runs over a batch once, and every live head learns from its states."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .capture import collect_hidden_states, find_decoder
from .configuration import ProbeConfig
from .decision import ProbeOutput, probabilities
from .errors import ProbeError
from .features import ProbeCollator, counted_tokens
from .files import write_atomically
from .heads import get_probe_type
from .metrics import score
from .probe import ProbeModel
from .training import ProbeLoss


CHECKPOINT_NAME = "checkpoint.safetensors"
_WARMUP = 0.1  # share of the steps, as in training_arguments


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
        status: `"live"`, `"pruned"` (too far behind), `"stopped"` (no longer improving) or `"finished"`.
    """

    scores: list[float] = field(default_factory=list)
    best_epoch: int = 0
    status: str = "live"

    @property
    def best(self) -> float:
        """The best score; minus infinity before the first epoch."""
        return max(self.scores, default=-math.inf)


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

    def feed(self, x: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> None:
        """Takes in rows, and updates the head whenever a batch is complete.

        Args:
            x (`[layers_read, rows, tokens, hidden_size]`): normalised states. mask (`[rows, tokens]`). labels: of the rows.
        """
        start, size = 0, self.candidate.batch_size
        self.probe.train()
        while start < len(labels):
            stop = min(len(labels), start + size - self.pending)
            # Dropout depends on the candidate and its step alone, not on which others are still alive.
            torch.manual_seed(hash((self.candidate.seed, self.candidate.number, self.steps, self.pending)) % 2**63)
            output = self.probe.score(x[:, start:stop], mask[start:stop])
            self._loss(output, labels[start:stop]).backward()
            self.pending += stop - start
            start = stop
            if self.pending == size:
                self._update()

    def end_epoch(self, value: float) -> None:
        """Uses up what is pending, and notes the epoch's validation metric."""
        history = self.history
        history.scores.append(value)
        if value > max(history.scores[:-1], default=-math.inf) or not self.best_weights:
            history.best_epoch = len(history.scores)
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
        warmup = max(1, int(_WARMUP * self.total_steps))
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


class SharedTraining:
    """Trains candidates in lockstep on one pass of the backbone an epoch.

    After the epochs 1, 2, 4, ... only the better share of the live candidates goes on (successive halving, Jamieson and
    Talwalkar, arXiv 1502.07943); one that has not improved for `patience` epochs stops by itself. Every epoch ends with a
    checkpoint, from which a killed run goes on as if nothing had happened.

    Args:
        candidates: all for the same backbone and labels. They may differ in everything else.
        train, validation: both `PromptDataset` (with `lm`) or both `StateDataset`.
        metric: what candidates are compared by; larger is better.
        epochs: at most.
        folder: for the checkpoint, which holds heads and no states.
        lm: the frozen backbone; `None` where the states are cached.
        keep: share that goes on, 0 < keep <= 1; 1 prunes nothing.
        patience: epochs.
        seed: of the order of the rows.
        batch_tokens: tokens, padding included, of a pass of the backbone.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        train: Dataset,
        validation: Dataset,
        metric: str,
        epochs: int,
        folder: Path,
        lm: nn.Module | None = None,
        keep: float = 0.5,
        patience: int = 3,
        seed: int = 0,
        batch_tokens: int = 4096,
    ):
        if not candidates:
            raise ProbeError("there is nothing to train: no candidates")
        for candidate in candidates:
            if get_probe_type(candidate.config.probe_type).convex:
                raise ProbeError(
                    f"probe_type={candidate.config.probe_type!r} is fitted as a convex problem, and cannot be trained beside "
                    "others: use llama-probe train"
                )
        if not 0 < keep <= 1:
            raise ProbeError(f"keep={keep} must be above 0 and at most 1")
        self.train, self.validation, self.metric = train, validation, metric
        self.epochs, self.folder, self.lm = epochs, Path(folder), lm
        self.keep, self.patience, self.seed, self.batch_tokens = keep, patience, seed, batch_tokens
        device = torch.device("cpu") if lm is None else find_decoder(lm).device
        self.learners = [Learner(candidate, len(train), epochs, device) for candidate in candidates]
        self.epoch = 0

    @property
    def live(self) -> list[Learner]:
        """Those that still learn."""
        return [learner for learner in self.learners if learner.history.status == "live"]

    def run(self, resume: bool = False) -> list[Learner]:
        """Trains until no candidate is live.

        Args:
            resume: go on from the checkpoint in `folder`, where there is one.

        Returns:
            All learners, best first, with their best weights loaded.

        Raises:
            ProbeError: the checkpoint is one of other candidates.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if resume and (self.folder / CHECKPOINT_NAME).is_file():
            self._restore()
        with tqdm(total=self.epochs, initial=self.epoch, desc="epochs", unit=" epochs") as progress:
            while self.live and self.epoch < self.epochs:
                self._train_epoch()
                for learner, value in zip(self.live, self._validate(), strict=True):
                    learner.end_epoch(value)
                self.epoch += 1
                self._thin_out()
                self._save()
                leader = max(self.learners, key=lambda learner: learner.history.best)
                progress.update()
                progress.set_postfix_str(f"{len(self.live)} live, best {self.metric} {leader.history.best:.4f}")
        ranked = sorted(self.learners, key=lambda learner: -learner.history.best)
        for learner in ranked:
            learner.probe.load_state_dict(learner.best_weights)
            learner.probe.eval()
        return ranked

    def run_unseen(self) -> list[Learner]:
        """Trains all candidates for all epochs without a look at the validation rows: for rows too few to hold any back.

        Returns:
            The learners in the order of the candidates, with their last weights.
        """
        for _ in range(self.epochs):
            self._train_epoch()
            self.epoch += 1
        for learner in self.learners:
            learner.probe.eval()
        return self.learners

    def _train_epoch(self) -> None:
        learners = self.live
        rng = np.random.default_rng((self.seed, self.epoch))
        rows = rng.permutation(len(self.train))
        batches = self._batches(self.train, rows)
        rng.shuffle(batches)
        bar = tqdm(total=len(self.train), desc=f"epoch {self.epoch + 1}", unit=" rows", leave=False)
        for labels, shared, mask in self._states(self.train, batches):
            for learner in learners:
                learner.feed(shared(learner.probe), mask, labels)
            bar.update(len(labels))
        bar.close()
        for learner in learners:
            learner.flush()

    def _validate(self) -> list[float]:
        learners = self.live
        batches = self._batches(self.validation, np.arange(len(self.validation)))
        logits: list[list[torch.Tensor]] = [[] for _ in learners]
        for _, shared, mask in self._states(self.validation, batches):
            for found, learner in zip(logits, learners, strict=True):
                learner.probe.eval()
                with torch.no_grad():
                    found.append(learner.probe.score(shared(learner.probe), mask).logits.cpu())
        labels = np.stack([self.validation[row]["labels"] for batch in batches for row in batch])
        values = []
        for found, learner in zip(logits, learners, strict=True):
            config = learner.probe.config
            values.append(score(probabilities(torch.cat(found), config).numpy(), labels, config)[self.metric])
        if None in values:
            raise ProbeError(f"{self.metric} is not defined on the validation rows: no label both occurs and does not")
        return values

    def _batches(self, dataset: Dataset, rows: np.ndarray) -> list[list[int]]:
        """Rows of like length together, so that little of a pass is padding."""
        lengths = [len(dataset[int(row)]["input_ids"]) for row in rows]
        batches: list[list[int]] = []
        width = 0
        for index in np.argsort(lengths, kind="stable"):
            width = max(width, lengths[index])
            if not batches or (len(batches[-1]) + 1) * width > self.batch_tokens:
                batches.append([])
                width = lengths[index]
            batches[-1].append(int(rows[index]))
        return batches

    def _states(self, dataset: Dataset, batches: list[list[int]]) -> Iterator[tuple]:
        """For each batch its labels, a function from a head to the states that it reads, and the mask."""
        collate = ProbeCollator()
        for rows in batches:
            batch = collate([dataset[row] for row in rows])
            config = self.learners[0].probe.config
            if self.lm is None:
                x, mask = batch["hidden_states"].transpose(0, 1), batch["attention_mask"].bool()
            else:
                ids, attention_mask = batch["input_ids"], batch["attention_mask"]
                mask = counted_tokens(config, batch)
                layers = range(config.num_hidden_layers + 1)
                x = torch.stack(collect_hidden_states(self.lm, layers, ids, attention_mask))
            yield batch["labels"], _Shared(x), mask.to(self.learners[0].probe.device)

    def _thin_out(self) -> None:
        for learner in self.live:
            if self.epoch >= self.epochs:
                learner.history.status = "finished"
            elif self.epoch - learner.history.best_epoch >= self.patience:
                learner.history.status = "stopped"
        live = sorted(self.live, key=lambda learner: -learner.history.best)
        if self.epoch & (self.epoch - 1) == 0:  # 1, 2, 4, ...
            for learner in live[max(1, math.ceil(self.keep * len(live))) :]:
                learner.history.status = "pruned"

    def _save(self) -> None:
        tensors = {}
        for learner in self.learners:
            kept = learner.tensors()
            if learner.history.status != "live":
                kept = {name: tensor for name, tensor in kept.items() if name.startswith("best.")}
            tensors |= {f"{learner.candidate.number}.{name}": tensor for name, tensor in kept.items()}
        numbers = {
            learner.candidate.number: {"steps": learner.steps, **vars(learner.history)} for learner in self.learners
        }
        # One file, so that a process that dies leaves either this epoch or the one before.
        state = json.dumps({"epoch": self.epoch, "learners": numbers})
        write_atomically(
            {self.folder / CHECKPOINT_NAME: lambda path: save_file(tensors, path, metadata={"state": state})}
        )

    def _restore(self) -> None:
        path = self.folder / CHECKPOINT_NAME
        by_number = {str(learner.candidate.number): learner for learner in self.learners}
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        try:
            with safe_open(path, framework="pt") as file:
                state = json.loads((file.metadata() or {})["state"])
                if set(state["learners"]) != set(by_number):
                    raise ProbeError(f"{path} is of other candidates: give another folder, or remove it")
                for key in file.keys():  # noqa: SIM118 - not a dict
                    number, name = key.split(".", 1)
                    tensors.setdefault(number, {})[name] = file.get_tensor(key)
        except (SafetensorError, KeyError, OSError) as error:
            raise ProbeError(f"{path} is damaged or no checkpoint: {error}; remove it to begin anew") from None
        self.epoch = state["epoch"]
        for number, learner in by_number.items():
            values = state["learners"][number]
            steps = values.pop("steps")
            history = History(**values)
            if history.status == "live":
                learner.restore(tensors[number], steps, history)
            else:
                learner.history = history
                learner.best_weights = {name.removeprefix("best."): tensor for name, tensor in tensors[number].items()}


class _Shared:
    """The states of a batch, normalised once for all heads that want them so."""

    def __init__(self, states: torch.Tensor):
        self.states = states  # [L+1, B, T, D]
        self.normalized: dict[str, torch.Tensor] = {}

    def __call__(self, probe: ProbeModel) -> torch.Tensor:
        kind = probe.config.normalize
        if kind not in self.normalized:
            self.normalized[kind] = probe.normalize(self.states)
        x = self.normalized[kind]
        return x if len(probe.layer_indices) == len(x) else x[probe.layer_indices]
