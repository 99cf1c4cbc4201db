"""Hidden states of a data set, computed once and kept on disk, so that an epoch does not run the backbone again.

A cache of hidden states can reveal the texts: protect it as you protect the texts.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..backbone.capture import collect_hidden_states
from ..backbone.decoder import find_decoder, is_tensor_parallel
from ..backbone.loading import weights_digest
from ..backbone.passes import Pass, length_batches, plan_passes
from ..distributed import barrier, is_main, on_main, rank, share, world_size
from ..errors import ProbeError
from ..files import is_disk_full, lock, make_folder
from ..heads import get_probe_type
from ..heads.configuration import ProbeConfig
from ..heads.probe import ProbeModel
from ..heads.scope import check_rows, token_mask, tokens_read


logger = logging.get_logger(__name__)

_STATES, _META = "states.bin", "meta.json"
_SCRATCH, _DONE = ".states-", "rows-"
_ABANDONED = 24 * 3600  # seconds without a write after which a later run removes the scratch folder of a killed one
_FORMAT = 2


class PromptDataset(Dataset):
    """Token ids and labels, for training with the backbone in the loop.

    Items have `input_ids`, `labels` and, with `masks`, `probe_mask`.

    Args:
        prompts: token ids of each row.
        labels (`[rows, ...]`): labels as in `LabelledTexts`.
        masks: the counted tokens of each row, in place of the head's scope.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], labels: np.ndarray, masks: Sequence[Sequence[bool]] | None = None
    ):
        self.prompts, self.labels, self.masks = prompts, labels, masks

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, row: int) -> dict:
        masked = {} if self.masks is None else {"probe_mask": self.masks[row]}
        return {"input_ids": self.prompts[row], "labels": self.labels[row], **masked}


class StateDataset(Dataset):
    """Hidden states of an entry of a `StateCache`, mapped from disk, and labels as in `LabelledTexts`.

    Items have `input_ids` (the counted tokens, T of them), `hidden_states` `[S, T, D]` and `labels`.

    Args:
        layers: the indices of the S states, ascending.
    """

    def __init__(self, folder: Path, labels: np.ndarray, layers: Sequence[int]):
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        self.labels, self.layers = labels, list(layers)
        self.tokens: list[list[int]] = meta["tokens"]
        self.offsets = list(accumulate(map(len, self.tokens), initial=0))
        self.num_states, self.hidden_size = meta["shape"]
        size = self.offsets[-1] * self.num_states * self.hidden_size
        self.states = torch.from_file(
            str(folder / _STATES), shared=False, size=size, dtype=getattr(torch, meta["dtype"])
        ).view(-1, self.hidden_size)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> dict:
        start, stop = self.offsets[row] * self.num_states, self.offsets[row + 1] * self.num_states
        states = self.states[start:stop].view(self.num_states, -1, self.hidden_size)
        return {"input_ids": self.tokens[row], "hidden_states": states, "labels": self.labels[row]}


class StateCache:
    """A folder of cached hidden states with one entry, a subfolder, for each set of prompts.

    An entry holds the tokens and layers that a head reads. It is found by the prompts, the scope, the dtype, the
    backbone's weights and config, and by what is read. An entry with all states of all counted tokens serves every
    head. Several runs can share a cache, and a run goes on where a killed one has stopped. In a process group each rank
    computes a share of the rows; all ranks must see the same folder.

    Args:
        folder: folder of the cache, which is created.
        dtype: dtype of the states on disk: `torch.float16`, `torch.bfloat16` or `torch.float32`. Defaults to `torch.bfloat16` for
            an LM in bfloat16, which loses nothing, else to `torch.float16`.
    """

    def __init__(self, folder: str | os.PathLike, dtype: torch.dtype | None = None):
        self.folder, self.dtype = Path(folder), dtype

    def _dtype_for(self, lm: nn.Module) -> torch.dtype:
        is_bfloat16 = getattr(find_decoder(lm).model, "dtype", None) == torch.bfloat16
        return self.dtype or (torch.bfloat16 if is_bfloat16 else torch.float16)

    def dataset(
        self,
        lm: nn.Module,
        config: ProbeConfig,
        prompts: Sequence[Sequence[int]],
        labels: np.ndarray,
        batch_tokens: int = 4096,
        masks: Sequence[Sequence[bool]] | None = None,
    ) -> StateDataset:
        """Return the hidden states of the prompts of a `PromptDataset`, from disk or computed now.

        Args:
            lm: the frozen LM.
            config: config of a head, which tells what is read.
            prompts, labels, masks: see `PromptDataset`.
            batch_tokens: tokens of a forward pass, padding included.

        Raises:
            ProbeError: the disk is too small, a state does not fit the dtype, or a row has no counted token.
        """
        scope = [config.token_scope, config.prefix_ids, config.turn_markers]
        parts = [_FORMAT, str(self._dtype_for(lm)), scope, prompts, masks, weights_digest(lm)]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
        layers, reads = config.layer_indices, get_probe_type(config.probe_type).reads
        every = list(range(config.num_hidden_layers + 1))
        entries = {self.folder / key.hexdigest()[:32]: every}  # all states of all counted tokens
        if (reads, layers) != ("all", every):
            key.update(json.dumps([reads, layers]).encode())
            entries[self.folder / key.hexdigest()[:32]] = layers
        entry = on_main(lambda: next(filter(_is_whole, entries), None))
        if entry is None:
            self._compute(entry := list(entries)[-1], lm, config, prompts, batch_tokens, masks)
        return StateDataset(entry, labels, entries[entry])

    def bytes_of(self, config: ProbeConfig, tokens: int) -> int:
        """Return the bytes that the states of `tokens` tokens take on disk, for a head with this config."""
        return tokens * len(config.layer_indices) * config.hidden_size * (self.dtype or torch.float16).itemsize

    def delete(self) -> None:
        """Remove the cache from disk."""
        if is_main():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _compute(self, entry: Path, lm, config, prompts, batch_tokens, masks) -> None:
        read, tokens = [], []
        for ids, mask in zip(prompts, masks or [None] * len(prompts), strict=True):
            ids = torch.tensor([ids])
            mask = token_mask(config, ids, None) if mask is None else torch.tensor([mask])
            check_rows(mask)
            read.append(tokens_read(config, mask)[0])
            tokens.append(ids[0, read[-1]].tolist())
        offsets = list(accumulate(map(len, tokens), initial=0))
        shape, dtype = (len(config.layer_indices), find_decoder(lm).hidden_size), self._dtype_for(lm)
        size = offsets[-1] * math.prod(shape) * dtype.itemsize
        logger.warning_once(f"caching hidden states in {self.folder} (they can reveal the texts: protect them alike)")
        too_small = ProbeError(
            f"the hidden states need {size / 1e9:.1f} GB, more than {self.folder} has free; use another folder"
        )
        handles: list[int] = []
        scratch = on_main(lambda: self._claim_scratch(entry.name, size, too_small, handles))
        noted = [file.read_text(encoding="utf-8").rpartition("\n")[0] for file in scratch.glob(f"{_DONE}*")]
        done = {int(row) for rows in noted for row in rows.split()}
        left = [row for row in range(len(prompts)) if row not in done]
        barrier()  # all ranks have read what a killed run has done before one of them adds to it
        try:
            self._write_states(scratch, lm, config, prompts, batch_tokens, read, left, offsets)
            barrier()
            if is_main():
                meta = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens}
                (scratch / _META).write_text(json.dumps(meta), encoding="utf-8")
                for file in scratch.glob(f"{_DONE}*"):
                    file.unlink()
                if not _is_whole(entry):
                    shutil.rmtree(entry, ignore_errors=True)
                    with contextlib.suppress(OSError):  # another run was faster
                        scratch.replace(entry)
                shutil.rmtree(scratch, ignore_errors=True)
            barrier()
        except (OSError, ProbeError) as error:  # a run that is stopped otherwise leaves what it has done
            if is_main():
                shutil.rmtree(scratch, ignore_errors=True)
            if isinstance(error, OSError) and is_disk_full(error):
                raise too_small from error
            raise
        finally:
            for handle in handles:
                os.close(handle)

    def _write_states(self, scratch: Path, lm, config, prompts, batch_tokens, read, left, offsets) -> None:
        """Compute the states of the rows that are `left`, and note each row when its states are in the file."""
        if not left:
            return
        dtype = self._dtype_for(lm)
        token_bytes = len(config.layer_indices) * find_decoder(lm).hidden_size * dtype.itemsize
        rows_of = PromptDataset([prompts[row] for row in left], np.zeros(len(left)), [read[row] for row in left])
        batches = iterate_states(rows_of, config, lm, batch_tokens, True, config.layer_indices, divided=True)
        # Not mapped: ranks on other machines may share the file over a network.
        with (
            (scratch / _STATES).open("r+b") as file,
            (scratch / f"{_DONE}{rank()}").open("a", encoding="utf-8") as done,
        ):
            for places, states, counted in batches:
                states = states.to("cpu", dtype)  # [S, B, T, D]
                if not bool(states.isfinite().all()):
                    raise ProbeError(f"a hidden state is too large for {dtype}; cache as bfloat16 or float32")
                for i, place in enumerate(places):
                    file.seek(offsets[left[place]] * token_bytes)
                    file.write(states[:, i, counted[i]].flatten().view(torch.uint8).numpy())
                file.flush()
                done.write("".join(f"{left[place]}\n" for place in places))
                done.flush()

    def _claim_scratch(self, name: str, size: int, too_small: ProbeError, handles: list[int]) -> Path:
        """Return a folder for the states of an entry that no other run works in, with what a killed run has left in it.

        Folders of other entries that were abandoned are removed.
        """
        make_folder(self.folder)
        for states in self.folder.glob(f"{_SCRATCH}*/{_STATES}"):
            with contextlib.suppress(OSError):  # its run has just renamed it
                is_old = time.time() - states.stat().st_mtime > _ABANDONED
                if is_old and not states.parent.name.startswith(f"{_SCRATCH}{name}-"):
                    shutil.rmtree(states.parent)
        for number in itertools.count():
            scratch = self.folder / f"{_SCRATCH}{name}-{number}"
            scratch.mkdir(exist_ok=True)
            handle = lock(scratch)
            if handle is not None and scratch.exists():
                break
            if handle is not None:
                os.close(handle)  # its run renamed it before it was locked here
        handles.append(handle)
        states = scratch / _STATES
        written = states.stat().st_blocks * 512 if states.exists() else 0
        if size - written > 0.95 * shutil.disk_usage(self.folder).free:
            shutil.rmtree(scratch)
            os.close(handles.pop())
            raise too_small
        states.touch()
        return scratch


def _is_whole(entry: Path) -> bool:
    """Return True if an entry of the cache can be read."""
    try:
        StateDataset(entry, np.empty(0), [])
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError):
        return False
    return True


class ProbeCollator:
    """Pads rows of a `PromptDataset` or a `StateDataset` on the right and stacks them into a batch."""

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Return `labels`, `attention_mask` `[B, T]`, and `input_ids` `[B, T]` or `hidden_states` `[B, S, T, D]`.

        The batch also has `probe_mask` `[B, T]` and `learned_by` `[B, H]` if the rows have them, and `row_weights` `[B, W]` if
        one of them has. The other rows then weigh 1. The memory of `hidden_states` is `[S, B, T, D]`, as heads compute.
        """
        lengths = [len(row["input_ids"]) for row in rows]
        labels = torch.from_numpy(np.stack([row["labels"] for row in rows]))
        if labels.is_floating_point():
            # The Trainer ignores labels of -100, which may be a value here.
            labels = torch.where(labels == -100, torch.nextafter(labels, torch.zeros_like(labels)), labels)
        ones = [torch.ones(length, dtype=torch.long) for length in lengths]
        batch = {"attention_mask": pad_sequence(ones, batch_first=True), "labels": labels}
        if "hidden_states" in rows[0]:
            first = rows[0]["hidden_states"]
            states = first.new_zeros(len(first), len(rows), max(lengths), first.shape[-1])
            for i, row in enumerate(rows):
                states[:, i, : lengths[i]] = row["hidden_states"]
            batch["hidden_states"] = states.transpose(0, 1)
        else:
            batch["input_ids"] = pad_sequence([torch.as_tensor(row["input_ids"]) for row in rows], batch_first=True)
        if "probe_mask" in rows[0]:
            batch["probe_mask"] = pad_sequence([torch.as_tensor(row["probe_mask"]) for row in rows], batch_first=True)
        if "learned_by" in rows[0]:
            batch["learned_by"] = torch.from_numpy(np.stack([row["learned_by"] for row in rows]))
        weights = [row.get("row_weights") for row in rows]
        if (some := next(filter(None, weights), None)) is not None:
            batch["row_weights"] = torch.tensor([each or [1.0] * len(some) for each in weights])
        return batch


def counted_tokens(config: ProbeConfig, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mask `[B, T]` of the tokens that count for a head, for a batch of a `PromptDataset`."""
    if "probe_mask" in batch:
        return batch["probe_mask"]
    return token_mask(config, batch["input_ids"], batch["attention_mask"])


def iterate_states(
    dataset: Dataset,
    config: ProbeConfig,
    lm: nn.Module | None = None,
    batch_tokens: int = 4096,
    progress: bool = False,
    layers: Sequence[int] | None = None,
    divided: bool = False,
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Yield the hidden states of a data set in batches of rows of similar length.

    Args:
        dataset: a `StateDataset`, or with `lm` a `PromptDataset`.
        config: config of a head, whose scope tells which tokens count.
        lm: the frozen LM, if the states are not cached.
        layers: states to collect from the LM. Defaults to all.
        divided: in a process group, yield only this rank's share of the batches.

    Yields:
        Row numbers, hidden states `[S, B, T, D]`, and the mask `[B, T]` of the counted tokens. Leading tokens that no
        row counts may be missing.
    """
    collate = ProbeCollator()
    prompts, unread = [], []
    for first in range(0, len(dataset), 512):
        part = [dataset[row] for row in range(first, min(first + 512, len(dataset)))]
        prompts += [row["input_ids"] for row in part]
        if lm is not None:
            unread += counted_tokens(config, collate(part)).int().argmax(dim=1).tolist()
    if lm is None:
        passes = [Pass(rows) for rows in length_batches(list(map(len, prompts)), batch_tokens)]
    else:
        passes = plan_passes(lm, prompts, unread, batch_tokens)
        layers = range(find_decoder(lm).num_hidden_layers + 1) if layers is None else layers
    title = "scoring" if lm is None else "hidden states"
    with tqdm(total=len(prompts), desc=title, unit=" rows", disable=not (progress and is_main()), leave=False) as bar:
        for each in share(passes) if divided and not is_tensor_parallel(lm) else passes:
            batch = collate([dataset[row] for row in each.rows])
            if lm is None:
                states, mask = batch["hidden_states"].transpose(0, 1), batch["attention_mask"].bool()
            else:
                ids, mask = batch["input_ids"][:, each.skip :], counted_tokens(config, batch)[:, each.skip :]
                states = torch.stack(collect_hidden_states(lm, layers, ids, prefix=each.prefix))
            yield each.rows, states, mask
            bar.update(len(each.rows) * (world_size() if divided else 1))


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


def shared_layers(configs: Iterable[ProbeConfig]) -> list[int]:
    """Return the indices of the states that at least one of several heads reads, ascending."""
    return sorted({layer for config in configs for layer in config.layer_indices})


def shared_config(configs: Sequence[ProbeConfig]) -> ProbeConfig:
    """Return a config that reads what several heads read together, for a `StateCache`.

    Raises:
        ProbeError: the heads do not read the same tokens.
    """
    first = configs[0]
    for name in ("token_scope", "prompt_format", "system_prompt", "max_length"):
        if len(values := {str(getattr(config, name)) for config in configs}) > 1:
            raise ProbeError(f"heads of one run read the same tokens, not {name}={', '.join(sorted(values))}")
    layers = shared_layers(configs)
    if all(config.probe_type == first.probe_type and config.layer_indices == layers for config in configs):
        return first
    return first.replace(probe_type="pooling", options={}, layers=layers)


def layers_of(dataset: Dataset) -> list[int] | None:
    """Return the layers of the hidden states that a data set, or the one that it wraps, holds. None if it has prompts."""
    while not hasattr(dataset, "layers"):
        if (dataset := getattr(dataset, "dataset", None)) is None:
            return None
    return dataset.layers
