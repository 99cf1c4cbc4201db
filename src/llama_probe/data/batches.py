"""Batches of prompts, and of their hidden states from the backbone or from disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..backbone.capture import collect_hidden_states
from ..backbone.decoder import is_tensor_parallel
from ..backbone.passes import Pace, Pass, Work, fair_order, length_batches, plan_passes, work_of
from ..distributed import share, world_size
from ..heads.configuration import ProbeConfig
from ..heads.probe import ProbeModel
from ..heads.scope import token_mask
from ..heads.segments import number_segments
from ..progress_bar import ProgressBar


_CHUNK = 512  # rows whose masks are computed together
# Tokens of a part of a training batch, padding included: 32 rows of 512 tokens are one part.
PART_TOKENS = 32 * 512


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Pad rows of a `PromptDataset` or a `StateDataset` on the right, and stack them into a batch.

    Returns:
        `attention_mask` `[B, T]`, and `input_ids` `[B, T]` or `hidden_states` `[B, S, T, D]`, whose memory is `[S, B, T, D]`, as
        heads compute. If the rows have them, `labels`, `probe_mask`, `segments` and `request_mask` `[B, T]`, and `learned_by`
        `[B, H]`; if the rows have a `reply_length`, `reply_mask` `[B, T]`; and if a row has weights, `row_weights` `[B, W]`, where
        rows without weights have 1.
    """
    ends = torch.tensor([len(row["input_ids"]) for row in rows])[:, None]
    columns = torch.arange(int(ends.max()))
    batch = {"attention_mask": (columns < ends).long()}
    if "labels" in rows[0]:
        batch["labels"] = _labels_of(rows)
    if "learned_by" in rows[0]:
        batch["learned_by"] = torch.from_numpy(np.stack([row["learned_by"] for row in rows]))
    if "hidden_states" in rows[0]:
        first = rows[0]["hidden_states"]
        states = first.new_zeros(len(first), len(rows), len(columns), first.shape[-1])
        for i, row in enumerate(rows):
            states[:, i, : ends[i]] = row["hidden_states"]
        batch["hidden_states"] = states.transpose(0, 1)
    else:
        batch["input_ids"] = pad_sequence([torch.as_tensor(row["input_ids"]) for row in rows], batch_first=True)
    for name in ("probe_mask", "segments"):
        if name in rows[0]:
            batch[name] = pad_sequence([torch.as_tensor(row[name]) for row in rows], batch_first=True)
    if any("request_mask" in row for row in rows):
        masks = [torch.as_tensor(row.get("request_mask", [False] * len(row["input_ids"]))) for row in rows]
        batch["request_mask"] = pad_sequence(masks, batch_first=True)
    if "reply_length" in rows[0]:
        starts = ends - torch.tensor([row["reply_length"] for row in rows])[:, None]
        batch["reply_mask"] = (columns >= starts) & (columns < ends)
    weights = [row.get("row_weights") or [1.0] for row in rows]
    if any("row_weights" in row for row in rows):
        count = math.lcm(*map(len, weights))  # the members of a group take the weights in turn
        batch["row_weights"] = torch.tensor([row * (count // len(row)) for row in weights])
    return batch


def _labels_of(rows: list[dict]) -> torch.Tensor:
    labels = torch.from_numpy(np.stack([row["labels"] for row in rows]))
    if not labels.is_floating_point():
        return labels
    # The Trainer ignores the label -100, which may be a value of a regression.
    return torch.where(labels == -100, torch.nextafter(labels, torch.zeros_like(labels)), labels)


class BatchParts:
    """The rows of a batch with many tokens, which are padded and stacked a part at a time.

    32 rows of 8,000 tokens hold gigabytes of hidden states. `Trainer` and `accelerate` hand an object of this class on as it is,
    and rows of a `StateDataset` are read from disk when their part is stacked.
    """

    def __init__(self, rows: list[dict]):
        self.rows = rows
        self.places = length_batches([len(row["input_ids"]) for row in rows], PART_TOKENS)

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the batch of `collate` of the rows at each of `places`."""
        for places in self.places:
            yield collate([self.rows[place] for place in places])


def collate_in_parts(rows: list[dict]) -> dict[str, torch.Tensor | BatchParts]:
    """Return the batch of `collate`. Return `parts` and the `labels` of all rows instead if the batch has many tokens."""
    padded = len(rows) * max(len(row["input_ids"]) for row in rows)
    # A backbone that is sharded over the ranks runs equally often on each rank.
    needs_equal_passes = world_size() > 1 and "hidden_states" not in rows[0]
    if padded <= PART_TOKENS or needs_equal_passes:
        return collate(rows)
    batch: dict[str, torch.Tensor | BatchParts] = {"parts": BatchParts(rows)}
    if "labels" in rows[0]:
        batch["labels"] = _labels_of(rows)
    return batch


def row_chunks(rows: Sequence[dict] | Dataset) -> Iterator[list[dict]]:
    """Yield the items of a data set in lists of at most 512."""
    for first in range(0, len(rows), _CHUNK):
        yield [rows[row] for row in range(first, min(first + _CHUNK, len(rows)))]


def counted_tokens(config: ProbeConfig, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mask `[B, T]` of the tokens that count for a head, for a batch of a `PromptDataset`."""
    if "probe_mask" in batch:
        return batch["probe_mask"].bool()  # numbers would be indices of tokens
    return token_mask(config, batch["input_ids"], batch["attention_mask"])


def counted_lengths(config: ProbeConfig, dataset: Dataset) -> list[int]:
    """Return the number of the tokens of each row of a `PromptDataset` or a `StateDataset` that count for a head."""
    lengths: list[int] = []
    for chunk in row_chunks(dataset):
        if "hidden_states" in chunk[0]:  # of the tokens that count alone
            lengths += [len(row["input_ids"]) for row in chunk]
        else:
            lengths += counted_tokens(config, collate(chunk)).sum(dim=1).tolist()
    return lengths


def segments_of(config: ProbeConfig, batch: dict[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor | None:
    """Return the segments `[B, T]` of the tokens that count; None with a `probe_mask`, or as `number_segments` says."""
    return None if "probe_mask" in batch else number_segments(config, mask)


def plan_reading(
    lm: nn.Module, dataset: Dataset, read: Callable[[dict[str, torch.Tensor], int], torch.Tensor]
) -> list[Pass]:
    """Plan the passes of an LM over the prompts of a data set; see `plan_passes`.

    Args:
        read: returns the mask `[B, T]` of the tokens that are read, from a batch of `collate` and the number of its first row.
    """
    prompts: list[list[int]] = []
    unread: list[int] = []
    for chunk in row_chunks(dataset):
        unread += read(collate(chunk), len(prompts)).int().argmax(dim=1).tolist()
        prompts += [row["input_ids"] for row in chunk]
    return plan_passes(lm, prompts, unread)


def plan_states(lm: nn.Module, dataset: Dataset, config: ProbeConfig) -> list[Pass]:
    """Plan the passes of an LM over the tokens of a data set that count for a head."""
    return plan_reading(lm, dataset, lambda batch, first_row: counted_tokens(config, batch))


def follow_progress(
    passes: Sequence[Pass], lengths: Sequence[int], title: str, delay: float = 0, is_hidden: bool = False
) -> Iterator[Pass]:
    """Yield passes in `fair_order`, and show the progress in tokens, with the time that is left.

    In a process group the bar counts the tokens of all ranks, as if each had as many.

    Args:
        lengths: number of tokens of each row.
    """
    pace = Pace()
    left = work_of(passes, lengths)
    total = world_size() * sum(lengths[row] for run in passes for row in run.rows)
    with ProgressBar(total, title, "tokens", delay, is_hidden) as bar:
        for run in fair_order(passes):
            start = time.monotonic()
            yield run
            work = work_of([run], lengths)
            pace.note(work, time.monotonic() - start)
            left = Work(left.tokens - work.tokens, left.pairs - work.pairs)
            bar.seconds_left = pace.seconds_of(left)
            bar.update(world_size() * sum(lengths[row] for row in run.rows))


def iterate_states(
    dataset: Dataset,
    config: ProbeConfig,
    lm: nn.Module | None = None,
    layers: Sequence[int] | None = None,
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Yield the hidden states of a data set in batches of rows of similar length.

    In a process group, yield this rank's share of the batches.

    Args:
        dataset: a `StateDataset`, or with `lm` a `PromptDataset`.
        config: config of a head, whose scope tells which tokens count.
        lm: the frozen LM, if the states are not cached.
        layers: layers of the LM to collect. Defaults to the layers that the head reads.

    Yields:
        Row numbers, hidden states `[S, B, T, D]`, the mask `[B, T]` of the counted tokens, and their segments `[B, T]`, `None`
        if there are none (see `number_segments`). Leading tokens that no row counts may be missing.
    """
    lengths = [len(dataset[row]["input_ids"]) for row in range(len(dataset))]
    passes = [Pass(rows) for rows in length_batches(lengths)] if lm is None else plan_states(lm, dataset, config)
    if not is_tensor_parallel(lm):
        passes = share(passes)
    title = "scoring" if lm is None else "hidden states"
    for run in follow_progress(passes, lengths, title):
        batch = collate([dataset[row] for row in run.rows])
        if lm is None:
            states = batch["hidden_states"].transpose(0, 1)
            mask = batch.get("probe_mask", batch["attention_mask"]).bool()
            segments = batch.get("segments")
        else:
            ids = batch["input_ids"][:, run.skip :]
            mask = counted_tokens(config, batch)[:, run.skip :]
            segments = segments_of(config, batch, mask)
            read = config.layer_indices if layers is None else layers
            states = torch.stack(collect_hidden_states(lm, read, ids, prefix=run.prefix))
        yield run.rows, states, mask, segments


class SharedStates:
    """Hidden states `[S, B, T, D]`, normalised once for all heads that read them.

    States in bfloat16 stay bfloat16 for head types that read half precision. For other head types they are cast to fp32.

    Args:
        layers: the indices of the S states, ascending.
    """

    def __init__(self, states: torch.Tensor, layers: Sequence[int]):
        self.states, self.layers = states, list(layers)
        self._whole = states if states.dtype == torch.bfloat16 else states.float()
        self._prepared: dict[tuple, torch.Tensor] = {}

    def raw(self, probe: ProbeModel) -> torch.Tensor:
        """Return the states of the layers that the head reads, as the LM gave them."""
        return self._select(self.states, probe)

    def __call__(self, probe: ProbeModel) -> torch.Tensor:
        """Return the argument of `probe.score`: normalised states of the layers that the head reads."""
        key = probe.input_format(self._whole)
        if key not in self._prepared:
            self._prepared[key] = probe.prepare(self._whole)
        return self._select(self._prepared[key], probe)

    def _select(self, states: torch.Tensor, probe: ProbeModel) -> torch.Tensor:
        wanted = probe.layer_indices
        return states if wanted == self.layers else states[[self.layers.index(layer) for layer in wanted]]
