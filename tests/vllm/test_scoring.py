"""Heads on cached states say of every prompt what they say of its states alone, whatever else is scored and lies around."""

import copy
import functools
import math
import pickle

import pytest
import torch
from accelerator import DEVICE, Accelerator
from conftest import make_probe
from torch import nn

from llama_probe.vllm import cache_plan, scoring
from llama_probe.vllm.cache_plan import CachePlan, Projector
from llama_probe.vllm.scoring import Scorer, ScoringRequest
from llama_probe.vllm.state_cache import FEATURES, STATES, StateCache


LAYERS, HIDDEN, BLOCK = list(range(5)), 32, 8
HEADS = {
    "mha": make_probe(0),
    "other": make_probe(1),
    "content": make_probe(2, token_scope="content", prefix_ids=[5, 6]),
    "gate": make_probe(3, probe_type="gate", layers=[1, 3]),
    "multimax": make_probe(4, probe_type="multimax", options={"num_maxima": 2, "num_members": 3}),
    "last": make_probe(5, probe_type="last"),
}
PLANS = {False: CachePlan(HEADS, projected=False), True: CachePlan(HEADS, projected=True)}


class Reads(StateCache):
    """Notes in a list what is read: how many states, of which blocks."""

    def read(self, states, block_ids):
        self.reads.append((states.stop - states.start, self.width, block_ids.tolist()))
        return super().read(states, block_ids)


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

    def __init__(self, projected: bool, blocks: int, kernel_block_size: int = BLOCK, runs: bool = True):
        self.plan, self.reads = PLANS[projected], []
        sizes = (len(self.plan.layers), HIDDEN), (1, self.plan.width)
        makes = functools.partial(make_cache, self.plan, self.reads, blocks, kernel_block_size)
        self.caches = {kind: makes(*size) for kind, size in zip((STATES, FEATURES), sizes, strict=True) if all(size)}
        self.scorer = Scorer(self.caches, BLOCK, runs)

    def fill(self, lengths: list[int], heads: list[list[str]]):
        """Random prompts in random blocks of the scheduler's: requests, and by request the states `[layers, tokens, hidden_size]`."""
        size, blocks = self.scorer.kernel_block_size, len(next(iter(self.caches.values())).kv_cache)
        free = torch.randperm(blocks * size // BLOCK).tolist()
        requests, states, projector = [], {}, Projector(HEADS, self.plan)
        for number, (length, names) in enumerate(zip(lengths, heads, strict=True)):
            block_ids = [free.pop() for _ in range(-(-length // BLOCK))]
            ids = [5, 6, *torch.randint(7, 20, (length,)).tolist()][:length]
            requests.append(ScoringRequest(f"request-{number}", ids, length, block_ids, names))
            states[f"request-{number}"] = written = torch.randn(len(LAYERS), length, HIDDEN)
            features = projector.project(dict(enumerate(written)))[None] if self.plan.width else None
            kept = {STATES: written[self.plan.layers], FEATURES: features}
            for kind, cache in self.caches.items():
                for token in range(length):
                    slot = block_ids[token // BLOCK] * BLOCK + token % BLOCK
                    cache.kv_cache[slot // size, :, slot % size] = kept[kind][:, token]
        return requests, states


def check(requests, states, found) -> None:
    assert list(found) == [request.request_id for request in requests]
    for request in requests:
        assert list(found[request.request_id]) == request.heads
        for name, logits in found[request.request_id].items():
            mask = torch.ones(1, request.num_tokens)
            if name == "content":
                mask[:, :2] = 0
            if not mask.any():
                assert "no token that a head reads" in logits
                continue
            with torch.no_grad():
                alone = HEADS[name](
                    hidden_states=states[request.request_id][:, None].unbind(), attention_mask=mask
                ).logits
            torch.testing.assert_close(torch.tensor([logits]), alone, atol=1e-5, rtol=1e-5)


def test_what_a_plan_keeps():
    assert (PLANS[False].layers, PLANS[False].width, PLANS[False].readers) == (LAYERS, 0, {})
    plan = PLANS[True]
    assert plan.layers == [4] and list(plan.whole) == ["last"]
    sizes = {"mha": 5 * 24, "other": 5 * 24, "content": 5 * 24, "gate": 2 * (2 + 2), "multimax": 5 * 6}
    assert {name: columns.stop - columns.start for name, columns in plan.columns.items()} == sizes
    assert plan.width == sum(sizes.values())
    # Of itself a plan keeps what is less: of three `mha` heads the states, of one its features.
    assert CachePlan(HEADS).layers == LAYERS
    assert CachePlan({name: HEADS[name] for name in ("mha", "last")}).layers == [4]
    assert CachePlan({"gate": HEADS["gate"]}).layers == []


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("kernel_block_size", [BLOCK, BLOCK // 2])
@pytest.mark.parametrize("tokens", [4096, 64, 4])
@pytest.mark.parametrize("seed", range(3))
def test_together_as_alone(monkeypatch, projected, kernel_block_size, tokens, seed):
    torch.manual_seed(seed)
    monkeypatch.setattr(scoring, "_TOKENS", tokens)
    served = Served(projected, 100, kernel_block_size)
    lengths = [*torch.randint(2, 40, (12,)).tolist(), 2, 16, 16]  # of two tokens the content head reads none
    every = list(HEADS)
    heads = [every if number % 3 else every[: number % len(every) + 1] for number in range(len(lengths))]
    requests, states = served.fill(lengths, heads)
    check(requests, states, served.scorer.score(requests).read())


@pytest.mark.parametrize("budget", [0, 2 * 2 * 4 * 3 * HIDDEN, 1 << 20])
def test_features_do_not_depend_on_the_groups_of_layers(monkeypatch, budget):
    states = dict(enumerate(torch.randn(len(LAYERS), 3, HIDDEN)))
    expected = Projector(HEADS, PLANS[True]).project(states)
    monkeypatch.setattr(cache_plan, "state_budget", lambda device: budget)
    torch.testing.assert_close(Projector(HEADS, PLANS[True]).project(states), expected)


def test_nothing_to_score():
    scorer = Served(True, 2).scorer
    assert scorer.score([]).read() == {}
    assert scorer.score([ScoringRequest("a", [1, 2], 2, [1], [])]).read() == {"a": {}}


@pytest.mark.parametrize("projected", [False, True])
def test_what_is_no_number_stays_with_its_prompt(projected):
    served = Served(projected, 20)
    requests, states = served.fill([10, 9], [["mha", "last"]] * 2)
    for cache in served.caches.values():
        cache.kv_cache[requests[0].block_ids[0]] = torch.nan
    found = served.scorer.score(requests).read()
    assert not any(map(math.isfinite, found["request-0"]["mha"]))
    check(requests[1:], states, {"request-1": found["request-1"]})


def test_prompts_of_about_one_length_go_together_and_within_the_limit(monkeypatch):
    served = Served(False, 100)

    def read(requests):
        served.reads.clear()
        served.scorer.score(requests)
        return [(states, len(blocks), len(blocks[0])) for states, _, blocks in served.reads]

    requests, _ = served.fill([16, 14, 3, 16, 2, 11], [["mha"]] * 6)
    assert read(requests) == [(5, 4, 2), (5, 2, 1)], "all layers at once"
    monkeypatch.setattr(scoring, "_TOKENS", 32)
    assert read(requests) == [(1, 2, 2)] * 10 + [(2, 2, 1), (2, 2, 1), (1, 2, 1)]
    requests, _ = served.fill([2] * 30, [["mha"]] * 30)  # of which whole blocks are read
    assert max(states * rows * blocks * BLOCK for states, rows, blocks in read(requests)) <= 32


@pytest.mark.parametrize("projected", [False, True])
def test_a_worker_waits_for_nothing_but_the_copy_of_its_results(projected):
    """Results are copied once a step, and no value is looked at before."""
    counts = []
    for lengths in ([16], [16, 15, 14, 13]):
        served = Served(projected, 20)
        requests, states = served.fill(lengths, [list(HEADS)] * len(lengths))
        with Accelerator() as device:
            plan = copy.deepcopy(served.plan)
            for cache in served.caches.values():
                cache.plan, cache.kv_cache = plan, cache.kv_cache.to(DEVICE)
            scorer = Scorer(served.caches, BLOCK, runs=True)
            before = device.operations
            found = scorer.score(requests)
            counts.append((device.reads - len(served.reads), device.operations - before))  # `Reads` looks itself
        check(requests, states, found.read())
    (reads, operations), (more_reads, more_operations) = counts
    assert reads == more_reads == 1
    assert more_operations - operations < 12 * len(HEADS), "masks and padding, which one prompt alone does not need"


def test_results_can_be_sent_before_they_are_read():
    served = Served(True, 20)
    requests, states = served.fill([10, 9], [["mha", "gate"], ["gate"]])
    check(requests, states, pickle.loads(pickle.dumps(served.scorer.score(requests))).read())


@pytest.mark.parametrize("projected", [False, True])
def test_other_ranks_read_along_and_run_nothing(projected):
    """With tensor parallelism the numbers of all ranks are gathered: all must read the same ones in the same order."""
    served, other = Served(projected, 60), Served(projected, 60, runs=False)
    requests, _ = served.fill([20, 3, 12, 2], [["gate"], ["mha", "last"], ["mha", "last"], ["content"]])
    said = [each.scorer.score(requests).read() for each in (served, other)]
    assert served.reads == other.reads and served.reads
    assert {width for _, width, _ in served.reads} == ({HIDDEN, PLANS[True].width} if projected else {HIDDEN})
    assert all(logits for found in said[0].values() for logits in found.values())
    assert said[1] == {f"request-{number}": {} for number in range(3)} | {"request-3": said[0]["request-3"]}
