"""Heads on cached states say of every prompt what they say of its states alone, whatever else is scored and lies around."""

import copy
import functools
import math
import pickle

import pytest
import torch
from accelerator import DEVICE, Accelerator
from cached_prompts import BLOCK, HIDDEN, LAYERS, Served
from conftest import make_probe

from llama_probe.vllm import cache_plan, scoring
from llama_probe.vllm.cache_plan import CachePlan, Projector
from llama_probe.vllm.scoring import Scorer, ScoringRequest
from llama_probe.vllm.step_scores import StepScores


HEADS = {
    "mha": make_probe(0),
    "other": make_probe(1),
    "content": make_probe(2, token_scope="content", prefix_ids=[5, 6]),
    "gate": make_probe(3, probe_type="gate", layers=[1, 3]),
    "multimax": make_probe(4, probe_type="multimax", options={"num_maxima": 2, "num_members": 3}),
    "last": make_probe(5, probe_type="last"),
}
PLANS = {False: CachePlan(HEADS, projected=False), True: CachePlan(HEADS, projected=True)}


make_served = functools.partial(Served, HEADS)


def score(scorer: Scorer, requests: list[ScoringRequest]) -> StepScores:
    return StepScores(*scorer.score(requests))


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
    served = make_served(projected, 100, kernel_block_size)
    lengths = [*torch.randint(2, 40, (12,)).tolist(), 2, 16, 16]  # of two tokens the content head reads none
    every = list(HEADS)
    heads = [every if number % 3 else every[: number % len(every) + 1] for number in range(len(lengths))]
    requests, states = served.fill(lengths, heads)
    check(requests, states, score(served.scorer, requests).read_prompts())


@pytest.mark.parametrize("budget", [0, 2 * 2 * 4 * 3 * HIDDEN, 1 << 20])
def test_features_do_not_depend_on_the_groups_of_layers(monkeypatch, budget):
    states = dict(enumerate(torch.randn(len(LAYERS), 3, HIDDEN)))
    expected = Projector(HEADS, PLANS[True]).project(states)
    monkeypatch.setattr(cache_plan, "state_budget", lambda device: budget)
    torch.testing.assert_close(Projector(HEADS, PLANS[True]).project(states), expected)


def test_nothing_to_score():
    scorer = make_served(True, 2).scorer
    assert score(scorer, []).read_prompts() == {}
    assert score(scorer, [ScoringRequest("a", [1, 2], 2, 2, [1], [])]).read_prompts() == {"a": {}}


@pytest.mark.parametrize("projected", [False, True])
def test_what_is_no_number_stays_with_its_prompt(projected):
    served = make_served(projected, 20)
    requests, states = served.fill([10, 9], [["mha", "last"]] * 2)
    for cache in served.caches.values():
        cache.kv_cache[requests[0].block_ids[0]] = torch.nan
    found = score(served.scorer, requests).read_prompts()
    assert not any(map(math.isfinite, found["request-0"]["mha"]))
    check(requests[1:], states, {"request-1": found["request-1"]})


def test_prompts_of_about_one_length_go_together_and_within_the_limit(monkeypatch):
    served = make_served(False, 100)

    def read(requests):
        served.reads.clear()
        served.scorer.score(requests)
        return list(served.reads)

    requests, _ = served.fill([16, 14, 3, 16, 2, 11], [["mha"]] * 6)
    assert read(requests) == [(5, 4, 2), (5, 2, 1)], "all layers at once"
    monkeypatch.setattr(scoring, "_TOKENS", 5 * 32)
    assert read(requests) == [(5, 2, 2)] * 2 + [(5, 2, 1)]
    requests, _ = served.fill([2] * 30, [["mha"]] * 30)  # of which whole blocks are read
    assert max(states * rows * blocks * BLOCK for states, rows, blocks in read(requests)) <= 5 * 32
    requests, _ = served.fill([90], [["mha"]])
    assert read(requests) == [(5, 1, 4)] * 3, "a long one in pieces"


@pytest.mark.parametrize("projected", [False, True])
def test_a_worker_waits_for_nothing_but_the_copy_of_its_results(projected):
    """Results are copied once a step, and no value is looked at before."""
    counts = []
    for lengths in ([16], [16, 15, 14, 13]):
        served = make_served(projected, 20)
        requests, states = served.fill(lengths, [list(HEADS)] * len(lengths))
        with Accelerator() as device:
            plan = copy.deepcopy(served.plan)
            for cache in served.caches.values():
                cache.plan, cache.kv_cache = plan, cache.kv_cache.to(DEVICE)
            scorer = Scorer(served.caches, BLOCK)
            before = device.operations
            found = score(scorer, requests)
            counts.append((device.reads, device.operations - before))
        check(requests, states, found.read_prompts())
    (reads, operations), (more_reads, more_operations) = counts
    assert reads == more_reads == 1
    assert more_operations - operations < 12 * len(HEADS), "masks and padding, which one prompt alone does not need"


def test_results_can_be_sent_before_they_are_read():
    served = make_served(True, 20)
    requests, states = served.fill([10, 9], [["mha", "gate"], ["gate"]])
    check(requests, states, pickle.loads(pickle.dumps(score(served.scorer, requests))).read_prompts())


@pytest.mark.parametrize("projected", [False, True])
def test_prompts_without_a_tool_result_are_not_flagged(projected):
    markers = {role: {"ids": [ids], "skip": 0} for role, ids in (("user", 5), ("assistant", 6), ("tool", 20))}
    head = make_probe(6, probe_type="gate", token_scope="tool", turn_markers=markers, flagged=["LABEL_1"])
    served = Served({"tools": head}, projected, 40)
    requests, states = served.fill([30, 30, 12], [["tools"]] * 3)
    requests[0].token_ids[3] = 20
    found = score(served.scorer, requests).read_prompts()
    mask = (torch.arange(30) > 3)[None]
    with torch.no_grad():
        alone = head(hidden_states=states["request-0"][:, None].unbind(), attention_mask=mask).logits
    torch.testing.assert_close(torch.tensor([found["request-0"]["tools"]]), alone, atol=1e-5, rtol=1e-5)
    for name in ("request-1", "request-2"):
        assert torch.tensor(found[name]["tools"]).softmax(0)[1] == 0
