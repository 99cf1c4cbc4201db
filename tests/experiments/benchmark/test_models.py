"""Models of a benchmark: sizes, dtypes and answers of guards, tiny and random."""

import pytest
import torch
from conftest import make_lm, make_prompts
from tiny_guards import BERT, T5
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig

from llama_probe import ProbeError
from llama_probe.experiments.benchmark.models import ModelPlan, ask_guard, held_bytes


CPU = torch.device("cpu")
LLAMA = make_lm(num_hidden_layers=1, pad_token_id=None).config
CLASSIFIER = LlamaConfig(**{**LLAMA.to_diff_dict(), "architectures": ["LlamaForSequenceClassification"]})
LLAMA.architectures = ["LlamaForCausalLM"]


def read(name, dtype="auto", random_weights=True, tokens=8, guards=True):
    return ModelPlan.read(str(name), dtype, random_weights, tokens, guards)


@pytest.mark.parametrize(
    "name, parameters", [("t5-large", 0.738e9), ("llama-3b", 3.213e9), ("llama-7b", 6.738e9), ("llama-8b", 8.030e9)]
)
def test_shapes_have_their_public_sizes(name, parameters):
    plan = read(name, "bfloat16")
    assert held_bytes([plan.load(torch.device("meta"))]) == pytest.approx(2 * parameters, rel=1e-3)


@pytest.mark.parametrize(
    "config, shape",
    [(T5, (3, 2)), (BERT, (3, 3)), (CLASSIFIER, (3, 2)), (LLAMA, (3, 10))],
    ids=["t5", "bert", "llama-classifier", "llama"],
)
def test_a_guard_with_random_weights(config, shape, tmp_path):
    config.save_pretrained(tmp_path / "guard")
    guard = read(tmp_path / "guard").load(CPU)
    prompts, passes = make_prompts(), []
    guard.register_forward_hook(lambda *_: passes.append(1))
    answer = ask_guard(guard, prompts, torch.ones_like(prompts))
    assert answer.shape == shape, "logits, or ids with one new token"
    assert len(passes) == 1


def test_weights_are_loaded_unless_they_are_random(tmp_path):
    torch.manual_seed(0)
    saved = BertForSequenceClassification(BERT).eval()
    saved.save_pretrained(tmp_path / "guard")
    guard, prompts = read(tmp_path / "guard", random_weights=False).load(CPU), make_prompts()
    with torch.no_grad():
        expected = saved(prompts % 40, torch.ones_like(prompts)).logits
    torch.testing.assert_close(ask_guard(guard, prompts, torch.ones_like(prompts)), expected)


def test_refusals(backbone_folder, tmp_path):
    quantized = LlamaConfig(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    for name, config in (("masked", BertConfig(architectures=["BertForMaskedLM"])), ("small", quantized), ("b", BERT)):
        config.save_pretrained(tmp_path / name)
    with pytest.raises(ProbeError, match="BertForMaskedLM"):
        read(tmp_path / "masked")
    with pytest.raises(ProbeError, match="quantised"):
        read(tmp_path / "small", guards=False)
    with pytest.raises(ProbeError, match="cannot be loaded"):
        read(tmp_path / "b", random_weights=False).load(CPU)
    assert read(backbone_folder, tokens=512).config
    with pytest.raises(ProbeError, match="512 positions"):
        read(backbone_folder, tokens=513)
