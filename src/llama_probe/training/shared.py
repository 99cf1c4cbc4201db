"""Many heads trained side by side: the backbone runs over a batch once, and every live head learns from its states."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..backbone.capture import collect_hidden_states
from ..backbone.decoder import find_decoder, is_tensor_parallel
from ..data.states import ProbeCollator, SharedStates, counted_tokens
from ..distributed import barrier, broadcast, gather, is_main, rank, world_size
from ..errors import ProbeError
from ..evaluation.metrics import check_metric, score_logits
from ..files import write_atomically
from ..heads import get_probe_type
from ..heads.decision import NO_NUMBER_BECAUSE
from .learners import Candidate, History, Learner


CHECKPOINT_NAME = "checkpoint.safetensors"


def check_keep(keep: float) -> None:
    """Raises `ProbeError` where it is no share of candidates that can go on."""
    if not 0 < keep <= 1:
        raise ProbeError(f"keep={keep} must be above 0 and at most 1")


class SharedTraining:
    """Trains candidates in lockstep on one pass of the backbone an epoch.

    After the epochs 1, 2, 4, ... only the better share of the live candidates goes on (successive halving, Jamieson and
    Talwalkar, arXiv 1502.07943); one that has not improved for `patience` epochs stops by itself, and one whose training ran
    away has failed, which holds no other up. Every epoch ends with a checkpoint, from which a killed run goes on as if nothing
    had happened.

    In a process group (see `llama_probe.distributed`) the ranks divide the rows, for the passes of the backbone, and the
    candidates, for their training: each rank runs the backbone over batches of its own and sends their states to all, and
    trains its candidates on all of them. Dividing the rows of a candidate's own batches, as DDP does, would ask for an
    exchange of gradients for every step of every candidate, each with another batch size; this way all learn exactly what
    they learn in one process, and the checkpoint is the same, so that a run may go on with another number of processes.

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
        if is_tensor_parallel(lm):
            raise ProbeError("a backbone with a tp_plan reads the same rows in all processes: cache the states first")
        check_keep(keep)
        check_metric(metric, _labels_of(validation, range(len(validation))), candidates[0].config)
        self.train, self.validation, self.metric = train, validation, metric
        self.epochs, self.folder, self.lm = epochs, Path(folder), lm
        self.keep, self.patience, self.seed, self.batch_tokens = keep, patience, seed, batch_tokens
        device = torch.device("cpu") if lm is None else find_decoder(lm).device
        self.learners = [Learner(candidate, len(train), epochs, device) for candidate in candidates]
        self.epoch = 0

    @property
    def own(self) -> list[Learner]:
        """Those that still learn and are this rank's to train."""
        mine = self.learners[rank() :: world_size()]
        return [learner for learner in mine if learner.history.status == "live"]

    @property
    def live(self) -> list[Learner]:
        """Those that still learn."""
        return [learner for learner in self.learners if learner.history.status == "live"]

    def run(self, resume: bool = False) -> list[Learner]:
        """Trains until no candidate is live.

        Args:
            resume: go on from the checkpoint in `folder`, where there is one.

        Returns:
            All learners, best first, with their best weights loaded; those that failed last, as they are.

        Raises:
            ProbeError: the checkpoint is one of other candidates, or all have failed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        barrier()
        if resume and (self.folder / CHECKPOINT_NAME).is_file():
            self._restore()
        with tqdm(
            total=self.epochs, initial=self.epoch, desc="epochs", unit=" epochs", disable=not is_main()
        ) as progress:
            while self.live and self.epoch < self.epochs:
                self._train_epoch()
                self._end_epoch(self._validate())
                self.epoch += 1
                self._thin_out()
                self._save()
                leader = max(self.learners, key=lambda learner: learner.history.best)
                progress.update()
                progress.set_postfix_str(f"{len(self.live)} live, best {self.metric} {leader.history.best:.4f}")
        if world_size() > 1:
            self._restore()  # the weights that other ranks have found
        if all(learner.history.status == "failed" for learner in self.learners):
            raise ProbeError(f"none of {len(self.learners)} candidates gives numbers: {NO_NUMBER_BECAUSE}")
        ranked = sorted(self.learners, key=lambda learner: -learner.history.best)
        for learner in ranked:
            if learner.history.status != "failed":
                learner.probe.load_state_dict(learner.best_weights)
            learner.probe.eval()
        return ranked

    def run_unseen(self) -> list[Learner]:
        """Trains all candidates for all epochs without a look at the validation rows: for rows too few to hold any back.

        One process trains all of them; nothing is divided.

        Returns:
            The learners in the order of the candidates, with their last weights.
        """
        for _ in range(self.epochs):
            self._train_epoch()
            self.epoch += 1
        for learner in self.learners:
            learner.probe.eval()
        return self.learners

    def _end_epoch(self, own: list[float | None]) -> None:
        """Notes the epoch's metric of each live candidate, `own` being those of this rank's; `None` where it is no number."""
        values = {learner.candidate.number: value for learner, value in zip(self.own, own, strict=True)}
        for part in gather(values):
            values |= part
        mine = self.own
        for learner in self.live:
            value = values[learner.candidate.number]
            if learner in mine:
                learner.end_epoch(value)
            else:
                learner.history.note(value)

    def _train_epoch(self) -> None:
        learners = self.own
        rng = np.random.default_rng((self.seed, self.epoch))
        rows = rng.permutation(len(self.train))
        batches = self._batches(self.train, rows)
        rng.shuffle(batches)
        bar = tqdm(
            total=len(self.train), desc=f"epoch {self.epoch + 1}", unit=" rows", leave=False, disable=not is_main()
        )
        for batch, shared, mask in self._states(self.train, batches):
            for learner in learners:
                learner.feed(shared(learner.probe), mask, batch["labels"], batch.get("row_weights"))
            bar.update(len(mask))
        bar.close()
        for learner in learners:
            learner.flush()

    def _validate(self) -> list[float | None]:
        learners = self.own
        batches = self._batches(self.validation, np.arange(len(self.validation)))
        logits: list[list[torch.Tensor]] = [[] for _ in learners]
        for _, shared, mask in self._states(self.validation, batches):
            for found, learner in zip(logits, learners, strict=True):
                learner.probe.eval()
                with torch.no_grad():
                    found.append(learner.probe.score(shared(learner.probe), mask).logits.cpu())
        labels = _labels_of(self.validation, [row for batch in batches for row in batch])
        values = []
        for found, learner in zip(logits, learners, strict=True):
            scores = torch.cat(found)
            value = (
                score_logits(scores, labels, learner.probe.config)[self.metric] if scores.isfinite().all() else None
            )
            # The squares of large numbers are not finite either.
            values.append(value if value is not None and math.isfinite(value) else None)
        return values

    def _batches(self, dataset: Dataset, rows: np.ndarray) -> list[list[int]]:
        """Rows of like length together, so that little of a pass is padding."""
        lengths = [len(self._row(dataset, int(row))["input_ids"]) for row in rows]
        batches: list[list[int]] = []
        width = 0
        for index in np.argsort(lengths, kind="stable"):
            width = max(width, lengths[index])
            if not batches or (len(batches[-1]) + 1) * width > self.batch_tokens:
                batches.append([])
                width = lengths[index]
            batches[-1].append(int(rows[index]))
        return batches

    def _row(self, dataset: Dataset, row: int) -> dict:
        """A row, whose chance - see `CutReplies` - depends on the seed and the epoch alone: on no rank, batch or learner."""
        torch.manual_seed(hash((self.seed, self.epoch, row)) % 2**63)
        return dataset[row]

    def _states(self, dataset: Dataset, batches: list[list[int]]) -> Iterator[tuple]:
        """Each batch, with a function from a head to the states that it reads, and the mask."""
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
            # All ranks run the backbone, also where there are too few batches: it may be sharded over them.
            own = turn[min(rank(), len(turn) - 1)]
            states = self._run_backbone(own)
            for source, batch in enumerate(turn):
                mask = counted_tokens(config, batch)
                x = states if source == rank() else states.new_empty(len(states), *mask.shape, states.shape[-1])
                yield batch, SharedStates(broadcast(x, source)), mask.to(device)

    def _run_backbone(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """States `[L+1, rows, tokens, hidden_size]`."""
        layers = range(self.learners[0].probe.config.num_hidden_layers + 1)
        return torch.stack(collect_hidden_states(self.lm, layers, batch["input_ids"], batch["attention_mask"]))

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
        for learner in self.learners[rank() :: world_size()]:
            kept = learner.tensors()
            if learner.history.status != "live":
                kept = {name: tensor for name, tensor in kept.items() if name.startswith("best.")}
            tensors |= {f"{learner.candidate.number}.{name}": tensor for name, tensor in kept.items()}
        steps = {learner.candidate.number: learner.steps for learner in self.learners[rank() :: world_size()]}
        for part in gather(steps):
            steps |= part
        part_of = [self.folder / f".{CHECKPOINT_NAME}.{number}" for number in range(world_size())]
        if not is_main():
            write_atomically({part_of[rank()]: lambda path: save_file(tensors, path)})
        barrier()
        if is_main():
            for path in part_of[1:]:
                tensors |= load_file(path)
            numbers = {
                learner.candidate.number: {"steps": steps[learner.candidate.number], **vars(learner.history)}
                for learner in self.learners
            }
            # One file, so that a process that dies leaves either this epoch or the one before.
            state = json.dumps({"epoch": self.epoch, "learners": numbers})
            write_atomically(
                {self.folder / CHECKPOINT_NAME: lambda path: save_file(tensors, path, metadata={"state": state})}
            )
            for path in self.folder.glob(f".{CHECKPOINT_NAME}.*"):  # those of a killed run, too
                path.unlink(missing_ok=True)
        barrier()

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
                learner.best_weights = {
                    name.removeprefix("best."): tensor for name, tensor in tensors.get(number, {}).items()
                }


def _labels_of(dataset: Dataset, rows: Iterable[int]) -> np.ndarray:
    """The labels of some rows."""
    return np.stack([dataset[row]["labels"] for row in rows])
