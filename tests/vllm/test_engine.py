"""One engine: prompts in chunks, many at once, a cache too small for all of them, a guard, and an adapter."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_engine import HIDDEN, PREFIX, PROMPTS, TinyServing, generate, next_turn, running
from transformers import AutoModelForCausalLM
from vllm.lora.request import LoRARequest

from llama_probe import AutoModelForProbedGeneration
from llama_probe.vllm.state_cache import cache_growth


BLOCK, BLOCKS, NEW = 128, 5, 50


@pytest.fixture(scope="module")
def llm(tiny, threshold):
    cache = {"block_size": BLOCK, "num_gpu_blocks_override": BLOCKS, "disable_log_stats": False}
    with running(tiny, threshold, enable_lora=True, max_lora_rank=8, **cache) as engine:
        yield engine


def preemptions(llm) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def test_scores_and_texts_are_those_of_transformers(llm, tiny, threshold):
    before = preemptions(llm)
    outputs = generate(llm, PROMPTS, max_tokens=NEW)
    assert preemptions(llm) > before  # some were thrown out of the cache and began anew
    tiny.check_replies(outputs, PROMPTS, threshold, NEW)


def test_what_is_in_the_prefix_cache_counts(llm, tiny, threshold):
    following, second = next_turn(llm, tiny, threshold)
    assert second.num_cached_tokens == BLOCK  # with eight tokens that were written while decoding
    (again,) = generate(llm, [following])
    assert again.num_cached_tokens == BLOCK
    assert again.kv_transfer_params == second.kv_transfer_params


def test_a_request_chooses_heads_but_not_to_go_unguarded(llm, tiny):
    for asked, got in ((["tone"], ("guard", "tone")), ([], ("guard",)), (["nobody", "size"], ("guard", "size"))):
        (output,) = generate(llm, PROMPTS[2:3], extra_args={"kv_transfer_params": {"probes": asked}})
        tiny.check(output.kv_transfer_params["probes"], PROMPTS[2], got)


def test_what_the_guard_cannot_read_gets_no_reply(llm):
    (output,) = generate(llm, [PREFIX])
    probes = output.kv_transfer_params["probes"]
    assert "no token that a head reads" in probes["guard"]["error"] and "logits" in probes["tone"]
    assert output.kv_transfer_params["halted"]["head"] == "guard"
    assert list(output.outputs[0].token_ids) == []


def test_adapters(llm, tiny, threshold, tmp_path):
    """A request with an adapter is scored on the states that the adapter makes."""
    lm, tensors = AutoModelForCausalLM.from_pretrained(tiny.backbone), {}
    for number, layer in enumerate(lm.model.layers):
        for name, linear in (("self_attn.q_proj", layer.self_attn.q_proj), ("mlp.down_proj", layer.mlp.down_proj)):
            down, up = 0.1 * torch.randn(8, linear.in_features), 0.1 * torch.randn(linear.out_features, 8)
            place = f"base_model.model.model.layers.{number}.{name}"
            tensors |= {f"{place}.lora_A.weight": down, f"{place}.lora_B.weight": up}
            linear.weight.data += up @ down
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    lm.save_pretrained(tmp_path / "merged")
    model = AutoModelForProbedGeneration.from_pretrained(tmp_path / "merged", probe=tiny.heads)
    adapted, lora = TinyServing(tmp_path / "merged", tiny.heads, model), LoRARequest("mine", 1, str(tmp_path))
    prompts = [ids for ids in PROMPTS if len(ids) > 3]
    for served, adapter in ((adapted, lora), (tiny, None)) * 2:  # the second time from the prefix cache
        served.check_replies(generate(llm, prompts, 20, adapter), prompts, threshold, 20)


def test_the_cache_holds_what_heads_read_and_nothing_more(llm):
    config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    assert len(config.kv_cache_groups) == 1  # a block table for all
    keys_and_values = 4 * 2 * 2 * 32  # numbers a token: layers, both, heads, size
    # Of `guard`, `tone`, `topics` and `mood` at each layer that they read; `size` reads a state.
    features = 5 * 3 * 16 + 2 * (2 + 3) + 5 * 5 + 5 * 6 + HIDDEN
    numbers = keys_and_values + features
    assert {tensor.size for tensor in config.kv_cache_tensors} == {BLOCKS * BLOCK * numbers * 4}
    (own,) = llm.collective_rpc(lambda worker: worker.model_runner.kv_cache_config)
    assert cache_growth(own.kv_cache_groups[0]) == pytest.approx(numbers / keys_and_values)
