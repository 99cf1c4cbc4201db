"""Hidden states of a data set, computed once and kept on disk, so that an epoch does not run the backbone again.

Hidden states on disk can reveal the texts: protect them as you protect the texts.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset
from transformers.utils import logging

from ..backbone.decoder import find_decoder, is_tensor_parallel
from ..backbone.loading import weights_digest
from ..distributed import barrier, is_main, on_main
from ..errors import ProbeError
from ..files import make_folder, remove_leftovers, write_atomically
from ..heads import get_probe_type
from ..heads.configuration import ProbeConfig, shared_layers
from ..heads.scope import check_rows, tokens_read
from ..heads.segments import judges_segments
from .batches import collate, counted_tokens, iterate_states, row_chunks, segments_of
from .prompts import PromptDataset


logger = logging.get_logger(__name__)

_FORMAT = 4
# Fields that are the same in all heads that read the same states.
_SHARED_FIELDS = (
    "id2label",
    "problem_type",
    "hidden_size",
    "num_hidden_layers",
    "token_scope",
    "prompt_format",
    "system_prompt",
    "max_length",
    "window",
)


class StateDataset(PromptDataset):
    """Hidden states of rows, mapped from disk, and the labels of the rows.

    Items have `input_ids` (the counted tokens, T of them), `hidden_states` `[S, T, D]` and, if the rows have them, `labels`. For a
    head that `judges_segments`, `segments` has the number of each token's segment; if the rows tell of requests, `request_mask` has
    the tokens of each request.

    Args:
        entry: a subfolder of `DiskStates` that has the states of all rows.
        keys: the key of each row in the entry. Rows of the same tokens share a key.
        config: config of the head that the states are for. The S states are those of its `layer_indices`.
    """

    def __init__(self, entry: Path, keys: Sequence[str], rows: PromptDataset, config: ProbeConfig):
        on_disk = rows_on_disk(entry)
        super().__init__([on_disk[key][0] for key in keys], rows.labels, reply_lengths=rows.reply_lengths)
        self.columns["hidden_states"] = [on_disk[key][1] for key in keys]
        if judges_segments(config):
            self.columns["segments"] = _segments(config, rows)
        if rows.requests is not None:
            self.columns["request_mask"] = _request_masks(config, rows)
        self.config = config


class DiskStates:
    """A folder of hidden states, with an entry (a subfolder) for each backbone and each choice of layers and tokens.

    The name of an entry is a digest of the backbone's weights and config, the dtype, the token scope and the layers. A file of an
    entry holds the states of one pass of the backbone, with a key for the tokens of each prompt. So the backbone runs once for a
    prompt of several data sets and runs, and a run continues where a killed run has stopped. In a process group each rank computes
    a share of the prompts; all ranks must see the same folder.

    Args:
        dtype: dtype of the states on disk: `torch.float16`, `torch.bfloat16` or `torch.float32`. Defaults to `torch.bfloat16` for
            an LM in bfloat16, which loses nothing, else to `torch.float16`.
    """

    def __init__(self, folder: str | os.PathLike, dtype: torch.dtype | None = None):
        self.folder = Path(folder)
        self.dtype = dtype

    def dataset(self, lm: nn.Module, config: ProbeConfig, rows: PromptDataset) -> StateDataset:
        """Return the hidden states that a head with this config reads of prompts. Compute the states that are not on disk."""
        return self.datasets(lm, config, {"rows": rows})["rows"]

    def datasets(
        self, lm: nn.Module, config: ProbeConfig, parts: Mapping[str, PromptDataset]
    ) -> dict[str, StateDataset]:
        """Return the hidden states of several data sets by name, as `dataset` does, and compute them in one go."""
        entry = self._entry(lm, config)
        keys = {name: _keys_of(rows) for name, rows in parts.items()}
        missing = self._missing(entry, parts.values())
        if missing:
            total = len({key for part in keys.values() for key in part})
            on_main(lambda: self._begin(entry, total - len(missing), total))
            self._compute(entry, lm, config, missing)  # an error or a kill leaves the finished files
            barrier()
        return {name: StateDataset(entry, keys[name], rows, config) for name, rows in parts.items()}

    def missing(self, lm: nn.Module, config: ProbeConfig, parts: Iterable[PromptDataset]) -> list[dict]:
        """Return the items of data sets whose states `datasets` would compute, each prompt once."""
        return list(self._missing(self._entry(lm, config), parts).values())

    def _missing(self, entry: Path, parts: Iterable[PromptDataset]) -> dict[str, dict]:
        done = on_main(lambda: set(rows_on_disk(entry)))
        items = {}
        for part in parts:
            for row, key in enumerate(_keys_of(part)):
                if key not in done:
                    items[key] = part[row]
        return items

    def bytes_of(self, config: ProbeConfig, rows: Sequence[dict]) -> int:
        """Return the bytes that the states of items of a `PromptDataset` take on disk, for a head with this config."""
        tokens = sum(int(_tokens_read(config, chunk).sum()) for chunk in row_chunks(rows))
        return tokens * len(config.layer_indices) * config.hidden_size * (self.dtype or torch.float16).itemsize

    def bytes_on_disk(self) -> int:
        """Return the bytes of all states in the folder."""
        return sum(path.stat().st_size for path in self.folder.rglob("*.safetensors"))

    def _dtype_for(self, lm: nn.Module) -> torch.dtype:
        is_bfloat16 = getattr(find_decoder(lm).model, "dtype", None) == torch.bfloat16
        return self.dtype or (torch.bfloat16 if is_bfloat16 else torch.float16)

    def _entry(self, lm: nn.Module, config: ProbeConfig) -> Path:
        scope = [config.token_scope, config.prefix_ids, config.turn_markers]
        reads = [get_probe_type(config.probe_type).reads, config.layer_indices]
        return self.folder / _digest([_FORMAT, str(self._dtype_for(lm)), scope, reads, weights_digest(lm)])

    def _begin(self, entry: Path, there: int, total: int) -> None:
        logger.warning_once(f"caching hidden states in {self.folder} (they can reveal the texts: protect them alike)")
        if there:
            logger.warning(f"hidden states: {there:,} of {total:,} rows are there")
        make_folder(entry)
        remove_leftovers(entry)

    def _compute(self, entry: Path, lm: nn.Module, config: ProbeConfig, missing: Mapping[str, dict]) -> None:
        """Run the LM over the items that `missing` gives by key, and write a file for each pass."""
        keys = list(missing)
        prompts = prompts_to_read(config, list(missing.values()))
        check_rows(torch.tensor([[any(mask)] for mask in prompts.masks]))
        for places, states, counted, _ in iterate_states(prompts, config, lm):
            items = [prompts[place] for place in places]
            tensors = _tensors_of_pass(items, states.to("cpu", self._dtype_for(lm)), counted)
            # All ranks of a tensor-parallel LM compute the same rows, and the main rank writes.
            if is_main() or not is_tensor_parallel(lm):
                metadata = {"keys": " ".join(keys[place] for place in places)}
                # A pass is done when its complete file gets its name.
                save = partial(save_file, tensors, metadata=metadata)
                write_atomically(entry / f"{uuid.uuid4().hex}.safetensors", save)


def prompts_to_read(config: ProbeConfig, items: Sequence[dict]) -> PromptDataset:
    """Return the prompts of items, with masks of the tokens whose states a head needs."""
    masks = [_tokens_read(config, [item])[0].tolist() for item in items]
    return PromptDataset([item["input_ids"] for item in items], masks=masks)


def rows_on_disk(entry: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return by key the tokens `[T]` and the states `[S, T, D]` of each row of an entry, mapped from disk."""
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


def shared_config(configs: Sequence[ProbeConfig]) -> ProbeConfig:
    """Return a config that reads the tokens and the layers of several heads. Raise `ProbeError` if the heads do not fit together."""
    first = configs[0]
    for name in _SHARED_FIELDS:
        values = {str(getattr(config, name)) for config in configs}
        if len(values) > 1:
            raise ProbeError(f"heads of one run need the same {name}, not {' and '.join(sorted(values))}")
    layers = shared_layers(configs)
    if all(config.probe_type == first.probe_type and config.layer_indices == layers for config in configs):
        return first
    return first.replace(probe_type="pooling", options={}, layers=layers)


def cached_for(dataset: Dataset | None) -> ProbeConfig | None:
    """Return the config of a `StateDataset`, or of the `StateDataset` that a data set wraps; None for other data sets."""
    while dataset is not None and not isinstance(dataset, StateDataset):
        dataset = getattr(dataset, "dataset", None)
    return None if dataset is None else dataset.config


def _keys_of(rows: PromptDataset) -> list[str]:
    return [_digest([ids, rows.masks and rows.masks[row]]) for row, ids in enumerate(rows.prompts)]


def _digest(values: list[object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def _tokens_read(config: ProbeConfig, rows: Sequence[dict]) -> torch.Tensor:
    """Return the mask `[B, T]` of the tokens whose states a head needs."""
    counted = counted_tokens(config, collate(rows))
    if config.reads_reply:
        return counted  # while a reply is written, each token is the last token once
    return tokens_read(config, counted)


def _segments(config: ProbeConfig, rows: PromptDataset) -> list[torch.Tensor]:
    """Return the segment of each counted token, `[T]` for each row."""
    segments: list[torch.Tensor] = []
    for chunk in row_chunks(rows):
        batch = collate(chunk)
        mask = counted_tokens(config, batch)
        numbers = segments_of(config, batch, mask)
        numbers = mask.long() if numbers is None else numbers
        segments += [row[row > 0] for row in numbers]
    return segments


def _request_masks(config: ProbeConfig, rows: PromptDataset) -> list[torch.Tensor]:
    """Return which of the counted tokens are of the request, `[T]` bool for each row."""
    masks: list[torch.Tensor] = []
    for chunk in row_chunks(rows):
        batch = collate(chunk)
        counted = counted_tokens(config, batch)
        masks += [row[counts] for row, counts in zip(batch["request_mask"], counted, strict=True)]
    return masks


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
