"""Training of many heads side by side: the backbone runs once on a batch, and every live head learns from its states."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..backbone.capture import collect_hidden_states
from ..backbone.decoder import find_decoder
from ..backbone.passes import length_batches
from ..data.states import ProbeCollator, SharedStates, counted_tokens
from ..distributed import barrier, broadcast, gather, is_main, rank, world_size
from ..errors import ProbeError
from ..evaluation.metrics import check_metric, score_logits
from ..files import write_atomically
from ..heads.decision import NO_NUMBER_BECAUSE
from .learners import Candidate, History, Learner
from .rows import labels_of


CHECKPOINT_NAME = "checkpoint.safetensors"


class SharedTraining:
    """Training of candidates in lockstep, with one pass of the backbone an epoch.

    After the epochs 1, 2, 4, ... only the better share of the live candidates continues (successive halving, Jamieson and
    Talwalkar, arXiv 1502.07943). A candidate stops without a better metric for `patience` epochs, and fails if its scores are
    not finite. Every epoch ends with a checkpoint; a resumed run gives what an uninterrupted one gives.

    In a process group (see `llama_probe.distributed`) the ranks divide the rows for the backbone and the candidates for
    training: each rank sends the states of its batches to all, and trains its candidates on all batches. DDP would exchange
    gradients for every step of every candidate. The results and the checkpoint are those of one process.

    Args:
        candidates: at least one, for the same backbone and labels.
        train, validation: two `PromptDataset` (with `lm`) or two `StateDataset`.
        metric: metric to compare candidates by; larger is better.
        folder: folder of the checkpoint.
        lm: the frozen backbone; None if the states are cached.
        keep: share that continues; 1 prunes nothing.
        seed: seed of the order of the rows.
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
        self.train, self.validation, self.metric = train, validation, metric
        self.labels = labels_of(validation)
        check_metric(metric, self.labels, candidates[0].config)
        self.epochs, self.folder, self.lm = epochs, Path(folder), lm
        self.keep, self.patience, self.seed, self.batch_tokens = keep, patience, seed, batch_tokens
        device = torch.device("cpu") if lm is None else find_decoder(lm).device
        self.learners = [Learner(candidate, len(train), epochs, device) for candidate in candidates]
        self.epoch = 0

    @property
    def live(self) -> list[Learner]:
        """Learners that still train."""
        return [learner for learner in self.learners if learner.history.status == "live"]

    @property
    def own(self) -> list[Learner]:
        """Learners of this rank that still train."""
        return [learner for learner in self.learners[rank() :: world_size()] if learner.history.status == "live"]

    def run(self, resume: bool = False) -> list[Learner]:
        """Train until no candidate is live, or continue from the checkpoint in `folder`.

        Returns:
            All learners, best first, with their best weights loaded. Failed ones come last, as they are.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        barrier()
        if resume and (self.folder / CHECKPOINT_NAME).is_file():
            self._restore()
        bar = {"desc": "epochs", "unit": " epochs", "disable": not is_main()}
        with tqdm(total=self.epochs, initial=self.epoch, **bar) as progress:
            while self.live and self.epoch < self.epochs:
                self._train_epoch()
                values = {number: value for part in gather(self._validate()) for number, value in part.items()}
                for learner in self.live:
                    learner.end_epoch(values[learner.candidate.number])
                self.epoch += 1
                self._thin_out()
                self._save()
                leader = max(self.learners, key=lambda learner: learner.history.best)
                progress.update()
                progress.set_postfix_str(f"{len(self.live)} live, best {self.metric} {leader.history.best:.4f}")
        if world_size() > 1:
            self._restore()  # weights of other ranks
        if all(learner.history.status == "failed" for learner in self.learners):
            raise ProbeError(f"none of {len(self.learners)} candidates gives numbers: {NO_NUMBER_BECAUSE}")
        ranked = sorted(self.learners, key=lambda learner: -learner.history.best)
        for learner in ranked:
            if learner.history.status != "failed":
                learner.probe.load_state_dict(learner.best_weights)
            learner.probe.eval()
        return ranked

    def run_unseen(self) -> list[Learner]:
        """Train all candidates for all epochs in one process, without validation. Return the learners in their order."""
        for _ in range(self.epochs):
            self._train_epoch()
            self.epoch += 1
        for learner in self.learners:
            learner.probe.eval()
        return self.learners

    def _train_epoch(self) -> None:
        learners = self.own
        rng = np.random.default_rng((self.seed, self.epoch))
        batches = self._batches(self.train, rng.permutation(len(self.train)).tolist())
        rng.shuffle(batches)
        bar = {"desc": f"epoch {self.epoch + 1}", "unit": " rows", "leave": False, "disable": not is_main()}
        with tqdm(total=len(self.train), **bar) as progress:
            for batch, shared, mask in self._states(self.train, batches):
                for learner in learners:
                    learner.feed(shared(learner.probe), mask, batch["labels"], batch.get("row_weights"))
                progress.update(len(mask))
        for learner in learners:
            learner.flush()

    def _validate(self) -> dict[int, float | None]:
        """Return the metric of this rank's live candidates, by number; None if it is not finite."""
        learners = self.own
        batches = self._batches(self.validation, range(len(self.validation)))
        logits: list[list[torch.Tensor]] = [[] for _ in learners]
        for _, shared, mask in self._states(self.validation, batches):
            for found, learner in zip(logits, learners, strict=True):
                learner.probe.eval()
                with torch.no_grad():
                    found.append(learner.probe.score(shared(learner.probe), mask).logits.cpu())
        labels = self.labels[[row for batch in batches for row in batch]]
        values = {}
        for found, learner in zip(map(torch.cat, logits), learners, strict=True):
            value = score_logits(found, labels, learner.probe.config)[self.metric] if found.isfinite().all() else None
            # A square of a large number can overflow.
            values[learner.candidate.number] = value if value is not None and math.isfinite(value) else None
        return values

    def _batches(self, dataset: Dataset, rows: Sequence[int]) -> list[list[int]]:
        lengths = [len(self._row(dataset, row)["input_ids"]) for row in rows]
        return [[rows[place] for place in batch] for batch in length_batches(lengths, self.batch_tokens)]

    def _row(self, dataset: Dataset, row: int) -> dict:
        """Return a row. How `CutReplies` cuts it depends only on seed and epoch, not on rank, batch or learner."""
        torch.manual_seed(hash((self.seed, self.epoch, row)) % 2**63)
        return dataset[row]

    def _states(self, dataset: Dataset, batches: list[list[int]]) -> Iterator[tuple]:
        """Yield each batch, a function from a head to the states that it reads, and the mask `[rows, tokens]`."""
        collate = ProbeCollator()
        config, device = self.learners[0].probe.config, self.learners[0].probe.device
        if self.lm is None:
            for rows in batches:
                batch = collate([self._row(dataset, row) for row in rows])
                x, mask = batch["hidden_states"].transpose(0, 1), batch["attention_mask"].bool()
                yield batch, SharedStates(x), mask.to(device)
            return
        for start in range(0, len(batches), world_size()):
            turn = [
                collate([self._row(dataset, row) for row in rows]) for rows in batches[start : start + world_size()]
            ]
            # All ranks run the backbone, even with too few batches: it may be sharded over them.
            own = turn[min(rank(), len(turn) - 1)]
            layers = range(config.num_hidden_layers + 1)
            states = torch.stack(collect_hidden_states(self.lm, layers, own["input_ids"]))
            for source, batch in enumerate(turn):
                mask = counted_tokens(config, batch)
                x = states if source == rank() else states.new_empty(len(states), *mask.shape, states.shape[-1])
                yield batch, SharedStates(broadcast(x, source)), mask.to(device)

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
        tensors = {
            f"{learner.candidate.number}.{name}": tensor
            for learner in self.learners[rank() :: world_size()]
            for name, tensor in learner.tensors().items()
        }
        parts = [self.folder / f".{CHECKPOINT_NAME}.{number}" for number in range(world_size())]
        if not is_main():
            write_atomically({parts[rank()]: lambda path: save_file(tensors, path)})
        barrier()
        if is_main():
            for path in parts[1:]:
                tensors |= load_file(path)
            histories = {learner.candidate.number: vars(learner.history) for learner in self.learners}
            state = json.dumps({"epoch": self.epoch, "learners": histories})
            # One file, so that a kill leaves either this epoch or the one before.
            write_atomically(
                {self.folder / CHECKPOINT_NAME: lambda path: save_file(tensors, path, metadata={"state": state})}
            )
            for path in self.folder.glob(f".{CHECKPOINT_NAME}.*"):  # also those of a killed run
                path.unlink(missing_ok=True)
        barrier()

    def _restore(self) -> None:
        path = self.folder / CHECKPOINT_NAME
        try:
            with safe_open(path, framework="pt") as file:
                state = json.loads(file.metadata()["state"])
            tensors = load_file(path)
        except SafetensorError as error:
            raise ProbeError(f"{path} is damaged, delete it to train anew: {error}") from None
        self.epoch = state["epoch"]
        for learner in self.learners:
            number = str(learner.candidate.number)
            own = {key.removeprefix(f"{number}."): tensors[key] for key in tensors if key.startswith(f"{number}.")}
            learner.restore(own, self.epoch, History(**state["learners"][number]))
