"""One engine: prompts in chunks, a cache too small for all at once, guards of prompts and of replies, an adapter."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_engine import HEADS, HIDDEN, PREFIX, PROMPTS, REPLY_HEADS, TinyServing, generate, make_serving, metric
from transformers import AutoModelForCausalLM
from vllm.lora.request import LoRARequest

from llama_probe import AutoModelForProbedGeneration
from llama_probe.vllm.paged_states import cache_growth


BLOCK, BLOCKS, NEW = 32, 10, 50


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinyServing:
    tiny = make_serving(tmp_path_factory.mktemp("serving"), heads=HEADS | REPLY_HEADS)
    tiny.set_thresholds(PROMPTS, NEW)
    return tiny


@pytest.fixture(scope="module")
def llm(tiny):
    cache = {"block_size": BLOCK, "num_gpu_blocks_override": BLOCKS}
    with tiny.running(enable_lora=True, max_lora_rank=8, **cache) as engine:
        yield engine


@pytest.fixture
def clean(llm):
    """Raises if a test leaves something of its requests in the scheduler, or a slot is lost."""
    yield
    probes = llm.llm_engine.engine_core.engine_core.scheduler.probes
    assert not (probes._results or probes._prompts or probes.replies.running or probes.replies._siblings)
    assert sorted(probes.replies.free_slots) == list(range(8))


@pytest.fixture(scope="module")
def passing(tiny) -> list[list[int]]:
    """Prompts whose whole replies a client gets."""
    prompts = [ids for ids in PROMPTS if tiny.expected(ids, NEW)[1] is None]
    assert len(prompts) > 1
    return prompts


@pytest.mark.usefixtures("clean")
class TestEngine:
    def test_scores_and_texts_are_those_of_generate(self, llm, tiny):
        """In chunks, some thrown out of the cache, and again with the prompts in it."""
        ends = {tiny.expected(ids, NEW)[1] for ids in PROMPTS}
        assert None in ends and any(end and end[1] for end in ends), "a reply is halted behind its first token"
        for _ in range(2):
            before = metric(llm, "num_preemptions")
            assert tiny.check(generate(llm, PROMPTS, NEW), PROMPTS, NEW) == {None, "guard", "watch"}
            assert metric(llm, "num_preemptions") > before

    def test_prefix_cache_has_the_tokens_of_the_last_turn(self, llm, tiny):
        following, second = tiny.next_turn(llm)
        assert second.num_cached_tokens == 128  # with eight tokens that were written while decoding
        (again,) = generate(llm, [following])
        assert again.num_cached_tokens == 160
        tiny.check_prompt(again.kv_transfer_params["probes"], following)

    def test_request_chooses_heads_but_not_to_go_unguarded(self, llm, tiny, passing):
        for asked, got in ((["tone"], ["guard", "tone"]), ([], ["guard"]), (["nobody", "end"], ["guard", "end"])):
            (output,) = generate(llm, passing[:1], 4, asked={"probes": asked})
            tiny.check_prompt(output.kv_transfer_params["probes"], passing[0], got)
            (reply,) = output.kv_transfer_params["replies"]
            assert list(reply["probes"]) == ["watch", "end"][: 1 + ("end" in asked)]

    def test_prompt_that_the_guard_cannot_read_gets_no_reply(self, llm):
        (output,) = generate(llm, [PREFIX])
        probes = output.kv_transfer_params["probes"]
        assert "error" in probes["guard"] and "logits" in probes["tone"]
        assert output.kv_transfer_params["halted"]["head"] == "guard"
        assert list(output.outputs[0].token_ids) == []

    def test_adapter_makes_the_states_that_are_scored(self, llm, tiny, tmp_path):
        torch.manual_seed(1)
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
        adapted = TinyServing(tmp_path / "merged", tiny.heads, model, tiny.thresholds)
        prompts = [ids for ids in PROMPTS if len(ids) > 3]
        for served, adapter in ((adapted, LoRARequest("mine", 1, str(tmp_path))), (tiny, None)) * 2:
            served.check(generate(llm, prompts, 20, lora=adapter), prompts, 20)  # at last from the prefix cache

    def test_cache_holds_what_heads_read_and_nothing_more(self, llm):
        config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
        assert len(config.kv_cache_groups) == 1  # a block table for all
        keys_and_values = 4 * 2 * 2 * 32  # numbers a token: layers, both, heads, size
        # At each layer that they read `guard`, `tone`, `topics`, `mood`; and `watch`, `theme`, `tags`.
        features = 5 * 3 * 16 + 2 * (2 + 3) + 5 * 5 + 5 * 6 + 2 * (2 + 2) + 5 * 6 + 5 * 5
        numbers = keys_and_values + features + 2 * HIDDEN  # states that `size`, `end` and `mean` read
        assert {tensor.size for tensor in config.kv_cache_tensors} == {BLOCKS * BLOCK * numbers * 4}
        (own,) = llm.collective_rpc(lambda worker: worker.model_runner.kv_cache_config)
        assert cache_growth(own.kv_cache_groups[0]) == pytest.approx(numbers / keys_and_values)

    def test_each_of_several_sampled_replies_has_its_scores(self, llm, tiny, passing):
        (output,) = generate(llm, passing[:1], 12, n=3, temperature=1.0, logprobs=2)
        assert len(output.kv_transfer_params["replies"]) == 3
        for choice, said in zip(output.outputs, output.kv_transfer_params["replies"], strict=True):
            reply, halted = list(choice.token_ids), said["halted"]
            assert len(choice.logprobs) == len(reply)
            assert all(token in row for token, row in zip(reply, choice.logprobs, strict=True))
            if halted is None:
                tiny.check_reply(passing[0], reply, said)
            else:
                assert len(reply) == halted["token"] and choice.stop_reason == "watch"

    def test_stop_string_ends_a_reply_that_is_scored(self, llm, tiny, passing):
        (whole,) = generate(llm, passing[:1], NEW)
        text = whole.outputs[0].text
        stop = text[6:9]
        (output,) = generate(llm, passing[:1], NEW, stop=[stop])
        assert output.outputs[0].text == text[: text.index(stop)] and output.outputs[0].stop_reason == stop
        (said,) = output.kv_transfer_params["replies"]
        tokens = said["probes"]["watch"]["tokens"]
        tiny.check_reply(passing[0], list(whole.outputs[0].token_ids)[:tokens], said)
        assert len(output.outputs[0].token_ids) <= tokens

    def test_reply_in_the_prompt_is_scored_as_a_whole(self, llm, tiny):
        """Only if nothing is written: elsewhere it would hide a prompt's end from its guard."""
        for ids in PROMPTS[2:6:3]:
            whole = tiny.reference(ids, NEW).sequences[0, : len(ids) + NEW].tolist()
            (output,) = generate(llm, [whole], asked={"reply": False, "reply_start": len(ids)})
            probes = output.kv_transfer_params["probes"]
            for name, logits in tiny.token_logits(ids, whole[len(ids) :]).items():
                torch.testing.assert_close(torch.tensor(probes[name]["logits"]), logits[-1], rtol=1e-5, atol=1e-5)
            tiny.check_prompt({"tone": probes["tone"]}, ids, ["tone"])
            (output,) = generate(llm, [whole], asked={"reply_start": len(ids)})
            tiny.check_prompt(output.kv_transfer_params["probes"], whole)
