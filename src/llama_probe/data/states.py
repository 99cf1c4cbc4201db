"""Hidden states of a data set, computed once and kept on disk, so that training epochs do not run the backbone again.

A cache of states can hold what the texts held: treat it as you treat the texts.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..backbone.capture import collect_hidden_states
from ..backbone.decoder import find_decoder, is_tensor_parallel
from ..backbone.loading import weights_digest
from ..backbone.passes import Pass, length_batches, plan_passes
from ..distributed import barrier, is_main, lock, on_main, share, world_size
from ..errors import ProbeError
from ..files import is_disk_full, make_folder
from ..heads import get_probe_type
from ..heads.configuration import ProbeConfig
from ..heads.scope import check_rows, token_mask, tokens_read


if TYPE_CHECKING:
    from ..heads.probe import ProbeModel

logger = logging.get_logger(__name__)

_STATES, _META = "states.bin", "meta.json"
# A machine clears up only after itself: there are network folders whose locks do not reach beyond it.
_SCRATCH, _UNLOCKED = f".states.{platform.node()}.", ".unlocked."
_FORMAT = 1
# Rows that are looked at together.
_AT_ONCE = 512


class PromptDataset(Dataset):
    """Token ids and labels, for training with the backbone in the loop. Items: `input_ids`, `labels`.

    With `masks`, which say which tokens count where a head's scope cannot tell, `probe_mask` as well.

    Raises:
        ProbeError: there are not as many labels, or masks, as prompts. A loader would end at the first row without one.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], labels: np.ndarray, masks: Sequence[Sequence[bool]] | None = None
    ):
        for what, given in (("labels", labels), ("masks", prompts if masks is None else masks)):
            if len(given) != len(prompts):
                raise ProbeError(f"{len(given)} {what} for {len(prompts)} prompts: give one for each")
        self.prompts, self.labels, self.masks = prompts, labels, masks

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, row: int) -> dict:
        masked = {} if self.masks is None else {"probe_mask": self.masks[row]}
        return {"input_ids": self.prompts[row], "labels": self.labels[row], **masked}


class StateDataset(Dataset):
    """Hidden states and labels, mapped from disk.

    Items: `input_ids` (the tokens that count), `hidden_states` `[tokens, L+1, hidden_size]`, `labels`. With an entry of a
    head that reads less, only its layers, and of the tokens only those that matter to it.
    """

    def __init__(self, folder: Path, labels: np.ndarray):
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        self.labels = labels
        self.tokens: list[list[int]] = meta["tokens"]
        self.offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in self.tokens])]).tolist()
        shape = (self.offsets[-1], *meta["shape"])
        dtype = getattr(torch, meta["dtype"])
        self.states = torch.from_file(str(folder / _STATES), shared=False, size=int(np.prod(shape)), dtype=dtype).view(
            shape
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> dict:
        states = self.states[self.offsets[row] : self.offsets[row + 1]]
        return {"input_ids": self.tokens[row], "hidden_states": states, "labels": self.labels[row]}


def check_cache(cache: bool, cache_dir: str | os.PathLike | None) -> None:
    """Raises `ProbeError` where a folder is named for states, and none are to be kept."""
    if cache_dir is not None and not cache:
        raise ProbeError(
            f"cache_dir={str(cache_dir)!r} is for states that are kept, and with cache=False (--no-cache) none are: leave one out"
        )


class StateCache:
    """A folder of cached hidden states, one sub-folder for each set of prompts.

    What is cached is only the tokens and layers that the head reads. An entry is found again by the prompts, the scope, the
    dtype, the backbone's weights and config and what is read of it, and one with all that any head reads serves every head;
    anything else, and an entry that is damaged, is computed anew. In a process group (see `llama_probe.distributed`) the ranks
    compute a share of the rows each, and must see the same folder. Several runs may use one folder at a time; what a run that
    was killed has left half done is removed by the next one.

    Args:
        folder: where to keep the states; created where it is missing.
        dtype: of the states on disk: `torch.float16`, `torch.bfloat16` or `torch.float32`.
    """

    def __init__(self, folder: str | os.PathLike, dtype: torch.dtype = torch.float16):
        self.folder, self.dtype = Path(folder), dtype

    def dataset(
        self,
        lm: nn.Module,
        config: ProbeConfig,
        prompts: Sequence[Sequence[int]],
        labels: np.ndarray,
        batch_tokens: int = 4096,
        masks: Sequence[Sequence[bool]] | None = None,
    ) -> StateDataset:
        """The states of `prompts`, from disk or computed now.

        Args:
            lm: the frozen LM.
            config: of the head; its scope, kind and layers say what is kept.
            prompts: token ids of each row.
            labels: one entry a row.
            batch_tokens: tokens of a forward pass, padding included.
            masks: the tokens of each row that count, in place of the scope.

        Raises:
            ProbeError: the disk is too small, or a state does not fit the dtype.
        """
        key = hashlib.sha256()
        for part in (_FORMAT, str(self.dtype), config.token_scope, config.prefix_ids, prompts, weights_digest(lm)):
            key.update(json.dumps(part).encode())
        if masks is not None:
            key.update(json.dumps(masks).encode())
        entry = self.folder / key.hexdigest()[:32]
        layers, reads = config.layer_indices, get_probe_type(config.probe_type).reads
        if is_main():
            self._remove_abandoned()
        there = on_main(lambda: _is_whole(entry))
        if not there and (reads, len(layers)) != ("all", config.num_hidden_layers + 1):
            key.update(json.dumps([reads, layers]).encode())
            entry = self.folder / key.hexdigest()[:32]
            there = on_main(lambda: _is_whole(entry))
        if not there:
            self._compute(entry, lm, config, prompts, batch_tokens, masks)
        return StateDataset(entry, labels)

    def delete(self) -> None:
        """Removes the cache from disk."""
        if is_main():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _compute(self, entry: Path, lm, config, prompts, batch_tokens, masks=None) -> None:
        if masks is None:
            masks = [token_mask(config, torch.tensor([ids]), None) for ids in prompts]
        else:
            masks = [torch.tensor([mask]) for mask in masks]
        for mask in masks:
            check_rows(mask)
        masks = [tokens_read(config, mask)[0] for mask in masks]
        counts = [int(mask.sum()) for mask in masks]
        offsets = np.concatenate([[0], np.cumsum(counts)]).tolist()
        shape = (len(config.layer_indices), find_decoder(lm).hidden_size)
        size = offsets[-1] * int(np.prod(shape)) * self.dtype.itemsize
        logger.warning(
            f"caching hidden states of {len(prompts)} prompts, {size / 1e9:.2f} GB, in {self.folder} "
            "(they can hold what the texts hold: treat them alike)"
        )
        scratch = on_main(lambda: self._reserve(size))
        try:
            rows_of = PromptDataset(prompts, np.zeros(len(prompts)), masks)
            passes = iterate_states(rows_of, config, lm, batch_tokens, True, config.layer_indices, divided=True)
            # Written, not mapped: ranks on other machines may share the file over a network.
            with (scratch / _STATES).open("r+b") as file:
                for rows, batch, counted in passes:
                    batch = batch.transpose(1, 2).to("cpu", self.dtype)  # [B, T, layers_read, D]
                    if not bool(batch.isfinite().all()):
                        raise ProbeError(f"a hidden state is too large for {self.dtype}; cache as bfloat16 or float32")
                    for row, states, mask in zip(rows, batch, counted, strict=True):
                        file.seek(offsets[row] * int(np.prod(shape)) * self.dtype.itemsize)
                        file.write(states[mask].flatten().view(torch.uint8).numpy())
            barrier()
            if is_main():
                tokens = [torch.tensor(ids)[mask].tolist() for ids, mask in zip(prompts, masks, strict=True)]
                meta = {"shape": shape, "dtype": str(self.dtype).removeprefix("torch."), "tokens": tokens}
                (scratch / _META).write_text(json.dumps(meta), encoding="utf-8")
                if entry.exists() and not _is_whole(entry):
                    logger.warning(f"{entry} was damaged, and is replaced")
                    shutil.rmtree(entry, ignore_errors=True)
                try:
                    scratch.replace(entry)
                except OSError:
                    if not (entry / _META).is_file():  # another run was faster
                        raise
            barrier()
        finally:
            if is_main():
                self._reserved.close()
                shutil.rmtree(scratch, ignore_errors=True)

    def _reserve(self, size: int) -> Path:
        """A folder with a file of so many bytes, whose room on the disk is taken."""
        make_folder(self.folder)
        free = shutil.disk_usage(self.folder).free
        too_small = ProbeError(
            f"the hidden states need {size / 1e9:.1f} GB, {self.folder} has {free / 1e9:.1f} GB free: name another folder, or "
            "train without a cache"
        )
        if size > 0.95 * free:
            raise too_small
        scratch = Path(tempfile.mkdtemp(prefix=_UNLOCKED, dir=self.folder))
        self._reserved = (scratch / _STATES).open("wb")
        if lock(self._reserved):  # before it has the name by which others find it
            scratch = scratch.rename(scratch.with_name(scratch.name.replace(_UNLOCKED, _SCRATCH)))
        try:
            _take_room(self._reserved, size)
        except OSError as error:
            self._reserved.close()
            shutil.rmtree(scratch, ignore_errors=True)
            if is_disk_full(error):
                raise too_small from error
            raise
        return scratch

    def _remove_abandoned(self) -> None:
        """Removes what killed processes have left half done. What a living one holds is locked."""
        for states in self.folder.glob(f"{glob.escape(_SCRATCH)}*/{_STATES}"):
            try:
                with states.open("r+b") as file:
                    if lock(file):
                        shutil.rmtree(states.parent, ignore_errors=True)
            except OSError:  # its owner, or another that clears up, was faster
                continue


def _take_room(file: BinaryIO, size: int) -> None:
    """Makes a file so long, and takes its room on the disk now: what another run writes meanwhile cannot end this one at its end."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if is_disk_full(error):
                raise
    file.truncate(size)  # where the system or the disk cannot do so


class ProbeCollator:
    """Pads rows of a `PromptDataset` or a `StateDataset` on the right and stacks them into a batch."""

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """`labels`, `attention_mask` `[B, T]`, `input_ids` `[B, T]` or `hidden_states` `[B, L+1, T, D]`, where the rows have one
        `probe_mask` `[B, T]`, and where some have them `row_weights` `[B, W]`, which are 1 for the others."""
        lengths = [len(row["input_ids"]) for row in rows]
        width = max(lengths)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, length in enumerate(lengths):
            mask[i, :length] = 1
        labels = torch.from_numpy(np.stack([row["labels"] for row in rows]))
        if labels.is_floating_point():
            # The Trainer takes a label of -100 for none, and would divide the loss by the other rows alone, perhaps by none.
            labels = torch.where(labels == -100, torch.nextafter(labels, torch.zeros_like(labels)), labels)
        batch = {"attention_mask": mask, "labels": labels}
        if "hidden_states" in rows[0]:
            first = rows[0]["hidden_states"]
            # Laid out layers first, as heads compute, so that they need not copy it again.
            states = first.new_zeros(first.shape[1], len(rows), width, first.shape[2])
            for i, row in enumerate(rows):
                states[:, i, : lengths[i]] = row["hidden_states"].transpose(0, 1)
            batch["hidden_states"] = states.transpose(0, 1)
        else:
            ids = torch.zeros(len(rows), width, dtype=torch.long)
            for i, row in enumerate(rows):
                ids[i, : lengths[i]] = torch.as_tensor(row["input_ids"])
            batch["input_ids"] = ids
        if "probe_mask" in rows[0]:
            batch["probe_mask"] = torch.zeros(len(rows), width, dtype=torch.bool)
            for i, row in enumerate(rows):
                batch["probe_mask"][i, : lengths[i]] = torch.as_tensor(row["probe_mask"])
        weights = [row.get("row_weights") for row in rows]
        if (some := next(filter(None, weights), None)) is not None:
            batch["row_weights"] = torch.tensor([each or [1.0] * len(some) for each in weights])
        return batch


def counted_tokens(config: ProbeConfig, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tokens of a batch of a `PromptDataset` that count for a head, `[batch, tokens]`."""
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
    """The states of a data set, a batch of rows of like length at a time.

    Args:
        dataset: a `StateDataset`, or with `lm` a `PromptDataset`.
        config: of a head; its scope says which tokens count.
        lm: the frozen LM, where the states are not cached.
        batch_tokens: tokens of a batch, padding included.
        progress: show a bar.
        layers: states wanted of an LM; all where left out.
        divided: in a process group, only this rank's share of the batches; see `llama_probe.distributed`.

    Yields:
        Row numbers, `hidden_states` `[batch, L+1, tokens, hidden_size]`, and the mask `[batch, tokens]` of the tokens that
        count. What rows begin with and no head reads may be left out.
    """
    collate = ProbeCollator()
    if lm is None and len(dataset) and "hidden_states" not in dataset[0]:
        raise ProbeError(
            "these rows have ids and no hidden states: they need a backbone, ProbeModel(config, backbone=...)"
        )
    prompts, unread = [], []
    for first in range(0, len(dataset), _AT_ONCE):
        part = [dataset[row] for row in range(first, min(first + _AT_ONCE, len(dataset)))]
        prompts += [row["input_ids"] for row in part]
        if lm is not None:
            unread += counted_tokens(config, collate(part)).int().argmax(dim=1).tolist()
    if lm is None:
        passes = [Pass(rows) for rows in length_batches([len(ids) for ids in prompts], batch_tokens)]
    else:
        passes = plan_passes(lm, prompts, unread, batch_tokens)
        layers = range(find_decoder(lm).num_hidden_layers + 1) if layers is None else layers
    what = "scoring" if lm is None else "hidden states"
    with tqdm(total=len(prompts), desc=what, unit=" rows", disable=not (progress and is_main()), leave=False) as bar:
        for each in share(passes) if divided and not is_tensor_parallel(lm) else passes:
            batch = collate([dataset[row] for row in each.rows])
            if lm is None:
                states, mask = batch["hidden_states"], batch["attention_mask"].bool()
            else:
                ids, attention_mask = (batch[name][:, each.skip :] for name in ("input_ids", "attention_mask"))
                mask = counted_tokens(config, batch)[:, each.skip :]
                states = torch.stack(collect_hidden_states(lm, layers, ids, attention_mask, each.prefix), dim=1)
            yield each.rows, states, mask
            bar.update(len(each.rows) * (world_size() if divided else 1))


class SharedStates:
    """The states of a batch, normalised once for all heads that want them so.

    Args:
        states (`[L+1, batch, tokens, hidden_size]`): of all layers, or of those alone that every head reads.
    """

    def __init__(self, states: torch.Tensor):
        self.states = states
        self._normalized: dict[str, torch.Tensor] = {}

    def __call__(self, probe: ProbeModel) -> torch.Tensor:
        """What `probe.score` takes: `[layers_read, batch, tokens, hidden_size]`."""
        kind = probe.config.normalize
        if kind not in self._normalized:
            self._normalized[kind] = probe.normalize(self.states)
        x = self._normalized[kind]
        return x if len(probe.layer_indices) == len(x) else x[probe.layer_indices]


def _is_whole(entry: Path) -> bool:
    """Whether an entry of the cache is there, and can be read."""
    try:
        StateDataset(entry, np.empty(0))
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError):
        return False
    return True
