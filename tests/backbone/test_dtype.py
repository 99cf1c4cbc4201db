"""The dtype in which a CPU runs a backbone: what the processor computes, unless the user says otherwise."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch
from conftest import make_lm, make_probe, make_prompts, make_tokenizer, save_head
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from llama_probe import AutoModelForProbedGeneration, LlamaForProbedGeneration, ProbeError
from llama_probe.backbone import dtype as dtypes
from llama_probe.backbone import loading
from llama_probe.backbone.dtype import is_computed
from llama_probe.backbone.fingerprint import backbone_facts
from llama_probe.backbone.loading import load_backbone
from llama_probe.heads.match import compare, describe
from llama_probe.serving import loading as heads_loading
from llama_probe.serving.export import export_repository


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    for module in (loading, heads_loading):
        monkeypatch.setattr(module, "choose_device", lambda: torch.device("cpu"))


@pytest.fixture(scope="module")
def half_folder(tmp_path_factory):
    """A backbone whose checkpoint is in bfloat16."""
    folder = tmp_path_factory.mktemp("half") / "tiny-half"
    make_lm(vocab_size=260).bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(logging.get_logger(dtypes.__name__), "warning_once", found.append)
    return found


LOAD = """
import json, sys, torch
from transformers import AutoModel
import llama_probe
from llama_probe.backbone.loading import load_backbone
folder = sys.argv[1]
models = [load_backbone(folder, device="cpu")[0], AutoModel.from_pretrained(folder, probe=[], device_map="cpu")]
models.append(load_backbone(folder, "bfloat16", device="cpu")[0])
print(json.dumps([torch.ops.mkldnn._is_mkldnn_bf16_supported(), *(str(model.dtype) for model in models)]))
"""


def test_a_processor_without_bf16(half_folder):
    """oneDNN takes this process to run on one."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LOAD, str(half_folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=True)
    computes, *found = json.loads(done.stdout.splitlines()[-1])
    assert not computes or platform.machine() != "x86_64", "the variable is for processors of Intel and AMD"
    chosen = "torch.bfloat16" if computes else "torch.float32"
    assert found == [chosen, chosen, "torch.bfloat16"]
    if not computes:
        (line,) = [line for line in done.stderr.splitlines() if "instead of" in line]
        assert "bfloat16" in line and "GB" in line, "said once for equal backbones"
        (line,) = [line for line in done.stderr.splitlines() if "measured" in line]
        assert "times" in line


@pytest.mark.parametrize("computes", [True, False])
@pytest.mark.parametrize("load", ["command", "auto", "class"])
def test_auto_is_a_dtype_that_the_processor_computes(half_folder, monkeypatch, warnings, load, computes):
    monkeypatch.setattr(dtypes, "is_computed", lambda dtype: computes)
    if load == "command":
        model, _ = load_backbone(str(half_folder))
    elif load == "auto":
        model = AutoModelForCausalLM.from_pretrained(half_folder, probe=make_probe())
    else:
        model = LlamaForProbedGeneration.from_pretrained(half_folder)
    expected = torch.bfloat16 if computes else torch.float32
    assert {parameter.dtype for name, parameter in model.named_parameters() if "probes" not in name} == {expected}
    assert model.config.dtype == expected and backbone_facts(model)["base_model_dtype"] in str(expected)
    assert len(warnings) == (not computes)


def test_a_dtype_that_was_asked_for_is_obeyed_with_a_warning(half_folder, monkeypatch, warnings):
    monkeypatch.setattr(dtypes, "is_computed", lambda dtype: False)
    monkeypatch.setattr(dtypes, "_slowdown", lambda dtype: 81.25)
    lm, _ = load_backbone(str(half_folder), "bfloat16")
    assert lm.dtype == torch.bfloat16 and len(warnings) == 1 and "81.2 times" in warnings[0]
    model = AutoModelForProbedGeneration.from_pretrained(half_folder, dtype=torch.float16)
    assert model.dtype == torch.float16 and len(warnings) == 2
    assert load_backbone(str(half_folder), "float32")[0].dtype == torch.float32 and len(warnings) == 2


def test_where_it_is_left_alone(half_folder, monkeypatch, warnings, tmp_path):
    """Plain calls of transformers, an accelerator to come, and weights that are only saved again."""
    monkeypatch.setattr(dtypes, "is_computed", lambda dtype: False)
    assert AutoModelForCausalLM.from_pretrained(half_folder).dtype == torch.bfloat16
    folder = export_repository(str(half_folder), tmp_path / "out", {"own": make_probe()})
    assert load_file(folder / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    monkeypatch.setattr(heads_loading, "choose_device", lambda: torch.device("cuda"))
    assert AutoModelForProbedGeneration.from_pretrained(half_folder).dtype == torch.bfloat16
    assert AutoModelForProbedGeneration.from_pretrained(half_folder, device_map="cpu").dtype == torch.float32
    assert len(warnings) == 1


def test_a_backbone_that_does_not_fit_in_float32(half_folder, monkeypatch):
    monkeypatch.setattr(dtypes, "is_computed", lambda dtype: False)
    monkeypatch.setattr(dtypes, "_free_memory", lambda: 1000)
    with pytest.raises(ProbeError, match="dtype bfloat16"):
        load_backbone(str(half_folder))
    assert load_backbone(str(half_folder), "bfloat16")[0].dtype == torch.bfloat16


def test_what_is_measured():
    assert is_computed(torch.float32) and dtypes._slowdown(torch.float32) == 1
    assert 0.01 < dtypes._slowdown(torch.bfloat16) < 10_000
    assert dtypes._free_memory() > 1e6


def test_a_head_made_in_bf16_is_the_same_head_on_fp32(half_folder, monkeypatch, tmp_path):
    """Its record fits, its logits are those of the bf16 backbone but for rounding, and it halts the same prompts."""
    half = AutoModelForCausalLM.from_pretrained(half_folder)
    made = make_probe(token_scope="prompt", flagged=["LABEL_1"])
    made.config = describe(half, made.config)
    assert made.config.base_model_dtype == "bfloat16"
    folder = save_head(made, tmp_path / "head")
    prompts = make_prompts(rows=12)
    scores = []
    halted = []
    for computes in (False, True):
        monkeypatch.setattr(dtypes, "is_computed", lambda dtype, computes=computes: computes)
        model = AutoModelForProbedGeneration.from_pretrained(half_folder, probe=folder, probe_strict=True)
        assert model.dtype == (torch.bfloat16 if computes else torch.float32)
        assert "differs" not in {check.verdict for check in compare(made.config, model)}
        scores.append(model.classify(prompts)["head"].probabilities[:, 1])
        if not computes:
            ranked = scores[0].sort().values
            place = ranked.diff().argmax()  # no score is near the threshold
            threshold = float(ranked[place : place + 2].mean())
        out = model.generate(prompts, max_new_tokens=2, halt_on={"head": {"label": "LABEL_1", "threshold": threshold}})
        halted.append([halt is not None for halt in out.probe_halts])
    torch.testing.assert_close(*scores, atol=0.02, rtol=0.02)
    assert halted[0] == halted[1] == (scores[0] > threshold).tolist() and len(set(halted[0])) == 2
