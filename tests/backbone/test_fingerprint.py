"""The fingerprint of a backbone: 32 numbers, and what rounding explains."""

import copy

import pytest
import torch
from conftest import make_probe
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from llama_probe import LlamaForProbedGeneration
from llama_probe.backbone.fingerprint import backbone_facts, distance, fingerprint


def test_it_is_the_same_in_every_mode_and_with_heads(lm):
    found = fingerprint(lm)
    training = copy.deepcopy(lm).train()
    training.model.norm.eval()
    probed = LlamaForProbedGeneration.from_causal_lm(copy.deepcopy(lm), {"a": make_probe()})
    assert found == fingerprint(lm) == fingerprint(training) == fingerprint(probed)
    assert not any(module.training for module in lm.modules())
    assert training.training and training.model.layers[0].training and not training.model.norm.training


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 12), st.sampled_from([8, 16, 48]), st.integers(40, 300))
def test_models_of_every_size_have_one(layers, hidden, vocab):
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    one, other = (fingerprint(LlamaForCausalLM(config)) for _ in range(2))
    assert len(one) == 32 and distance(one, one) == 0
    # 8 dimensions leave more to chance: there 4-bit rounding, 0.4, may explain as much.
    assert distance(one, other) > (0.06 if hidden == 8 else 0.4), "unrelated models are farther apart than rounding"


TORCHAO = {"quant_method": "torchao"}


@pytest.mark.parametrize(
    "quantization, name",
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq-4bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes-4bit"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        (TORCHAO | {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, "torchao-8bit"),
        (TORCHAO | {"quant_type": "Float8WeightOnlyConfig(set_inductor_config=True)"}, "torchao-8bit"),
        (TORCHAO | {"quant_type": {"default": {"_type": "Int8Activation", "weight_dtype": "int4"}}}, "torchao-4bit"),
        ("Int4Tensor", "torchao-4bit"),
        ("Int8Tensor", "torchao-8bit"),
    ],
)
def test_quantization_is_recorded(lm, quantization, name):
    """`torchao.quantization.quantize_` changes the type of weights, and leaves no trace in the config."""
    if isinstance(quantization, str):
        weight = lm.model.layers[0].mlp.up_proj.weight
        weight.__class__ = type(quantization, (torch.nn.Parameter,), {"__module__": "torchao.quantization"})
    else:
        lm.config.quantization_config = quantization
    assert backbone_facts(lm)["base_model_quantization"] == name
