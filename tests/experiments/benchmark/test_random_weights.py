"""Sizes of models, and refusals, without allocating weights that are not needed."""

import pytest
import torch
from conftest import make_lm
from transformers import LlamaConfig

from llama_probe import ProbeError
from llama_probe.experiments import paper
from llama_probe.experiments.benchmark import random_weights
from llama_probe.experiments.benchmark.guard_pipeline import read_guard
from llama_probe.experiments.benchmark.random_weights import ModelPlan, check_fits, held_bytes


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name, parameters", [("t5-large", 0.738e9), ("llama-3b", 3.213e9), ("llama-7b", 6.738e9), ("llama-8b", 8.030e9)]
)
def test_shapes_have_their_public_sizes(name, parameters):
    plan = read_guard(name, "bfloat16", random_weights=True)
    assert plan.weight_bytes == pytest.approx(2 * parameters, rel=1e-3)
    assert plan.paper in (None, *paper.SERVING)


def test_a_random_model_has_the_dtype_and_size_of_its_plan(backbone_folder):
    plan = ModelPlan.read(str(backbone_folder), "bfloat16", random_weights=True)
    model = plan.load(CPU)
    assert model.dtype == torch.bfloat16 and not model.training
    assert held_bytes([model, model]) == plan.weight_bytes
    assert held_bytes([make_lm(vocab_size=260)]) == 2 * held_bytes([model]), "fp32 is twice as large"


@pytest.mark.parametrize("own, asked, expected", [("float16", "auto", "float16"), ("float16", "bfloat16", "bfloat16")])
def test_dtypes(own, asked, expected, tmp_path):
    LlamaConfig(dtype=own).save_pretrained(tmp_path)
    assert ModelPlan.read(str(tmp_path), asked).dtype == getattr(torch, expected)


def test_models_that_do_not_fit_are_refused(monkeypatch):
    assert 2**20 < random_weights.free_bytes(CPU) < 2**50
    plans = [ModelPlan.read(name, "bfloat16", random_weights=True) for name in ("llama-7b", "llama-8b")]
    for free, fits in ((40e9, True), (20e9, False), (None, True)):
        monkeypatch.setattr(random_weights, "free_bytes", lambda device, free=free: free)
        if fits:
            check_fits(plans, CPU)
        else:
            with pytest.raises(ProbeError, match=r"13\.5 GB for llama-7b \+ 16\.1 GB for llama-8b.* 20\.0 GB"):
                check_fits(plans, CPU)


def test_configs_that_cannot_be_used(backbone_folder, tmp_path):
    with pytest.raises(ProbeError, match="'t5-large'"):
        ModelPlan.read("t5-large")
    config = LlamaConfig(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    config.save_pretrained(tmp_path)
    with pytest.raises(ProbeError, match="quantised"):
        ModelPlan.read(str(tmp_path), random_weights=True)
    plan = ModelPlan.read(str(backbone_folder))
    plan.check_length(512)
    with pytest.raises(ProbeError, match="512 positions"):
        plan.check_length(513)
