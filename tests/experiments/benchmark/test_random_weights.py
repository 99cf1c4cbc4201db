"""Shapes, sizes and what is refused, without a weight being made where none is needed."""

import pytest
import torch
from conftest import make_lm
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig

from llama_probe import ProbeError
from llama_probe.experiments import paper
from llama_probe.experiments.benchmark import random_weights
from llama_probe.experiments.benchmark.random_weights import (
    SHAPES,
    check_fits,
    check_length,
    held_bytes,
    model_dtype,
    random_model,
    read_model_config,
    weight_bytes,
)


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name, parameters", [("t5-large", 0.738e9), ("llama-3b", 3.213e9), ("llama-7b", 6.738e9), ("llama-8b", 8.030e9)]
)
def test_shapes_have_their_public_sizes(name, parameters):
    auto_class = AutoModelForSeq2SeqLM if name == "t5-large" else AutoModelForCausalLM
    config = read_model_config(name, random_weights=True)
    assert weight_bytes(auto_class, config, torch.bfloat16) == pytest.approx(2 * parameters, rel=1e-3)
    assert SHAPES[name].paper in (None, *paper.SERVING)


def test_a_random_model_is_of_the_dtype_and_size_that_was_told(backbone_folder):
    config = read_model_config(str(backbone_folder), random_weights=True)
    model = random_model(AutoModelForCausalLM, config, torch.bfloat16, CPU)
    assert model.dtype == torch.bfloat16 and not model.training
    assert held_bytes([model, model]) == weight_bytes(AutoModelForCausalLM, config, torch.bfloat16)
    assert held_bytes([make_lm(vocab_size=260)]) == 2 * held_bytes([model]), "fp32 is twice as large"
    model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, pad_token_id=0)


def test_dtypes():
    assert model_dtype(LlamaConfig(), "auto") == torch.float32
    assert model_dtype(LlamaConfig(dtype="float16"), "auto") == torch.float16
    assert model_dtype(LlamaConfig(dtype="float16"), "bfloat16") == torch.bfloat16
    with pytest.raises(ProbeError, match="dtype='int8' is not allowed; allowed: auto, float32"):
        model_dtype(LlamaConfig(), "int8")


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(random_weights, "free_bytes", lambda device: 3e9)
    check_fits({"lm": 2e9, "guard": 1e9}, CPU)
    with pytest.raises(ProbeError, match=r"2\.0 GB for lm \+ 1\.5 GB for guard, and 3\.0 GB are free on cpu"):
        check_fits({"lm": 2e9, "guard": 1.5e9}, CPU)
    monkeypatch.setattr(random_weights, "free_bytes", lambda device: None)
    check_fits({"lm": 1e18}, CPU)


def test_free_memory_is_a_number_of_bytes():
    assert 2**20 < random_weights.free_bytes(CPU) < 2**50


def test_configs_that_cannot_be_used(backbone_folder, tmp_path):
    with pytest.raises(ProbeError, match=r"'t5-large' cannot be read.*with --random-weights also llama-3b, t5-large"):
        read_model_config("t5-large")
    config = LlamaConfig(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    config.save_pretrained(tmp_path)
    with pytest.raises(ProbeError, match="quantised"):
        read_model_config(str(tmp_path), random_weights=True)
    config = read_model_config(str(backbone_folder))
    check_length("lm", config, 512)
    with pytest.raises(ProbeError, match="lm has 512 positions, too few for 513 tokens"):
        check_length("lm", config, 513)
