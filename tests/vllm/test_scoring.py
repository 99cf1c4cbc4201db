"""Heads on cached states say of every prompt what they say of its states alone, whatever else is scored and lies around."""

import math

import pytest
import torch
from conftest import make_probe
from torch import nn


pytest.importorskip("vllm")

from llama_probe.vllm import scoring
from llama_probe.vllm.scoring import Scorer, ScoringJob
from llama_probe.vllm.state_cache import StateCache


LAYERS, HIDDEN, BLOCK = list(range(5)), 32, 8
HEADS = {
    "mha": make_probe(0),
    "other": make_probe(1),
    "content": make_probe(2, token_scope="content", prefix_ids=[5, 6]),
    "gate": make_probe(3, probe_type="gate", layers=[1, 3]),
    "multimax": make_probe(4, probe_type="multimax", options={"num_maxima": 2, "num_members": 3}),
    "last": make_probe(5, probe_type="last"),
}


def make_cache(blocks: int, kernel_block_size: int) -> StateCache:
    """What is not written holds no numbers, as what other requests have left may."""
    cache = StateCache.__new__(StateCache)
    nn.Module.__init__(cache)
    cache.ranks, cache.head_size = 1, HIDDEN
    cache.kv_cache = torch.full((blocks, len(LAYERS), kernel_block_size, HIDDEN), torch.nan)
    return cache


def fill(cache: StateCache, lengths: list[int], heads: list[list[str]]):
    """Random prompts in random blocks of the scheduler's: jobs, and by request the states `[layers, tokens, hidden_size]`."""
    size = cache.kernel_block_size
    free = torch.randperm(len(cache.kv_cache) * size // BLOCK).tolist()
    jobs, states = [], {}
    for number, (length, names) in enumerate(zip(lengths, heads, strict=True)):
        block_ids = [free.pop() for _ in range(-(-length // BLOCK))]
        ids = [5, 6, *torch.randint(7, 20, (length,)).tolist()][:length]
        jobs.append(ScoringJob(f"request-{number}", ids, length, block_ids, names))
        states[f"request-{number}"] = written = torch.randn(len(LAYERS), length, HIDDEN)
        for token in range(length):
            slot = block_ids[token // BLOCK] * BLOCK + token % BLOCK
            cache.kv_cache[slot // size, :, slot % size] = written[:, token]
    return jobs, states


def check(jobs, states, found) -> None:
    assert list(found) == [job.request_id for job in jobs]
    for job in jobs:
        assert list(found[job.request_id]) == job.heads
        for name, logits in found[job.request_id].items():
            mask = torch.ones(1, job.num_tokens)
            if name == "content":
                mask[:, :2] = 0
            if not mask.any():
                assert "no token that a head reads" in logits
                continue
            with torch.no_grad():
                alone = HEADS[name](hidden_states=states[job.request_id][:, None].unbind(), attention_mask=mask).logits
            torch.testing.assert_close(torch.tensor([logits]), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel_block_size", [BLOCK, BLOCK // 2])
@pytest.mark.parametrize("tokens", [4096, 64, 4])
@pytest.mark.parametrize("seed", range(3))
def test_together_as_alone(monkeypatch, kernel_block_size, tokens, seed):
    torch.manual_seed(seed)
    monkeypatch.setattr(scoring, "_TOKENS", tokens)
    cache = make_cache(100, kernel_block_size)
    lengths = [*torch.randint(2, 40, (12,)).tolist(), 2, 16, 16]  # of two tokens the content head reads none
    every = list(HEADS)
    heads = [every if number % 3 else every[: number % len(every) + 1] for number in range(len(lengths))]
    jobs, states = fill(cache, lengths, heads)
    check(jobs, states, Scorer(HEADS, LAYERS, cache, BLOCK, True).score(jobs))


def test_nothing_to_score():
    scorer = Scorer(HEADS, LAYERS, make_cache(2, BLOCK), BLOCK, True)
    assert scorer.score([]) == {}
    assert scorer.score([ScoringJob("a", [1, 2], 2, [1], [])]) == {"a": {}}


def test_what_is_no_number_stays_with_its_prompt():
    cache = make_cache(20, BLOCK)
    jobs, states = fill(cache, [10, 9], [["mha", "last"]] * 2)
    cache.kv_cache[jobs[0].block_ids[0]] = torch.nan
    found = Scorer(HEADS, LAYERS, cache, BLOCK, True).score(jobs)
    assert not any(map(math.isfinite, found["request-0"]["mha"]))
    check(jobs[1:], states, {"request-1": found["request-1"]})


def test_prompts_of_about_one_length_go_together_and_within_the_limit(monkeypatch):
    cache, read, reads = make_cache(100, BLOCK), StateCache.read, []

    def noted(self, states, block_ids):
        reads.append((states.stop - states.start, *block_ids.shape))
        return read(self, states, block_ids)

    monkeypatch.setattr(StateCache, "read", noted)
    jobs, _ = fill(cache, [16, 14, 3, 16, 2, 11], [["mha"]] * 6)
    Scorer(HEADS, LAYERS, cache, BLOCK, True).score(jobs)
    assert reads == [(5, 4, 2), (5, 2, 1)], "all layers at once"
    reads.clear()
    monkeypatch.setattr(scoring, "_TOKENS", 32)
    Scorer(HEADS, LAYERS, cache, BLOCK, True).score(jobs)
    assert reads == [(1, 2, 2)] * 10 + [(2, 2, 1), (2, 2, 1), (1, 2, 1)]
    reads.clear()
    jobs, _ = fill(cache, [2] * 30, [["mha"]] * 30)  # of which whole blocks are read
    Scorer(HEADS, LAYERS, cache, BLOCK, True).score(jobs)
    assert max(states * rows * blocks * BLOCK for states, rows, blocks in reads) <= 32


def test_other_ranks_read_along_and_run_nothing():
    """With tensor parallelism the states of all ranks are gathered: all must read the same ones in the same order."""

    class Reads(StateCache):
        def read(self, states, block_ids):
            self.reads.append((states, block_ids.tolist()))
            return super().read(states, block_ids)

    said, read = [], []
    cache = make_cache(60, BLOCK)
    cache.__class__ = Reads
    jobs, _ = fill(cache, [20, 3, 12, 2], [["gate"], ["mha", "last"], ["mha", "last"], ["content"]])
    for runs in (True, False):
        cache.reads = []
        said.append(Scorer(HEADS, LAYERS, cache, BLOCK, runs).score(jobs))
        read.append(cache.reads)
    assert read[0] == read[1] and read[0]
    assert all(logits for found in said[0].values() for logits in found.values())
    assert said[1] == {f"request-{number}": {} for number in range(3)} | {"request-3": said[0]["request-3"]}
