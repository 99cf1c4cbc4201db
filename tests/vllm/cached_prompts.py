"""Caches of what heads read, with random prompts in random blocks, and a scorer of what they hold."""

import copy
import functools

import torch
from torch import nn

from llama_probe.vllm.cache_plan import CachePlan, Projector
from llama_probe.vllm.scoring import Scorer, ScoringRequest
from llama_probe.vllm.state_cache import FEATURES, STATES, StateCache


LAYERS, HIDDEN, BLOCK = list(range(5)), 32, 8


class Reads(StateCache):
    """Notes in a list what is read: states, prompts, blocks of each."""

    def read(self, block_ids):
        self.reads.append((self.kv_cache.shape[1], *block_ids.shape))
        return super().read(block_ids)


def make_cache(
    plan: CachePlan, reads: list, blocks: int, kernel_block_size: int, num_states: int, width: int
) -> StateCache:
    """What is not written holds no numbers, as what other requests have left may."""
    cache = Reads.__new__(Reads)
    nn.Module.__init__(cache)
    cache.ranks, cache.head_size, cache.width, cache.plan, cache.reads = 1, width, width, plan, reads
    cache.kv_cache = torch.full((blocks, num_states, kernel_block_size, width), torch.nan)
    return cache


class Served:
    """Caches of a plan, and a scorer of what they hold. What it reads is noted in `reads`."""

    def __init__(self, heads, projected: bool, blocks: int, kernel_block_size: int = BLOCK, slots=0):
        self.written, self.reads = heads, []
        self.plan = CachePlan({name: copy.deepcopy(head) for name, head in heads.items()}, projected)
        if slots:
            self.plan.follow_replies(slots, torch.device("cpu"))
        sizes = (len(self.plan.layers), HIDDEN), (1, self.plan.width)
        makes = functools.partial(make_cache, self.plan, self.reads, blocks, kernel_block_size)
        self.caches = {kind: makes(*size) for kind, size in zip((STATES, FEATURES), sizes, strict=True) if all(size)}
        self.scorer = Scorer(self.caches, BLOCK)

    def fill(self, lengths: list[int], heads: list[list[str]]):
        """Random prompts in random blocks of the scheduler's: requests, and by request the states `[layers, tokens, hidden_size]`."""
        size, blocks = self.scorer.kernel_block_size, len(next(iter(self.caches.values())).kv_cache)
        free = torch.randperm(blocks * size // BLOCK).tolist()
        requests, states, projector = [], {}, Projector(self.written, self.plan)
        for number, (length, names) in enumerate(zip(lengths, heads, strict=True)):
            block_ids = [free.pop() for _ in range(-(-length // BLOCK))]
            ids = [5, 6, *torch.randint(7, 20, (length,)).tolist()][:length]
            requests.append(ScoringRequest(f"request-{number}", ids, length, length, block_ids, names))
            states[f"request-{number}"] = written = torch.randn(len(LAYERS), length, HIDDEN)
            features = projector.project(dict(enumerate(written)))[None] if self.plan.width else None
            kept = {STATES: written[self.plan.layers], FEATURES: features}
            for kind, cache in self.caches.items():
                for token in range(length):
                    slot = block_ids[token // BLOCK] * BLOCK + token % BLOCK
                    cache.kv_cache[slot // size, :, slot % size] = kept[kind][:, token]
        return requests, states
