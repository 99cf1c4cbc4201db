"""Heads on cached states say of every prompt and token what they say of its states alone, whatever lies around."""

import copy
import math
import pickle

import pytest
import torch
from accelerator import DEVICE, Accelerator
from conftest import make_probe, score_turns
from torch import nn

from llama_probe.heads.turns import turn_mask
from llama_probe.vllm import cache_plan, scoring
from llama_probe.vllm.cache_plan import CachePlan
from llama_probe.vllm.paged_states import PagedStates
from llama_probe.vllm.scoring import ReplyTokens, Scorer, ScoringRequest
from llama_probe.vllm.step_scores import StepScores


LAYERS, HIDDEN, BLOCK = list(range(5)), 32, 8
MAXIMA = {"probe_type": "multimax", "options": {"num_maxima": 2, "num_members": 3}}
HEADS = {
    "mha": make_probe(0),
    "other": make_probe(1),
    "content": make_probe(2, token_scope="content", prefix_ids=[5, 6]),
    "gate": make_probe(3, probe_type="gate", layers=[1, 3]),
    "multimax": make_probe(4, **MAXIMA),
    "last": make_probe(5, probe_type="last"),
}
FOLLOWERS = {
    "gate": {"probe_type": "gate", "layers": [1, 3]},
    "multimax": {**MAXIMA, "num_labels": 3},
    "last": {"probe_type": "last"},
    "mean": {"probe_type": "pooling", "layers": [0, 2, 4]},
    "max": {"probe_type": "pooling", "pool": "max"},
}
REPLY_HEADS = {
    f"{name}-{scope}": make_probe(seed, token_scope=scope, prefix_ids=[5, 6] if scope == "all" else [], **config)
    for seed, (name, config) in enumerate(FOLLOWERS.items())
    for scope in ("response", "all")
}
SMALL = {name: head for name, head in REPLY_HEADS.items() if name.split("-")[0] in ("gate", "multimax")}
# What a server keeps of tokens: states alone, features and states, features alone.
KEPT = {"states": (REPLY_HEADS, False), "both": (REPLY_HEADS, True), "features": (SMALL, True)}


class Reads(PagedStates):
    """Notes in a list what is read: states, prompts, blocks of each. What is not written is not a number."""

    def __init__(self, plan: CachePlan, blocks: int, kernel_block_size: int):
        nn.Module.__init__(self)
        self.ranks, self.head_size, self.plan, self.reads = 1, plan.width, plan, []
        self.kv_cache = torch.full((blocks, 1, kernel_block_size, plan.width), torch.nan)

    def read(self, block_ids):
        self.reads.append((self.plan.depth, *block_ids.shape))
        return super().read(block_ids)


class Served:
    """A cache of a plan, and a scorer of what it holds."""

    def __init__(self, heads, projected: bool, blocks: int, kernel_block_size: int = BLOCK, slots=0):
        self.slots = slots
        self.plan = CachePlan({name: copy.deepcopy(head) for name, head in heads.items()}, projected)
        self.plan.move(torch.device("cpu"), torch.float32, slots)
        self.cache = Reads(self.plan, blocks, kernel_block_size)
        self.scorer = Scorer(self.cache, BLOCK)

    def fill(self, lengths: list[int], heads: list[list[str]]):
        """Random prompts in random blocks: requests, and by request the states `[layers, tokens, hidden_size]`."""
        size, blocks = self.scorer.kernel_block_size, len(self.cache.kv_cache)
        free = torch.randperm(blocks * size // BLOCK).tolist()
        requests, states = [], {}
        for number, (length, names) in enumerate(zip(lengths, heads, strict=True)):
            block_ids = [free.pop() for _ in range(-(-length // BLOCK))]
            ids = [5, 6, *torch.randint(7, 20, (length,)).tolist()][:length]
            requests.append(ScoringRequest(f"request-{number}", ids, length, length, block_ids, names))
            states[f"request-{number}"] = written = torch.randn(len(LAYERS), length, HIDDEN)
            kept = whole(self.plan, written)
            for token in range(length):
                slot = block_ids[token // BLOCK] * BLOCK + token % BLOCK
                self.cache.kv_cache[slot // size, 0, slot % size] = kept[token]
        return requests, states

    def score(self, requests: list[ScoringRequest]) -> StepScores:
        return StepScores(self.scorer.score(requests))

    def move(self) -> Scorer:
        """A scorer on the simulated device."""
        plan = copy.deepcopy(self.plan)
        plan.move(torch.device(DEVICE), torch.float32, self.slots)
        self.cache.plan, self.cache.kv_cache = plan, self.cache.kv_cache.to(DEVICE)
        return Scorer(self.cache, BLOCK)


def whole(plan: CachePlan, states: torch.Tensor) -> torch.Tensor:
    """What a plan keeps of tokens with these states `[layers, tokens, hidden_size]`."""
    return torch.cat([numbers for _, numbers in plan.pieces(dict(enumerate(states)))])


def alone(head, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return head(hidden_states=states[:, None].unbind(), attention_mask=mask[None]).logits[0]


def close(logits, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(logits), expected, atol=1e-5, rtol=1e-5)


def check(requests, states, found) -> None:
    assert list(found) == [request.request_id for request in requests]
    for request in requests:
        assert list(found[request.request_id]) == request.heads
        for name, logits in found[request.request_id].items():
            mask = torch.ones(request.num_tokens)
            mask[: 2 * (name == "content")] = 0
            if mask.any():
                close(logits, alone(HEADS[name], states[request.request_id], mask))
            else:
                assert isinstance(logits, str), "why there are none"


def test_plan_keeps_what_is_less():
    assert CachePlan(HEADS).layers == LAYERS, "of three mha heads the states"
    plan = CachePlan(HEADS, projected=True)
    sizes = {"mha": 5 * 24, "other": 5 * 24, "content": 5 * 24, "gate": 2 * (2 + 2), "multimax": 5 * 6}
    sizes["last"] = HIDDEN
    assert plan.layers == [4] and plan.width == sum(sizes.values())
    assert {name: columns.stop - columns.start for name, columns in plan.columns.items()} == sizes
    assert CachePlan({name: HEADS[name] for name in ("mha", "last")}).layers == [4]
    assert CachePlan({"gate": HEADS["gate"]}).layers == []


@pytest.mark.parametrize("budget", [0, 3 * 5 * HIDDEN * 4 * 2, 1 << 20])
def test_features_do_not_depend_on_the_pieces_that_are_projected(monkeypatch, budget):
    states, plan = torch.randn(len(LAYERS), 3, HIDDEN), CachePlan(HEADS, projected=True)
    expected = whole(plan, states)
    monkeypatch.setattr(cache_plan, "state_budget", lambda device: budget)
    torch.testing.assert_close(whole(plan, states), expected)


@pytest.mark.parametrize("projected", [False, True])
class TestPrompts:
    @pytest.mark.parametrize("kernel_block_size", [BLOCK, BLOCK // 2])
    @pytest.mark.parametrize("tokens", [4096, 64, 4])
    def test_together_as_alone(self, monkeypatch, projected, kernel_block_size, tokens):
        """Also after the way to another process."""
        torch.manual_seed(tokens)
        monkeypatch.setattr(scoring, "_TOKENS", tokens)
        served = Served(HEADS, projected, 100, kernel_block_size)
        lengths = [*torch.randint(2, 40, (12,)).tolist(), 2, 16, 16]  # of two tokens the content head reads none
        every = list(HEADS)
        heads = [every if number % 3 else every[: number % len(every)] for number in range(len(lengths))]
        requests, states = served.fill(lengths, heads)
        check(requests, states, pickle.loads(pickle.dumps(served.score(requests))).read_prompts())
        assert served.score([]).read_prompts() == {}

    def test_what_is_not_a_number_stays_with_its_prompt(self, projected):
        served = Served(HEADS, projected, 20)
        requests, states = served.fill([10, 9], [["mha", "last"]] * 2)
        served.cache.kv_cache[requests[0].block_ids[0]] = torch.nan
        found = served.score(requests).read_prompts()
        assert not any(map(math.isfinite, found.pop("request-0")["mha"]))
        check(requests[1:], states, found)

    def test_worker_waits_for_nothing_but_the_copy_of_its_results(self, projected):
        counts = []
        for lengths in ([16], [16, 15, 14, 13]):
            served = Served(HEADS, projected, 20)
            requests, states = served.fill(lengths, [list(HEADS)] * len(lengths))
            with Accelerator() as device:
                served.scorer, before = served.move(), device.operations
                found = served.score(requests)
                counts.append((device.reads, device.operations - before))
            check(requests, states, found.read_prompts())
        (reads, operations), (more_reads, more_operations) = counts
        assert reads == more_reads == 1
        assert more_operations - operations < 12 * len(HEADS), "masks and padding, which one alone does not need"

    @pytest.mark.parametrize("tokens", [4096, 64])
    @pytest.mark.parametrize("head_type", ["multimax", "mha"])
    def test_turns_are_judged_one_by_one(self, monkeypatch, projected, tokens, head_type):
        torch.manual_seed(0)
        monkeypatch.setattr(scoring, "_TOKENS", tokens)
        markers = {role: {"ids": [ids], "skip": 0} for role, ids in (("user", 5), ("assistant", 8))}
        head = make_probe(7, probe_type=head_type, token_scope="user", turn_markers=markers)
        served = Served({"guard": head}, projected, 60)
        requests, states = served.fill([30, 24, 60, 9], [["guard"]] * 4)
        for request in requests:
            request.token_ids[0], request.token_ids[-9], request.token_ids[-5] = 5, 8, 5
        requests[2].token_ids[20], requests[2].token_ids[28] = 8, 5
        with Accelerator() as device:
            served.scorer = served.move()
            found = served.score(requests)
        assert device.reads == 1
        for request in requests:
            mask = turn_mask("user", markers, torch.tensor([request.token_ids]))
            expected = score_turns(head, states[request.request_id][:, None].unbind(), mask)
            close(found.read_prompts()[request.request_id]["guard"], expected[0])

    @pytest.mark.parametrize("tokens", [4096, 64])
    @pytest.mark.parametrize("head_type", ["multimax", "mha"])
    def test_the_strongest_window_counts_and_says_where_it_is(self, monkeypatch, projected, tokens, head_type):
        torch.manual_seed(0)
        monkeypatch.setattr(scoring, "_TOKENS", tokens)
        head = make_probe(7, probe_type=head_type, window=8)
        served = Served({"guard": head}, projected, 60)
        requests, states = served.fill([60, 45, 9, 5], [["guard"]] * 4)
        with Accelerator() as device:
            served.scorer = served.move()
            found = served.score(requests)
        assert device.reads == 1
        for request in requests:
            written = states[request.request_id]
            with torch.no_grad():
                segments = torch.ones(1, len(written[0]), dtype=torch.long)
                expected = head(hidden_states=written[:, None].unbind(), segments=segments)
            numbers = found.read_prompts()[request.request_id]["guard"]
            close(numbers[:2], expected.logits[0])
            assert numbers[2:] == expected.spans.flatten().tolist()

    def test_without_a_tool_result_nothing_is_flagged(self, projected):
        markers = {role: {"ids": [ids], "skip": 0} for role, ids in (("user", 5), ("assistant", 6), ("tool", 20))}
        head = make_probe(6, probe_type="gate", token_scope="tool", turn_markers=markers, flagged=["LABEL_1"])
        served = Served({"tools": head}, projected, 40)
        requests, states = served.fill([30, 30, 12], [["tools"]] * 3)
        requests[0].token_ids[3] = 20
        found = served.score(requests).read_prompts()
        close(found["request-0"]["tools"], alone(head, states["request-0"], torch.arange(30) > 3))
        for name in ("request-1", "request-2"):
            assert torch.tensor(found[name]["tools"]).softmax(0)[1] == 0


def test_prompts_of_about_one_length_go_together_and_within_the_limit(monkeypatch):
    served = Served(HEADS, False, 100)

    def read(lengths: list[int]) -> list[tuple[int, int, int]]:
        served.cache.reads.clear()
        served.score(served.fill(lengths, [["mha"]] * len(lengths))[0])
        return list(served.cache.reads)

    lengths = [16, 14, 3, 16, 2, 11]
    assert read(lengths) == [(5, 4, 2), (5, 2, 1)], "all layers at once"
    monkeypatch.setattr(scoring, "_TOKENS", 5 * 32)
    assert read(lengths) == [(5, 2, 2)] * 2 + [(5, 2, 1)]
    assert max(states * rows * blocks * BLOCK for states, rows, blocks in read([2] * 30)) <= 5 * 32, "whole blocks"
    assert read([90]) == [(5, 1, 4)] * 3, "a long one in pieces"


def reply_tokens(requests, places: list[int | None]) -> ReplyTokens:
    """Tokens at these places of each request's text."""
    tokens: ReplyTokens = {}
    for request, place in zip(requests, places, strict=True):
        if place is not None:
            block = request.block_ids[place // BLOCK]
            tokens[request.request_id] = block * BLOCK + place % BLOCK, request.slot
    return tokens


@pytest.mark.parametrize("kept", KEPT)
class TestReplies:
    @pytest.mark.parametrize("kernel_block_size", [BLOCK, BLOCK // 2])
    def test_each_token_as_alone(self, kept, kernel_block_size):
        """Replies begin, run side by side, lose their slots and begin again in others."""
        torch.manual_seed(kernel_block_size)
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
            is_new = done[number] == prompts[number]
            request.heads = [name for name in heads if name.endswith("all")] if is_new else None
            request.masks = {}

        def check_scores(number: int, name: str, logits: torch.Tensor) -> None:
            mask = torch.ones(done[number])
            mask[: prompts[number] if name.endswith("response") else 2] = 0
            close(logits, alone(REPLY_HEADS[name], states[f"request-{number}"][:, : done[number]], mask))

        for number in range(6):
            begin(number)
        for number, scores in enumerate(served.scorer.score(whole).values()):
            for name, logits in scores.items():
                check_scores(number, name, logits)
        for step in range(80):
            if step in (4, 9, 14, 19):  # two were thrown out, and are back in each other's slots
                first, second = torch.randperm(6).tolist()[:2]
                slots[first], slots[second] = slots[second], slots[first]
                begin(first)
                begin(second)
                again = served.scorer.score([whole[first], whole[second]])
                assert set(again) == {r.request_id for r in (whole[first], whole[second]) if r.heads is not None}
            runs = [done[i] < lengths[i] and (step > 20 or bool(torch.rand(()) < 0.8)) for i in range(6)]
            if not any(runs):
                continue
            tokens = reply_tokens(whole, [place if is_on else None for place, is_on in zip(done, runs, strict=True)])
            logits = served.scorer.follow(tokens).split([head.config.num_labels for head in heads.values()], dim=1)
            logits = dict(zip(served.scorer.followers, logits, strict=True))
            for row, number in enumerate(number for number in range(6) if runs[number]):
                done[number] += 1
                for name in heads:
                    check_scores(number, name, logits[name][row])
        assert done == lengths

    def test_token_costs_as_many_operations_in_any_batch_and_no_wait(self, kept):
        heads, projected = KEPT[kept]
        counts = []
        for replies in (1, 2, 64):
            served = Served(heads, projected, 140, slots=64)
            requests, _ = served.fill([12] * replies, [[]] * replies)
            with Accelerator() as device:
                scorer = served.move()
                for slot, request in enumerate(requests):
                    request.slot = slot
                before = device.operations, device.reads
                scorer.follow(reply_tokens(requests, [11] * replies))
                counts.append((device.operations - before[0], device.reads - before[1]))
        (alone, waits), *others = counts
        assert others[0] == others[1] and waits == others[0][1] == 0
        assert alone <= others[0][0] < 40 * len(heads), "alone some tensors need no copy"
