"""Engines whose heads follow replies, beside one that reads prompts: scores of each token are those of transformers."""

import gc
import math
import random

import pytest
import torch
from conftest import make_lm
from tiny_engine import HEADS, PROMPTS, REPLY_HEADS, SIZES, TinyServing, generate, make_serving, running
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from llama_probe import ProbeError
from llama_probe.vllm import engine_kwargs
from llama_probe.vllm.step_scores import StepScores


NEW = 50
ASKED = {"extra_args": {"kv_transfer_params": {"token_scores": True}}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinyServing:
    heads = {**REPLY_HEADS, "tone": HEADS["tone"]}
    return make_serving(tmp_path_factory.mktemp("replies"), make_lm(**SIZES), heads)


@pytest.fixture(scope="module")
def replies(tiny) -> dict[int, tuple[list[int], dict[str, torch.Tensor]]]:
    """By the number of a prompt the reply of transformers, and what heads say of each of its tokens."""
    found = {}
    for number, ids in enumerate(PROMPTS):
        output = tiny.reference(ids, NEW + 1)
        logits = {name: output.probe_token_logits[name][0] for name in REPLY_HEADS}
        found[number] = output.sequences[0, len(ids) : len(ids) + NEW].tolist(), logits
    return found


@pytest.fixture(scope="module")
def threshold(replies) -> float:
    """At which `watch` halts some replies early, some late and some never; far from all probabilities."""
    scores = torch.cat([logits["watch"].softmax(dim=-1)[:, 1] for _, logits in replies.values()]).sort().values
    highest = (
        torch.stack([logits["watch"].softmax(dim=-1)[:, 1].max() for _, logits in replies.values()]).sort().values
    )
    low = int((scores < highest[len(highest) // 3]).sum())
    gaps = scores[low + 1 : low + 60] - scores[low : low + 59]
    place = low + int(gaps.argmax())
    return float(scores[place] + scores[place + 1]) / 2


def halted_at(logits: torch.Tensor, threshold: float) -> int | None:
    flagged = (logits.softmax(dim=-1)[:, 1] >= threshold).nonzero()
    return int(flagged[0]) if len(flagged) else None


def check(llm, tiny, replies, threshold, **options) -> list[int | None]:
    """Asks all prompts at once. Returns where their replies were halted."""
    outputs, halts = generate(llm, PROMPTS, NEW, **ASKED, **options), []
    for number, output in enumerate(outputs):
        reply, logits = replies[number]
        (choice,), known = output.outputs, output.kv_transfer_params
        halt = halted_at(logits["watch"], threshold)
        assert list(choice.token_ids) == reply[:halt]
        assert (choice.finish_reason, choice.stop_reason) == (("length", None) if halt is None else ("stop", "watch"))
        (said,) = known["replies"]
        scored = NEW if halt is None else halt + 1
        assert list(said["probes"]) == list(REPLY_HEADS)
        for name, expected in logits.items():
            rows = torch.tensor(said["probes"][name]["token_logits"])
            assert len(rows) == said["probes"][name]["tokens"] == scored
            torch.testing.assert_close(rows, expected[:scored], rtol=1e-5, atol=1e-5)
        assert (said["halted"] and said["halted"]["token"]) == halt and said["halted"] == known["halted"]
        assert list(known["probes"]) == ["theme", "end", "tone"]
        halts.append(halt)
    return halts


def test_bfloat16(tiny):
    """Texts differ from those in fp32: scores are compared with those of the text that was written, in fp32.

    It comes before the engine of the other tests, beside which a process can have no second one.
    """
    with running(tiny, 1.0, guard="watch", dtype="bfloat16") as engine:
        for ids, output in zip(PROMPTS, generate(engine, PROMPTS, NEW, **ASKED), strict=True):
            tiny.check_tokens(
                ids, list(output.outputs[0].token_ids), output.kv_transfer_params["replies"][0], atol=0.6
            )


@pytest.fixture(scope="module")
def llm(tiny, threshold):
    cache = {"block_size": 128, "num_gpu_blocks_override": 4, "disable_log_stats": False}
    with running(tiny, threshold, guard="watch", **cache) as engine:
        yield engine


def clean(llm) -> bool:
    probes = llm.llm_engine.engine_core.engine_core.scheduler.probes
    return (
        not (probes._answers or probes.replies._replies or probes.replies._siblings) and len(probes.replies._free) == 8
    )


def test_scores_and_cuts_are_those_of_transformers(llm, tiny, replies, threshold):
    """In chunks, from a cache too small for all, and again with the prompts in it."""
    counts = []
    for _ in range(2):
        halts = check(llm, tiny, replies, threshold)
        counts.append(sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"))
    assert None in halts and any(halts) and counts[0] > 0
    assert clean(llm)


def test_several_replies_that_are_sampled(llm, tiny):
    ids = PROMPTS[4]
    params = SamplingParams(n=3, temperature=1.0, max_tokens=12, ignore_eos=True, logprobs=2, **ASKED)
    (output,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
    assert len(output.kv_transfer_params["replies"]) == 3
    for choice, said in zip(output.outputs, output.kv_transfer_params["replies"], strict=True):
        reply, halted = list(choice.token_ids), said["halted"]
        assert len(choice.logprobs) == len(reply)
        assert all(token in row for token, row in zip(reply, choice.logprobs, strict=True))
        if halted is None:
            tiny.check_tokens(ids, reply, said)
        else:
            assert len(reply) == halted["token"] and choice.stop_reason == "watch"
    assert clean(llm)


def test_a_stop_string_ends_a_reply_that_is_scored(llm, tiny, replies, threshold):
    number = next(number for number, (_, logits) in replies.items() if halted_at(logits["watch"], threshold) is None)
    (whole,) = generate(llm, PROMPTS[number : number + 1], NEW)
    text = whole.outputs[0].text
    stop = text[6:9]
    (output,) = generate(llm, PROMPTS[number : number + 1], NEW, stop=[stop], **ASKED)
    assert output.outputs[0].text == text[: text.index(stop)] and output.outputs[0].stop_reason == stop
    (said,) = output.kv_transfer_params["replies"]
    tiny.check_tokens(PROMPTS[number], replies[number][0], said, said["probes"]["watch"]["tokens"])
    assert len(output.outputs[0].token_ids) <= said["probes"]["watch"]["tokens"]
    assert clean(llm)


def test_requests_that_are_aborted_leave_nothing(llm):
    params = SamplingParams(max_tokens=100, ignore_eos=True, temperature=0)
    for number, ids in enumerate(PROMPTS):
        llm.llm_engine.add_request(f"gone-{number}", {"prompt_token_ids": ids}, params)
    for number in range(len(PROMPTS)):
        llm.llm_engine.step()
        llm.llm_engine.abort_request([f"gone-{number}"])
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    assert clean(llm)


def test_a_crowd_that_comes_and_goes(llm, replies, threshold, monkeypatch):
    """500 requests, 64 at once: some are aborted at any time, and some get scores that are not numbers."""
    chance, engine, read, most = random.Random(0), llm.llm_engine, StepScores.read_replies, 5
    halts = {number: halted_at(logits["watch"], threshold) for number, (_, logits) in replies.items()}
    shown = {number: most if halt is None else min(halt, most) for number, halt in halts.items()}
    # A stop string, which nobody writes, has every output say how many tokens were scored.
    options = {"max_tokens": most, "temperature": 0, "ignore_eos": True, "stop": ["\0"]}
    params = SamplingParams(output_kind=RequestOutputKind.DELTA, **options)
    running, broken, ends, sizes = {}, set(), [], []

    def read_replies(step, heads):
        logits = read(step, heads).copy()
        for row, request_id in enumerate(step.replies):
            if chance.random() < 0.02:
                logits[row] = math.nan
                broken.add(request_id.partition("-")[0])
        return logits

    monkeypatch.setattr(StepScores, "read_replies", read_replies)
    for waiting in (range(250), range(250, 500)):
        waiting = [*waiting]
        while waiting or running:
            while waiting and len(running) < 64:
                name = str(waiting.pop())
                running[name] = []
                engine.add_request(name, {"prompt_token_ids": PROMPTS[int(name) % 6]}, params)
            for output in engine.step():
                name, (choice,), (said,) = output.request_id, output.outputs, output.kv_transfer_params["replies"]
                tokens, number = running[name], int(name) % 6
                tokens += choice.token_ids
                assert tokens == replies[number][0][: len(tokens)]
                assert len(tokens) <= min(said["probes"]["watch"]["tokens"], shown[number])
                if output.finished:
                    assert choice.stop_reason == "watch" or (len(tokens) == most and name not in broken)
                    ends.append(choice.stop_reason)
                    del running[name]
            if running and chance.random() < 0.2:
                name = chance.choice([*running])
                engine.abort_request([name])
                del running[name]
        assert clean(llm)
        gc.collect()
        sizes.append(len(gc.get_objects()))
    assert 300 < len(ends) < 480 and {*ends} == {"watch", None} and len(broken) > 5
    assert sizes[1] - sizes[0] < 250, "less than an object a request"


def test_a_request_chooses_heads_but_not_to_go_unguarded(llm):
    (output,) = generate(llm, PROMPTS[3:4], 4, extra_args={"kv_transfer_params": {"probes": ["tone"]}})
    assert list(output.kv_transfer_params["probes"]) == ["tone"]
    assert list(output.kv_transfer_params["replies"][0]["probes"]) == ["watch"]


def test_a_reply_that_is_sent_along_is_scored_as_a_whole(llm, tiny, replies):
    """Only if nothing is written: elsewhere it would hide a prompt's end from its guard."""
    for number in (2, 5, 8):
        ids, reply = PROMPTS[number], replies[number][0]
        asked = {"kv_transfer_params": {"reply": False, "reply_start": len(ids)}}
        (output,) = generate(llm, [[*ids, *reply]], extra_args=asked)
        for name in REPLY_HEADS:
            expected = tiny.token_logits(ids, reply, name)[-1]
            logits = torch.tensor(output.kv_transfer_params["probes"][name]["logits"])
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        alone, whole = (generate(llm, [text])[0].kv_transfer_params["probes"] for text in (ids, [*ids, *reply]))
        assert output.kv_transfer_params["probes"]["tone"]["logits"] == pytest.approx(
            alone["tone"]["logits"], abs=1e-5
        )
        (output,) = generate(llm, [[*ids, *reply]], extra_args={"kv_transfer_params": {"reply_start": len(ids)}})
        assert output.kv_transfer_params["probes"] == whole
    assert clean(llm)


def test_speculation_and_kinds_that_grow_are_refused(tiny, tmp_path):
    with pytest.raises(ProbeError, match="speculative_config"):
        engine_kwargs(tiny.backbone, tiny.heads, speculative_config={"method": "ngram", "num_speculative_tokens": 2})
