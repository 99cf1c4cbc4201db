"""What vLLM can do beside heads, an engine each, and each of another family: scores, halts and texts are those of transformers."""

import conftest
import pytest
import torch
from tiny_engine import HEADS, PROMPTS, REPLY_HEADS, SIZES, TinyServing, generate, make_serving, next_turn, running
from tiny_families import TINY
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from vllm import SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.sampling_params import RequestOutputKind

from llama_probe.heads.aggregator import Aggregator
from llama_probe.heads.gate import GateAggregator
from llama_probe.heads.low_rank import LowRankAggregator
from llama_probe.vllm.compatibility import ARCHITECTURES


NEW = 20
FAMILIES = {
    "states": "mistral",
    "bfloat16": "mistral",
    "ngram": "phi3",
    "draft_model": "qwen3",
    "connector": "qwen3_moe",
    "pipeline": "qwen2",
}


@pytest.fixture
def tiny(request, tmp_path) -> TinyServing:
    """The family of a test, by the name of the test or its parameter."""
    name = request.node.name.partition("_")[2]
    family = FAMILIES[request.node.callspec.params["method"] if "callspec" in vars(request.node) else name]
    experts = TINY[family][2] if family.endswith("_moe") else {}
    window = {"sliding_window": 16}  # shorter than the prompts, where a family has one
    sizes = {**conftest.SIZES, **experts, **SIZES, "head_dim": 32, **window}
    torch.manual_seed(0)
    followers = ("watch", "tags", "mean") if name == "pipeline" else ()
    heads = HEADS | {follower: REPLY_HEADS[follower] for follower in followers}
    return make_serving(
        tmp_path, AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval(), heads
    )


@pytest.fixture
def threshold(tiny) -> float:
    return tiny.threshold(PROMPTS)


def check(llm, tiny: TinyServing, threshold: float, times: int = 1) -> None:
    """Ask all prompts, and again: then they are in the prefix cache."""
    for again in range(times):
        outputs = generate(llm, PROMPTS, NEW)
        tiny.check_replies(outputs, PROMPTS, threshold, NEW)
        assert bool(outputs[-1].num_cached_tokens) == bool(again)


def test_each_family_has_an_engine():
    tested = {TINY[family][1] for family in FAMILIES.values()}
    assert tested | {"LlamaForCausalLM"} == set(ARCHITECTURES)


def test_states(tiny, threshold, monkeypatch):
    """Heads of all kinds read the states, as kinds without features do."""
    for kind in (GateAggregator, LowRankAggregator):
        monkeypatch.setattr(kind, "projected", Aggregator.projected)
    with running(tiny, threshold, block_size=32) as llm:
        check(llm, tiny, threshold, times=2)


def test_bfloat16(tiny, threshold):
    """Heads are in fp32 beside a model that is not."""
    with running(tiny, threshold, dtype="bfloat16") as llm:
        for ids, output in zip(PROMPTS, generate(llm, PROMPTS), strict=True):
            said = torch.tensor(output.kv_transfer_params["probes"]["tone"]["logits"])
            torch.testing.assert_close(said, tiny.reference(ids).probe_logits["tone"][0], rtol=0, atol=0.05)
        heads = get_kv_transfer_group()._scorer.heads.values()
        assert {weight.dtype for head in heads for weight in head.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_speculation(tiny, threshold, tmp_path, method):
    config = {"method": method, "num_speculative_tokens": 3}
    if method == "ngram":
        config |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    if method == "draft_model":  # one that is often right
        lm = AutoModelForCausalLM.from_pretrained(tiny.backbone)
        weight = lm.model.layers[-1].mlp.down_proj.weight
        weight.data += 0.02 * torch.randn_like(weight)
        lm.save_pretrained(tmp_path / "draft")
        AutoTokenizer.from_pretrained(tiny.backbone).save_pretrained(tmp_path / "draft")
        config["model"] = str(tmp_path / "draft")
    # n-grams bring numba, beside which vLLM starts no second engine in a process.
    processes = 2 if method == "ngram" else 1
    with running(tiny, threshold, processes, speculative_config=config, disable_log_stats=False) as llm:
        check(llm, tiny, threshold)
        names = [f"vllm:spec_decode_num_{kind}_tokens" for kind in ("draft", "accepted")]
        counted = {metric.name: metric.value for metric in llm.get_metrics() if metric.name in names}
        drafts, accepted = map(counted.get, names)
        assert (method == "draft_model") <= accepted < drafts
        _, second = next_turn(llm, tiny, threshold)
        assert second.num_cached_tokens > 120  # tokens of the reply, some of which were drafts
        params = SamplingParams(max_tokens=9, ignore_eos=True, temperature=0, output_kind=RequestOutputKind.DELTA)
        for number, ids in enumerate(PROMPTS):
            llm.llm_engine.add_request(str(number), {"prompt_token_ids": ids}, params)
        streams = {str(number): [] for number in range(len(PROMPTS))}
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                streams[output.request_id].append(output)
        for ids, outputs in zip(PROMPTS, streams.values(), strict=True):
            tiny.check(outputs[0].kv_transfer_params["probes"], ids)
            assert sum(len(output.outputs[0].token_ids) for output in outputs) in (0, 9)


def test_connector(tiny, threshold, tmp_path):
    """One that stores caches."""
    stored = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    stored["kv_connector_extra_config"] = {"shared_storage_path": str(tmp_path / "store")}
    changes = {"kv_transfer_config": stored, "enable_chunked_prefill": False, "max_num_batched_tokens": 512}
    with running(tiny, threshold, **changes) as llm:
        check(llm, tiny, threshold)
        llm.reset_prefix_cache()
        (output,) = generate(llm, PROMPTS[-1:])
        assert output.num_cached_tokens > 0  # from the disk
        llm.reset_prefix_cache()
        tiny.check_replies(generate(llm, PROMPTS, NEW), PROMPTS, threshold, NEW)
        tiny.check(output.kv_transfer_params["probes"], PROMPTS[-1])


def test_pipeline(tiny, threshold):
    """With heads that follow replies beside those of prompts."""
    # vLLM's stages on a CPU fail if nothing is compiled.
    compiled = {"enforce_eager": False, "compilation_config": {"backend": "eager"}}
    with running(tiny, threshold, processes=2, pipeline_parallel_size=2, **compiled) as llm:
        check(llm, tiny, threshold, times=2)
        asked = {"kv_transfer_params": {"token_scores": True}}
        for ids, output in zip(PROMPTS, generate(llm, PROMPTS, NEW, extra_args=asked), strict=True):
            if output.kv_transfer_params["halted"] is None:
                (said,) = output.kv_transfer_params["replies"]
                # No guard of replies waits for the score of the last token.
                tiny.check_tokens(ids, list(output.outputs[0].token_ids), said, NEW - 1)
