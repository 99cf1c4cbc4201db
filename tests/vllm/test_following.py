"""Heads that follow replies on cached states say after each token what they say of all states so far."""

import copy

import pytest
import torch
from accelerator import DEVICE, Accelerator
from cached_prompts import BLOCK, Served
from conftest import make_probe

from llama_probe.vllm.cache_plan import grows
from llama_probe.vllm.scoring import ReplyTokens, Scorer


KINDS = {
    "gate": {"probe_type": "gate", "layers": [1, 3]},
    "multimax": {"probe_type": "multimax", "options": {"num_maxima": 2, "num_members": 3}, "num_labels": 3},
    "attentive": {"probe_type": "attentive"},
    "last": {"probe_type": "last"},
    "mean": {"probe_type": "pooling", "layers": [0, 2, 4]},
    "max": {"probe_type": "pooling", "pool": "max"},
}
HEADS = {
    f"{name}-{scope}": make_probe(seed, token_scope=scope, prefix_ids=[5, 6] if scope == "all" else [], **config)
    for seed, (name, config) in enumerate(KINDS.items())
    for scope in ("response", "all")
}
SMALL = {name: head for name, head in HEADS.items() if name.split("-")[0] in ("gate", "multimax", "attentive")}
# What a server keeps of tokens: states alone, features and states, features alone.
KEPT = {"states": (HEADS, False), "both": (HEADS, True), "features": (SMALL, True)}


def reply_tokens(requests, at: list[int | None]) -> ReplyTokens:
    """Tokens at these places of each request's text."""
    tokens = ReplyTokens()
    for request, place in zip(requests, at, strict=True):
        if place is not None:
            block = request.block_ids[place // BLOCK]
            tokens.add(request.request_id, block * BLOCK + place % BLOCK, request.slot)
    return tokens


def expected(name: str, states: torch.Tensor, prompt: int, tokens: int) -> torch.Tensor:
    mask = torch.ones(1, tokens)
    mask[:, : prompt if HEADS[name].config.token_scope == "response" else 2] = 0
    with torch.no_grad():
        return HEADS[name](hidden_states=states[:, None, :tokens].unbind(), attention_mask=mask).logits[0]


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("kernel_block_size", [BLOCK, BLOCK // 2])
@pytest.mark.parametrize("seed", range(2))
def test_each_token_as_alone(kept, kernel_block_size, seed):
    """Replies begin, run side by side, lose their slots and begin again in others."""
    torch.manual_seed(seed)
    heads, projected = KEPT[kept]
    served = Served(heads, projected, 60, kernel_block_size, slots=6)
    lengths = torch.randint(12, 50, (6,)).tolist()
    whole, states = served.fill(lengths, [[]] * 6)
    prompts = [int(torch.randint(4, length - 6, ())) for length in lengths]
    done = list(prompts)  # tokens that were read
    slots = torch.randperm(6).tolist()

    def begin(number: int) -> None:
        request = whole[number]
        request.num_prompt_tokens = prompts[number]
        request.token_ids = request.token_ids[: prompts[number]]
        request.slot, request.num_tokens = slots[number], done[number]
        request.heads = [name for name in heads if name.endswith("all")] if done[number] == prompts[number] else None
        request.masks = {}

    for number in range(6):
        begin(number)
    places, parts = served.scorer.score(whole)
    for number, request in enumerate(whole):
        for name, (part, row) in places[request.request_id].items():
            alone = expected(name, states[request.request_id], prompts[number], prompts[number])
            torch.testing.assert_close(parts[part][row], alone, atol=1e-5, rtol=1e-5)
    for step in range(80):
        if step in (4, 9, 14, 19):  # two were thrown out, and are back in each other's slots
            first, second = torch.randperm(6).tolist()[:2]
            slots[first], slots[second] = slots[second], slots[first]
            begin(first)
            begin(second)
            again, _ = served.scorer.score([whole[first], whole[second]])
            assert set(again) == {r.request_id for r in (whole[first], whole[second]) if r.heads is not None}
        at = [
            done[number] if done[number] < lengths[number] and (step > 20 or torch.rand(()) < 0.8) else None
            for number in range(6)
        ]
        tokens = reply_tokens(whole, at)
        if not tokens.request_ids:
            continue
        logits = dict(zip(served.scorer.followers, served.scorer.follow(tokens), strict=True))
        rows = [number for number, place in enumerate(at) if place is not None]
        for row, number in enumerate(rows):
            done[number] += 1
            for name in heads:
                alone = expected(name, states[whole[number].request_id], prompts[number], done[number])
                torch.testing.assert_close(logits[name][row], alone, atol=1e-5, rtol=1e-5)
    assert done == lengths


@pytest.mark.parametrize("kept", KEPT)
def test_a_token_costs_as_many_operations_in_any_batch_and_no_wait(kept):
    heads, projected = KEPT[kept]
    counts = []
    for replies in (1, 2, 64):
        served = Served(heads, projected, 140, slots=64)
        requests, _ = served.fill([12] * replies, [[]] * replies)
        with Accelerator() as device:
            plan = copy.deepcopy(served.plan)
            plan.follow_replies(64, torch.device(DEVICE))
            for cache in served.caches.values():
                cache.plan, cache.kv_cache = plan, cache.kv_cache.to(DEVICE)
            scorer = Scorer(served.caches, BLOCK)
            for slot, request in enumerate(requests):
                request.slot = slot
            before = device.operations, device.reads
            scorer.follow(reply_tokens(requests, [11] * replies))
            counts.append((device.operations - before[0], device.reads - before[1]))
    (alone, waits), *others = counts
    assert others[0] == others[1] and waits == others[0][1] == 0
    assert alone <= others[0][0] < 40 * len(heads), "alone some tensors need no copy"


def test_kinds_whose_state_grows_are_known():
    assert not any(grows(head) for head in HEADS.values())
    assert grows(make_probe(token_scope="response")), "mha keeps keys and values"
