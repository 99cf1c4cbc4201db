"""What vLLM can do beside heads, an engine each, of another family: scores, halts and texts are `generate()`'s."""

import pytest
import torch
from tiny_engine import HEADS, PROMPTS, REPLY_HEADS, TinyServing, generate, make_serving, metric
from tiny_families import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm.distributed.kv_transfer import get_kv_transfer_group

from llama_probe.vllm.compatibility import ARCHITECTURES


NEW = 20
FAMILIES = {
    "test_bfloat16": "mistral",
    "test_draft_model": "qwen3",
    "test_ranks[pipeline]": "qwen2",
    "test_ranks[tensor]": "qwen3_moe",
}
SERVED = ("llama", "phi3")  # by the engine and the server of other files


@pytest.fixture
def tiny(request, tmp_path) -> TinyServing:
    """The family of a test. Speculation does not go with heads that follow replies."""
    name = request.node.name
    heads = HEADS if name == "test_draft_model" else HEADS | REPLY_HEADS
    tiny = make_serving(tmp_path, FAMILIES[name], heads)
    if name != "test_bfloat16":
        tiny.set_thresholds(PROMPTS, NEW if name == "test_ranks[tensor]" else 0)
    return tiny


def check(llm, tiny: TinyServing, times: int = 1) -> None:
    """Ask all prompts, and again: then they are in the prefix cache."""
    for again in range(times):
        outputs = generate(llm, PROMPTS, NEW)
        assert tiny.check(outputs, PROMPTS, NEW) == {None, *tiny.thresholds}
        assert bool(outputs[-1].num_cached_tokens) == bool(again)


def test_each_family_has_an_engine():
    assert {TINY[family][1] for family in (*SERVED, *FAMILIES.values())} == set(ARCHITECTURES)


def test_bfloat16(tiny):
    """Heads are in fp32 beside a model that is not. Its texts are others, and are scored in fp32 to compare."""
    with tiny.running(dtype="bfloat16") as llm:
        for ids, output in zip(PROMPTS, generate(llm, PROMPTS, NEW), strict=True):
            known, reply = output.kv_transfer_params, list(output.outputs[0].token_ids)
            logits = torch.tensor(known["probes"]["tone"]["logits"])
            torch.testing.assert_close(logits, tiny.reference(ids).probe_logits["tone"][0], rtol=0, atol=0.05)
            tiny.check_reply(ids, reply, known["replies"][0], NEW - 1, atol=0.6)
        heads = get_kv_transfer_group()._scorer.heads.values()
        assert {weight.dtype for head in heads for weight in head.parameters()} == {torch.float32}


def test_draft_model(tiny, tmp_path):
    lm = AutoModelForCausalLM.from_pretrained(tiny.backbone)  # one that is often right
    weight = lm.model.layers[-1].mlp.down_proj.weight
    weight.data += 0.02 * torch.randn_like(weight)
    lm.save_pretrained(tmp_path / "draft")
    AutoTokenizer.from_pretrained(tiny.backbone).save_pretrained(tmp_path / "draft")
    config = {"method": "draft_model", "model": str(tmp_path / "draft"), "num_speculative_tokens": 3}
    with tiny.running(speculative_config=config) as llm:
        check(llm, tiny)
        drafts, accepted = (metric(llm, f"spec_decode_num_{kind}_tokens") for kind in ("draft", "accepted"))
        assert 1 <= accepted < drafts
        assert tiny.next_turn(llm)[1].num_cached_tokens > 120, "tokens of the reply, which were drafts"


@pytest.mark.parametrize("kind", ["pipeline", "tensor"])
def test_ranks(tiny, kind):
    """With heads that follow replies beside those of prompts, and where all is shared a guard of replies."""
    # vLLM's stages on a CPU fail if nothing is compiled.
    traced = {"mode": 2, "backend": "eager"}  # another mode would compile C++, whatever the back end
    compiled = {"enforce_eager": False, "compilation_config": traced} if kind == "pipeline" else {}
    with tiny.running(**{f"{kind}_parallel_size": 2}, **compiled) as llm:
        check(llm, tiny, times=2)
