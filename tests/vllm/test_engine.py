"""One engine: prompts in chunks, many at once, a cache too small for all of them, and a guard."""

import pytest
from tiny_engine import (  # noqa: F401 - fixtures
    HIDDEN,
    PREFIX,
    PROMPTS,
    TinyServing,
    generate,
    make_ids,
    running,
    threshold,
    tiny,
)

from llama_probe.heads.aggregator import Aggregator
from llama_probe.heads.gate import GateAggregator
from llama_probe.heads.low_rank import LowRankAggregator
from llama_probe.vllm.state_cache import cache_growth


vllm = pytest.importorskip("vllm")

BLOCK, BLOCKS, NEW = 128, 5, 50


@pytest.fixture(scope="module", params=["features", "states"])
def kept(request) -> str:
    """What the engine keeps for heads: features of the states, or as for kinds that need it the states."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (GateAggregator, LowRankAggregator) if request.param == "states" else ():
            patch.setattr(kind, "projected", Aggregator.projected)
        yield request.param


@pytest.fixture(scope="module")
def llm(tiny: TinyServing, threshold: float, kept):  # noqa: F811
    with running(tiny, threshold, block_size=BLOCK, num_gpu_blocks_override=BLOCKS, disable_log_stats=False) as engine:
        yield engine


def preemptions(llm) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def test_scores_and_texts_are_those_of_transformers(llm, tiny, threshold):  # noqa: F811
    before = preemptions(llm)
    outputs = generate(llm, PROMPTS, max_tokens=NEW)
    assert preemptions(llm) > before  # some were thrown out of the cache and began anew
    flagged = [tiny.is_flagged(ids, threshold) for ids in PROMPTS]
    assert 0 < sum(flagged) < len(PROMPTS)
    for ids, output, halted in zip(PROMPTS, outputs, flagged, strict=True):
        tiny.check(output.kv_transfer_params["probes"], ids)
        (completion,) = output.outputs
        why = output.kv_transfer_params["halted"]
        if halted:
            assert (completion.text, list(completion.token_ids)) == ("", [])
            assert (completion.finish_reason, completion.stop_reason) == ("stop", "guard")
            assert (why["head"], why["label"], why["threshold"]) == ("guard", "bad", threshold)
            assert why["score"] == output.kv_transfer_params["probes"]["guard"]["scores"]["bad"]
        else:
            expected = tiny.reference(ids, max_new_tokens=NEW).sequences[0, len(ids) :]
            assert list(completion.token_ids) == expected.tolist()
            assert (completion.finish_reason, why) == ("length", None)


def test_what_is_in_the_prefix_cache_counts(llm, tiny, threshold):  # noqa: F811
    ids = next(ids for ids in (make_ids(120, seed) for seed in range(100, 200)) if not tiny.is_flagged(ids, threshold))
    (first,) = generate(llm, [ids], max_tokens=20)
    # The next turn: its first block has eight tokens that were written while decoding.
    following = [*ids, *first.outputs[0].token_ids, *make_ids(30, 1)]
    (second,) = generate(llm, [following])
    assert second.num_cached_tokens == BLOCK
    tiny.check(second.kv_transfer_params["probes"], following)
    (again,) = generate(llm, [following])
    assert again.num_cached_tokens == BLOCK
    assert again.kv_transfer_params == second.kv_transfer_params


def test_a_request_chooses_heads_but_not_to_go_unguarded(llm, tiny):  # noqa: F811
    for asked, got in ((["tone"], ("guard", "tone")), ([], ("guard",)), (["nobody", "size"], ("guard", "size"))):
        (output,) = generate(llm, PROMPTS[2:3], extra_args={"kv_transfer_params": {"probes": asked}})
        tiny.check(output.kv_transfer_params["probes"], PROMPTS[2], got)


def test_what_the_guard_cannot_read_gets_no_reply(llm):
    (output,) = generate(llm, [PREFIX])
    probes = output.kv_transfer_params["probes"]
    assert "no token that a head reads" in probes["guard"]["error"] and "logits" in probes["tone"]
    assert output.kv_transfer_params["halted"]["head"] == "guard"
    assert list(output.outputs[0].token_ids) == []


def test_a_stream_has_the_scores_from_its_first_token_on(llm, tiny, threshold):  # noqa: F811
    kind = vllm.sampling_params.RequestOutputKind.DELTA
    params = vllm.SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, output_kind=kind)
    for number, ids in enumerate(PROMPTS):
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": ids}, params)
    streams: dict[str, list] = {str(number): [] for number in range(len(PROMPTS))}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            streams[output.request_id].append(output)
    for ids, outputs in zip(PROMPTS, streams.values(), strict=True):
        flagged = tiny.is_flagged(ids, threshold)
        assert [len(output.outputs[0].token_ids) for output in outputs] == ([0] if flagged else [1] * 4)
        tiny.check(outputs[0].kv_transfer_params["probes"], ids)
        assert all(output.kv_transfer_params == outputs[0].kv_transfer_params for output in outputs)


def test_aborted_requests_leave_nothing_behind(llm):
    params = vllm.SamplingParams(max_tokens=50, ignore_eos=True)
    for number in range(3):
        llm.llm_engine.add_request(f"gone-{number}", {"prompt_token_ids": PROMPTS[9]}, params)
    llm.llm_engine.step()
    llm.llm_engine.abort_request([f"gone-{number}" for number in range(3)])
    assert not llm.llm_engine.has_unfinished_requests()
    assert "logits" in generate(llm, PROMPTS[:1])[0].kv_transfer_params["probes"]["tone"]
    connector = llm.llm_engine.engine_core.engine_core.scheduler.connector
    assert not connector._running and not connector._prompts and not connector._answers


def test_the_cache_holds_what_heads_read_and_nothing_more(llm, kept):
    config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    assert len(config.kv_cache_groups) == 1  # a block table for all
    keys_and_values = 4 * 2 * 2 * 32  # numbers a token: layers, both, heads, size
    # Of `guard`, `tone`, `topics` and `mood` at each layer that they read; `size` reads a state.
    features = 5 * 3 * 16 + 2 * (2 + 3) + 5 * 5 + 5 * 6 + HIDDEN
    numbers = keys_and_values + {"states": 5 * HIDDEN, "features": features}[kept]
    assert {tensor.size for tensor in config.kv_cache_tensors} == {BLOCKS * BLOCK * numbers * 4}
    (own,) = llm.collective_rpc(lambda worker: worker.model_runner.kv_cache_config)
    assert cache_growth(own.kv_cache_groups[0]) == pytest.approx(numbers / keys_and_values)
