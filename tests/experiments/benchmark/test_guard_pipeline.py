"""Guards of each kind, tiny and random."""

import pytest
import torch
from conftest import make_lm, make_prompts
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    T5Config,
)

from llama_probe import ProbeError
from llama_probe.experiments.benchmark.guard_pipeline import GuardPlan, guard_kind


T5 = T5Config(
    vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0,
    architectures=["T5ForConditionalGeneration"],
)  # fmt: skip
BERT = BertConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3,
    architectures=["BertForSequenceClassification"],
)  # fmt: skip
LLAMA = make_lm(num_hidden_layers=1, pad_token_id=None).config
CLASSIFIER = LlamaConfig(**{**LLAMA.to_diff_dict(), "architectures": ["LlamaForSequenceClassification"]})
LLAMA.architectures = ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    "config, kind, shape",
    [
        (T5, "encoder-decoder", (3, 2)),
        (BERT, "classifier", (3, 3)),
        (CLASSIFIER, "classifier", (3, 2)),
        (LLAMA, "causal", (3, 10)),
    ],
    ids=["t5", "bert", "llama-classifier", "llama"],
)
def test_from_a_config_alone(config, kind, shape, tmp_path):
    config.save_pretrained(tmp_path / "guard")
    plan = GuardPlan.read(str(tmp_path / "guard"), random_weights=True)
    assert plan.kind == kind and plan.title == "guard" and plan.paper is None
    guard = plan.load(torch.device("cpu"))
    prompts = make_prompts()
    passes = []
    guard.model.register_forward_hook(lambda *_: passes.append(1))
    answer = guard.ask(prompts, torch.ones_like(prompts))
    assert answer.shape == shape, "logits, or one token (after the prompt, or after the decoder's start)"
    assert len(passes) == 1
    assert plan.weight_bytes == sum(4 * parameter.numel() for parameter in guard.model.parameters())


def test_weights_are_loaded_where_they_are_not_random(tmp_path):
    torch.manual_seed(0)
    saved = BertForSequenceClassification(BERT).eval()
    saved.save_pretrained(tmp_path / "guard")
    guard = GuardPlan.read(str(tmp_path / "guard")).load(torch.device("cpu"))
    prompts = make_prompts()
    with torch.no_grad():
        expected = saved(prompts % 40, torch.ones_like(prompts)).logits
    torch.testing.assert_close(guard.ask(prompts, torch.ones_like(prompts)), expected)


def test_a_shape_is_read_without_being_made():
    plan = GuardPlan.read("llama-7b", "bfloat16", random_weights=True)
    assert plan.kind == "causal" and plan.paper == "WildGuard-7B" and plan.weight_bytes > 13e9


def test_no_guard(tmp_path):
    with pytest.raises(ProbeError, match="m is no guard: its config names the architecture BertForMaskedLM; allowed"):
        guard_kind("m", BertConfig(architectures=["BertForMaskedLM"]))
    BERT.save_pretrained(tmp_path / "empty")
    with pytest.raises(ProbeError, match="cannot be loaded"):
        GuardPlan.read(str(tmp_path / "empty")).load(torch.device("cpu"))
