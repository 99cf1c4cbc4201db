"""What vLLM can do beside heads, an engine each: scores, halts and texts stay those of transformers."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_engine import PROMPTS, TinyServing, generate, next_turn, running
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from llama_probe import AutoModelForProbedGeneration


NEW = 20


def check(llm, tiny: TinyServing, threshold: float, prompts=PROMPTS, lora=None) -> None:
    tiny.check_replies(generate(llm, prompts, NEW, lora), prompts, threshold, NEW)


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_speculation(tiny, threshold, tmp_path, method):
    config = {"method": method, "num_speculative_tokens": 3}
    if method == "ngram":
        config |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    if method == "draft_model":  # one that is often right
        lm = AutoModelForCausalLM.from_pretrained(tiny.backbone)
        weight = lm.model.layers[-1].mlp.down_proj.weight
        weight.data += 0.02 * torch.randn_like(weight)
        lm.save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(tiny.backbone).save_pretrained(tmp_path)
        config["model"] = str(tmp_path)
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


def test_adapters(tiny, threshold, tmp_path):
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
    with running(tiny, threshold, enable_lora=True, max_lora_rank=8) as llm:
        for _ in range(2):  # the second time from the prefix cache
            check(llm, adapted, threshold, prompts, lora)
            check(llm, tiny, threshold, prompts)


def test_a_connector_that_stores_caches(tiny, threshold, tmp_path):
    stored = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    stored["kv_connector_extra_config"] = {"shared_storage_path": str(tmp_path)}
    changes = {"kv_transfer_config": stored, "enable_chunked_prefill": False, "max_num_batched_tokens": 512}
    with running(tiny, threshold, **changes) as llm:
        check(llm, tiny, threshold)
        llm.reset_prefix_cache()
        check(llm, tiny, threshold)
        llm.reset_prefix_cache()
        (output,) = generate(llm, PROMPTS[-1:])
        assert output.num_cached_tokens > 0  # from the disk
        tiny.check(output.kv_transfer_params["probes"], PROMPTS[-1])


def test_a_pipeline(tiny, threshold):
    # vLLM's stages on a CPU fail if nothing is compiled.
    compiled = {"enforce_eager": False, "compilation_config": {"backend": "eager"}}
    with running(tiny, threshold, processes=2, pipeline_parallel_size=2, **compiled) as llm:
        for _ in range(2):
            check(llm, tiny, threshold)
