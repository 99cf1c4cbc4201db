"""Heads in a worker process: what they say of prompts whose states are all in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import ProbeError
from ..heads.probe import ProbeModel
from ..heads.scope import check_rows, token_mask
from ..serving.reader import StateReader
from .state_cache import StateCache


# States are read in pieces of about so many tokens, several layers of a short prompt at once: a long prompt's states never lie in
# memory in fp32 at once, nor those of many prompts.
_TOKENS = 4096
# Prompts go together where none is shorter than this part of the longest: what is added to the others is computed for nothing.
_SHORTEST = 0.6


@dataclass
class ScoringJob:
    """A prompt that is complete after this step.

    Attributes:
        request_id: of the engine.
        token_ids: of the prompt; `None` where it was given as embeddings.
        num_tokens: of the prompt.
        block_ids: where its tokens lie, in order.
        heads: names of those to run.
    """

    request_id: str
    token_ids: list[int] | None
    num_tokens: int
    block_ids: list[int]
    heads: list[str]


@dataclass
class _Prompt:
    """A job, and for each head that can read it the tokens that count, `[1, num_tokens]`."""

    job: ScoringJob
    masks: dict[str, torch.Tensor]


class Scorer:
    """Runs heads on cached states.

    Args:
        heads: by name. With tensor parallelism all ranks have them, to read the same layers, and rank 0 runs them.
        layers: state indices that are kept, ascending.
        cache: where. block_size: tokens a block of the scheduler's; the cache may split them.
        runs: whether this rank runs the heads.
    """

    def __init__(
        self, heads: Mapping[str, ProbeModel], layers: list[int], cache: StateCache, block_size: int, runs: bool
    ):
        self.device = cache.kv_cache.device
        self.heads = {name: head.to(self.device) for name, head in heads.items()}
        self.layers, self.cache, self.block_size, self.runs = layers, cache, block_size, runs

    @torch.inference_mode()
    def score(self, jobs: Sequence[ScoringJob]) -> dict[str, dict[str, list[float] | str]]:
        """By request and head the logits, finite or not, or why there are none. Ranks that run no heads have no logits."""
        found: dict[str, dict[str, list[float] | str]] = {job.request_id: {} for job in jobs}
        order = {job.request_id: job.heads for job in jobs}
        prompts = []
        for job in jobs:
            prompt = _Prompt(job, {})
            for name in job.heads:
                try:
                    prompt.masks[name] = self._mask(self.heads[name], job)
                except ProbeError as error:
                    found[job.request_id][name] = str(error)
            prompts.append(prompt)
        for batch in _batches(prompts, self.cache.kernel_block_size):
            logits = self._score(batch)
            for row, prompt in enumerate(batch):
                said = found[prompt.job.request_id]
                said |= {name: rows[row].tolist() for name, rows in logits.items()}
        # in the order in which heads were asked for
        return {
            request: {name: said[name] for name in order[request] if name in said} for request, said in found.items()
        }

    def _score(self, prompts: Sequence[_Prompt]) -> dict[str, torch.Tensor]:
        """Logits `[prompts, num_labels]` by head, of prompts that the same heads can read."""
        lengths = torch.tensor([prompt.job.num_tokens for prompt in prompts])
        width = int(lengths.max())
        names = list(prompts[0].masks)
        masks = {name: torch.zeros(len(prompts), width, dtype=torch.bool) for name in names}
        blocks = torch.zeros(len(prompts), max(len(prompt.job.block_ids) for prompt in prompts), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            blocks[row, : len(prompt.job.block_ids)] = torch.tensor(prompt.job.block_ids)
            for name in names:
                masks[name][row, : prompt.job.num_tokens] = prompt.masks[name][0]
        # What lies behind a shorter prompt may be anything, and anything may be no number.
        padding = None if (lengths == width).all() else (torch.arange(width) >= lengths[:, None]).to(self.device)
        size = self.cache.kernel_block_size
        splits = self.block_size // size
        blocks = (blocks[:, :, None] * splits + torch.arange(splits)).flatten(1).to(self.device)
        heads = {name: self.heads[name] for name in names}
        reader = StateReader(heads) if self.runs else None
        wanted = {layer for head in heads.values() for layer in head.layer_indices}
        step = max(_TOKENS // (len(prompts) * size), 1) * size
        places = [place for place, layer in enumerate(self.layers) if layer in wanted]
        for start in range(0, width, step):
            stop = min(start + step, width)
            part = blocks[:, start // size : -(-stop // size)]  # blocks are read whole
            if reader is not None:
                reader.begin({name: mask[:, start:stop] for name, mask in masks.items()}, last=stop == width)
            for states in _neighbours(places, _TOKENS // (part.numel() * size)):
                hidden = self.cache.read(states, part)[:, :, : stop - start]  # [S, prompts, tokens, D]
                if padding is not None:
                    hidden = hidden.masked_fill(padding[:, start:stop, None], 0)
                if reader is not None:
                    for layer, each in zip(self.layers[states], hidden, strict=True):
                        reader.on_state(layer, each)
            if reader is not None:
                reader.end()
        return {} if reader is None else {name: output.logits for name, output in reader.results().items()}

    def _mask(self, head: ProbeModel, job: ScoringJob) -> torch.Tensor:
        ids = None if job.token_ids is None else torch.tensor([job.token_ids])
        mask = token_mask(head.config, ids, torch.ones(1, job.num_tokens, dtype=torch.long)).bool()
        check_rows(mask)
        return mask


def _neighbours(places: Sequence[int], most: int) -> Iterator[slice]:
    """Ascending places as ranges, of at most so many, and at least one."""
    first = 0
    for i in range(1, len(places) + 1):
        if i == len(places) or places[i] != places[i - 1] + 1 or i - first >= most:
            yield slice(places[first], places[i - 1] + 1)
            first = i


def _batches(prompts: Sequence[_Prompt], size: int) -> Iterator[list[_Prompt]]:
    """Prompts that go through the heads together: the same heads can read them, and they are of about one length.

    Args:
        size: tokens a block of the cache; blocks are read as a whole.
    """
    together: dict[tuple[str, ...], list[_Prompt]] = {}
    for prompt in prompts:
        if prompt.masks:
            together.setdefault(tuple(prompt.masks), []).append(prompt)
    for alike in together.values():
        alike.sort(key=lambda prompt: prompt.job.num_tokens, reverse=True)
        batch: list[_Prompt] = []
        for prompt in alike:
            width = batch[0].job.num_tokens if batch else 0
            read = -(-width // size) * size * (len(batch) + 1)
            if batch and (read > _TOKENS or prompt.job.num_tokens < _SHORTEST * width):
                yield batch
                batch = []
            batch.append(prompt)
        yield batch
