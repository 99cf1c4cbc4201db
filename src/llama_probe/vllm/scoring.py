"""Heads in a worker process: what they say of a prompt whose states are all in the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import ProbeError
from ..probe import ProbeModel
from ..scope import token_mask
from .state_cache import StateCache


# Tokens are read in pieces of this many, one layer at a time: a long prompt's states never lie in memory in fp32 at once.
_TOKENS = 4096


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


class Scorer:
    """Runs heads on cached states.

    Args:
        heads: by name. With tensor parallelism all ranks have them, to read the same layers, and rank 0 runs them.
        layers: state indices that are kept, ascending.
        cache: where. block_size: tokens a block of the scheduler's.
        runs: whether this rank runs the heads.
    """

    def __init__(
        self, heads: Mapping[str, ProbeModel], layers: list[int], cache: StateCache, block_size: int, runs: bool
    ):
        self.device = cache.kv_cache.device
        self.heads = {name: head.to(self.device) for name, head in heads.items()}
        self.layers, self.cache, self.block_size, self.runs = layers, cache, block_size, runs

    @torch.inference_mode()
    def score(self, job: ScoringJob) -> dict[str, list[float] | str]:
        """The logits of each head, or why there are none. Empty on ranks that run no heads."""
        heads = {name: self.heads[name] for name in job.heads}
        found: dict[str, list[float] | str] = {}
        states = {}
        for name, head in heads.items() if self.runs else ():
            try:
                states[name] = head.init_state(self._mask(head, job))
            except ProbeError as error:
                found[name] = str(error)
        blocks = torch.tensor(job.block_ids, device=self.device)
        wanted = {layer for head in heads.values() for layer in head.layer_indices}
        for place, layer in enumerate(self.layers):
            if layer not in wanted:
                continue
            for start in range(0, job.num_tokens, _TOKENS):
                tokens = torch.arange(start, min(start + _TOKENS, job.num_tokens), device=self.device)
                slots = blocks[tokens // self.block_size] * self.block_size + tokens % self.block_size
                hidden = self.cache.read(place, slots)[None]  # [1, tokens, D]
                for name, state in states.items():
                    heads[name].step(state, layer, hidden)
        for name, state in states.items():
            logits = heads[name].finish(state).logits[0]
            found[name] = logits.tolist() if logits.isfinite().all() else "the head's logits are no finite numbers"
        return found

    def _mask(self, head: ProbeModel, job: ScoringJob) -> torch.Tensor:
        ids = None if job.token_ids is None else torch.tensor([job.token_ids])
        return token_mask(head.config, ids, torch.ones(1, job.num_tokens, dtype=torch.long))
