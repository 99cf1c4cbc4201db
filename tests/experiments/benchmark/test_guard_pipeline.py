"""Guards of each kind, tiny and random."""

import pytest
import torch
from conftest import make_lm, make_prompts
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, T5Config

from llama_probe import ProbeError
from llama_probe.experiments.benchmark.guard_pipeline import ask_guard, read_guard


CPU = torch.device("cpu")
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
    "config, shape",
    [(T5, (3, 2)), (BERT, (3, 3)), (CLASSIFIER, (3, 2)), (LLAMA, (3, 10))],
    ids=["t5", "bert", "llama-classifier", "llama"],
)
def test_a_guard_with_random_weights(config, shape, tmp_path):
    config.save_pretrained(tmp_path / "guard")
    plan = read_guard(str(tmp_path / "guard"), random_weights=True)
    guard = plan.load(CPU)
    prompts, passes = make_prompts(), []
    guard.register_forward_hook(lambda *_: passes.append(1))
    answer = ask_guard(guard, prompts, torch.ones_like(prompts))
    assert answer.shape == shape, "logits, or ids with one new token"
    assert len(passes) == 1 and plan.paper is None
    assert plan.weight_bytes == sum(4 * parameter.numel() for parameter in guard.parameters())


def test_weights_are_loaded_unless_they_are_random(tmp_path):
    torch.manual_seed(0)
    saved = BertForSequenceClassification(BERT).eval()
    saved.save_pretrained(tmp_path / "guard")
    guard, prompts = read_guard(str(tmp_path / "guard")).load(CPU), make_prompts()
    with torch.no_grad():
        expected = saved(prompts % 40, torch.ones_like(prompts)).logits
    torch.testing.assert_close(ask_guard(guard, prompts, torch.ones_like(prompts)), expected)


def test_refusals(tmp_path):
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / "masked")
    with pytest.raises(ProbeError, match="BertForMaskedLM"):
        read_guard(str(tmp_path / "masked"))
    BERT.save_pretrained(tmp_path / "empty")
    with pytest.raises(ProbeError, match="empty"):
        read_guard(str(tmp_path / "empty")).load(CPU)
