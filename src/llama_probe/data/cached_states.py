"""Hidden states of a data set, computed once and kept on disk, so that an epoch does not run the backbone again.

A cache of hidden states can reveal the texts: protect it as you protect the texts.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers.utils import logging

from ..backbone.capture import collect_hidden_states
from ..backbone.decoder import find_decoder, is_tensor_parallel
from ..backbone.loading import weights_digest
from ..backbone.passes import Pass, length_batches, plan_passes
from ..distributed import barrier, is_main, on_main, share, world_size
from ..errors import ProbeError
from ..files import make_folder, remove_leftovers, write_atomically
from ..heads import get_probe_type
from ..heads.configuration import ProbeConfig, shared_layers
from ..heads.probe import ProbeModel
from ..heads.scope import check_rows, judges_segments, number_segments, token_mask, tokens_read
from .prompts import PromptDataset


logger = logging.get_logger(__name__)

_FORMAT = 4
_ROWS = 512  # rows whose masks are computed at a time
_SHARED_FIELDS = ("id2label", "problem_type", "hidden_size", "num_hidden_layers")
_SHARED_FIELDS += ("token_scope", "prompt_format", "system_prompt", "max_length")


class StateDataset(PromptDataset):
    """Hidden states of an entry of a `StateCache`, mapped from disk, and the labels of their rows.

    Items have `input_ids` (the counted tokens, T of them), `hidden_states` `[S, T, D]` and, if the rows have them, `labels`. For a
    head that `judges_segments`, `segments` has the number of each token's segment.

    Args:
        keys: of the rows in it; several rows may have one.
        config: config of the head that the states are for; its `layer_indices` are those of the S states.
    """

    def __init__(self, folder: Path, keys: Sequence[str], rows: PromptDataset, config: ProbeConfig):
        on_disk = rows_on_disk(folder)
        super().__init__([on_disk[key][0] for key in keys], rows.labels, reply_lengths=rows.reply_lengths)
        self.columns["hidden_states"] = [on_disk[key][1] for key in keys]
        if judges_segments(config):
            self.columns["segments"] = _segments(config, rows)
        self.config = config


class StateCache:
    """A folder of cached hidden states with one entry, a subfolder, for each backbone and what is read of it.

    An entry holds the tokens and layers that a head reads, a file for each pass of the backbone. It is found by the scope, the
    dtype, the backbone's weights and config, and by what is read; a prompt in it by its tokens. So a prompt is computed once,
    whatever data sets and runs it is in, and a run continues where a killed one has stopped. In a process group each rank
    computes a share of the prompts; all ranks must see the same folder.

    Args:
        dtype: dtype of the states on disk: `torch.float16`, `torch.bfloat16` or `torch.float32`. Defaults to `torch.bfloat16` for
            an LM in bfloat16, which loses nothing, else to `torch.float16`.
    """

    def __init__(self, folder: str | os.PathLike, dtype: torch.dtype | None = None):
        self.folder, self.dtype = Path(folder), dtype

    def dataset(self, lm: nn.Module, config: ProbeConfig, rows: PromptDataset) -> StateDataset:
        """Return what a head with this config reads of the hidden states of prompts, from disk or computed now."""
        dtype, entry, keys = self._dtype_for(lm), self._entry(lm, config), _keys_of(rows)
        done = on_main(lambda: set(rows_on_disk(entry)))
        left = list({key: row for row, key in enumerate(keys) if key not in done}.values())
        if left:
            read = [_tokens_read(config, [rows[row]])[0].tolist() for row in left]
            check_rows(torch.tensor([[any(mask)] for mask in read]))
            dataset = PromptDataset([rows.prompts[row] for row in left], masks=read)
            on_main(lambda: self._begin(entry))
            try:
                for places, states, counted, _ in iterate_states(dataset, config, lm):
                    tensors = _tensors_of_pass([dataset[place] for place in places], states.to("cpu", dtype), counted)
                    names = {"keys": " ".join(keys[left[place]] for place in places)}
                    if is_main() or not is_tensor_parallel(lm):  # its ranks compute the same rows
                        save = partial(save_file, tensors, metadata=names)
                        # The rename is what makes these rows done.
                        write_atomically(entry / f"{uuid.uuid4().hex}.safetensors", save)
            except ProbeError:  # a run that is stopped otherwise leaves what it has done
                if is_main() and not done:
                    shutil.rmtree(entry, ignore_errors=True)
                raise
            barrier()
        return StateDataset(entry, keys, rows, config)

    def missing(self, lm: nn.Module, config: ProbeConfig, parts: Iterable[PromptDataset]) -> list[dict]:
        """Return the items of data sets whose states `dataset` would compute, each prompt once."""
        entry = self._entry(lm, config)
        done = on_main(lambda: set(rows_on_disk(entry)))
        rows = {key: part[row] for part in parts for row, key in enumerate(_keys_of(part)) if key not in done}
        return list(rows.values())

    def bytes_of(self, config: ProbeConfig, rows: Sequence[dict]) -> int:
        """Return the bytes that the states of items of a `PromptDataset` take on disk, for a head with this config."""
        parts = (rows[first : first + _ROWS] for first in range(0, len(rows), _ROWS))
        tokens = sum(int(_tokens_read(config, part).sum()) for part in parts)
        return tokens * len(config.layer_indices) * config.hidden_size * (self.dtype or torch.float16).itemsize

    def bytes_on_disk(self) -> int:
        """Return the bytes of all states in the folder, whatever they are of."""
        return sum(path.stat().st_size for path in self.folder.rglob("*.safetensors"))

    def _dtype_for(self, lm: nn.Module) -> torch.dtype:
        is_bfloat16 = getattr(find_decoder(lm).model, "dtype", None) == torch.bfloat16
        return self.dtype or (torch.bfloat16 if is_bfloat16 else torch.float16)

    def _entry(self, lm: nn.Module, config: ProbeConfig) -> Path:
        """Return the folder of the states that a head with this config reads of an LM."""
        scope = [config.token_scope, config.prefix_ids, config.turn_markers]
        reads = [get_probe_type(config.probe_type).reads, config.layer_indices]
        return self.folder / _digest([_FORMAT, str(self._dtype_for(lm)), scope, reads, weights_digest(lm)])

    def _begin(self, entry: Path) -> None:
        logger.warning_once(f"caching hidden states in {self.folder} (they can reveal the texts: protect them alike)")
        make_folder(entry)
        remove_leftovers(entry)


def _keys_of(rows: PromptDataset) -> list[str]:
    return [_digest([ids, rows.masks and rows.masks[row]]) for row, ids in enumerate(rows.prompts)]


def _digest(values: list[object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def rows_on_disk(entry: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return by key the tokens `[T]` and the states `[S, T, D]` of each row that an entry has, mapped from disk."""
    on_disk = {}
    for path in sorted(entry.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            keys = file.metadata()["keys"].split()
            lengths, tokens, states = map(file.get_tensor, ("lengths", "tokens", "states"))
        num_states = len(states) // len(tokens)
        parts = zip(tokens.split(lengths.tolist()), states.split((num_states * lengths).tolist()), strict=True)
        for key, (ids, flat) in zip(keys, parts, strict=True):
            on_disk[key] = ids, flat.view(num_states, len(ids), -1)
    return on_disk


def _tokens_read(config: ProbeConfig, rows: Sequence[dict]) -> torch.Tensor:
    """Return the mask `[B, T]` of the tokens of rows that the head reads: in a reply each is the last one once."""
    counted = counted_tokens(config, collate(rows))
    return counted if config.reads_reply else tokens_read(config, counted)


def _segments(config: ProbeConfig, rows: PromptDataset) -> list[torch.Tensor]:
    """Return the segment of each counted token, `[T]` for each row."""
    segments: list[torch.Tensor] = []
    for first in range(0, len(rows), _ROWS):
        part = [rows[row] for row in range(first, min(first + _ROWS, len(rows)))]
        batch = collate(part)
        mask = counted_tokens(config, batch)
        numbers = segments_of(config, batch, mask)
        numbers = mask.long() if numbers is None else numbers
        segments += [row[row > 0] for row in numbers]
    return segments


def _tensors_of_pass(items: list[dict], states: torch.Tensor, counted: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, which holds the states `[S, B, T, D]` of the rows of a pass."""
    if not bool(states.isfinite().all()):
        raise ProbeError(
            f"a hidden state is too large for {states.dtype}: load the backbone in bfloat16, or use cache_states=False"
        )
    ids = [torch.tensor(item["input_ids"])[torch.tensor(item["probe_mask"])] for item in items]
    return {
        "lengths": torch.tensor(list(map(len, ids))),
        "tokens": torch.cat(ids),
        "states": torch.cat([states[:, i, counted[i]].flatten(0, 1) for i in range(len(ids))]),  # [S T of each, D]
    }


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Pad rows of a `PromptDataset` or a `StateDataset` on the right, and stack them into a batch.

    Returns:
        `attention_mask` `[B, T]`, and `input_ids` `[B, T]` or `hidden_states` `[B, S, T, D]`, whose memory is `[S, B, T, D]`, as
        heads compute. Also `labels`, `probe_mask` and `segments` `[B, T]` and `learned_by` `[B, H]` if the rows have
        them, `reply_mask` `[B, T]` if they have a `reply_length`, and `row_weights` `[B, W]` if one of them has. The other rows then weigh 1.
    """
    ends = torch.tensor([len(row["input_ids"]) for row in rows])[:, None]
    columns = torch.arange(int(ends.max()))
    batch = {"attention_mask": (columns < ends).long()}
    for name in ("labels", "learned_by"):
        if name in rows[0]:
            batch[name] = torch.from_numpy(np.stack([row[name] for row in rows]))
    if (labels := batch.get("labels")) is not None and labels.is_floating_point():
        # The Trainer ignores labels of -100, which may be a value here.
        batch["labels"] = torch.where(labels == -100, torch.nextafter(labels, torch.zeros_like(labels)), labels)
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
    if "reply_length" in rows[0]:
        starts = ends - torch.tensor([row["reply_length"] for row in rows])[:, None]
        batch["reply_mask"] = (columns >= starts) & (columns < ends)
    weights = [row.get("row_weights") or [1.0] for row in rows]
    if any("row_weights" in row for row in rows):
        count = math.lcm(*map(len, weights))  # members take them in turn
        batch["row_weights"] = torch.tensor([row * (count // len(row)) for row in weights])
    return batch


def counted_tokens(config: ProbeConfig, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mask `[B, T]` of the tokens that count for a head, for a batch of a `PromptDataset`."""
    if "probe_mask" in batch:
        return batch["probe_mask"].bool()  # as indices, 0 and 1 would be the first two tokens
    return token_mask(config, batch["input_ids"], batch["attention_mask"])


def segments_of(config: ProbeConfig, batch: dict[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor | None:
    """Return the segments `[B, T]` of the tokens that count in a batch; see `number_segments`. Tokens of a `probe_mask` have none."""
    return None if "probe_mask" in batch else number_segments(config, mask)


def plan_reading(
    lm: nn.Module, dataset: Dataset, read: Callable[[dict[str, torch.Tensor], int], torch.Tensor]
) -> list[Pass]:
    """Plan the passes of an LM over the prompts of a data set; see `plan_passes`.

    Args:
        read: returns the mask `[B, T]` of the tokens that are read of a batch, as `collate` makes it, whose first row has the
            number that is the second argument.
    """
    prompts, unread = [], []
    for first in range(0, len(dataset), _ROWS):
        part = [dataset[row] for row in range(first, min(first + _ROWS, len(dataset)))]
        prompts += [row["input_ids"] for row in part]
        unread += read(collate(part), first).int().argmax(dim=1).tolist()
    return plan_passes(lm, prompts, unread)


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
        layers: states to collect from the LM. Defaults to those that the head reads.

    Yields:
        Row numbers, hidden states `[S, B, T, D]`, the mask `[B, T]` of the counted tokens, and their segments `[B, T]`, `None` if
        there are none; see `number_segments`. Leading tokens that no row counts may be missing.
    """
    if lm is None:
        lengths = [len(dataset[row]["input_ids"]) for row in range(len(dataset))]
        passes = [Pass(rows) for rows in length_batches(lengths)]
    else:
        passes = plan_reading(lm, dataset, lambda batch, first_row: counted_tokens(config, batch))
    title = "scoring" if lm is None else "hidden states"
    with logging.tqdm(total=len(dataset), desc=title, unit=" rows", leave=False) as bar:
        for run in passes if is_tensor_parallel(lm) else share(passes):
            batch = collate([dataset[row] for row in run.rows])
            if lm is None:
                states = batch["hidden_states"].transpose(0, 1)
                mask = batch.get("probe_mask", batch["attention_mask"]).bool()
                segments = batch.get("segments")
            else:
                ids, mask = batch["input_ids"][:, run.skip :], counted_tokens(config, batch)[:, run.skip :]
                segments = segments_of(config, batch, mask)
                read = config.layer_indices if layers is None else layers
                states = torch.stack(collect_hidden_states(lm, read, ids, prefix=run.prefix))
            yield run.rows, states, mask, segments
            bar.update(len(run.rows) * world_size())


class SharedStates:
    """Hidden states `[S, B, T, D]`, normalised once for all heads that read them.

    Kinds that read half precision get states in bfloat16 as they are; for other kinds and dtypes they are cast to fp32.

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


def shared_config(configs: Sequence[ProbeConfig]) -> ProbeConfig:
    """Return a config that reads what several heads read together, for a `StateCache`."""
    first = configs[0]
    for name in _SHARED_FIELDS:
        if len(values := {str(getattr(config, name)) for config in configs}) > 1:
            raise ProbeError(f"heads of one run need the same {name}, not {' and '.join(sorted(values))}")
    layers = shared_layers(configs)
    if all(config.probe_type == first.probe_type and config.layer_indices == layers for config in configs):
        return first
    return first.replace(probe_type="pooling", options={}, layers=layers)


def cached_for(dataset: Dataset | None) -> ProbeConfig | None:
    """Return the config of the head that the hidden states of a data set, or of the one that it wraps, are for."""
    while dataset is not None and not isinstance(dataset, StateDataset):
        dataset = getattr(dataset, "dataset", None)
    return None if dataset is None else dataset.config
