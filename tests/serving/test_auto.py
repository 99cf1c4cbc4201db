"""AutoModel.from_pretrained(..., probe=...): new with the argument, untouched without it."""

import subprocess
import sys

import pytest
import torch
from conftest import make_lm, make_probe, save_head
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from llama_probe import AutoModelForProbedGeneration, LlamaForProbedGeneration, ProbeError
from llama_probe.serving import auto


@pytest.fixture
def head(tmp_path):
    return save_head(make_probe(), tmp_path / "toxic")


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForProbedGeneration])
def test_probe_gives_the_probed_class(auto_class, backbone_folder, head, prompts):
    model = auto_class.from_pretrained(backbone_folder, probe=head)
    assert type(model) is LlamaForProbedGeneration and model.active_probes == ["toxic"]
    reference = LlamaForProbedGeneration.from_causal_lm(make_lm(vocab_size=260), {"toxic": head})
    out, expected = (m.generate(prompts, max_new_tokens=3) for m in (model, reference))
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.probe_logits["toxic"], expected.probe_logits["toxic"])


def test_forms_of_the_argument(backbone_folder, head, tmp_path):
    other = save_head(make_probe(seed=1), tmp_path / "mood")
    for spec, names in (
        (str(head), ["toxic"]),
        ([head, str(other)], ["toxic", "mood"]),
        ({"x": head, "y": other, "z": head}, ["x", "y", "z"]),
        ([], []),
    ):
        assert AutoModel.from_pretrained(backbone_folder, probe=spec).active_probes == names


def test_usual_arguments_work_beside_it(backbone_folder, head):
    model, info = AutoModel.from_pretrained(
        backbone_folder, probe=head, dtype=torch.bfloat16, device_map="cpu", output_loading_info=True
    )
    assert model.dtype == torch.bfloat16 and not info["missing_keys"]
    assert model.probes["toxic"].classifier.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "spec, words",
    [
        ("no-such-alias", "bundled heads: "),
        (["toxic", "toxic"], "two heads are called 'toxic'"),
        ({"a b": "toxic"}, "cannot name a head"),
        (3, "not int"),
        ([None], "not as NoneType"),
    ],
)
def test_wrong_arguments(backbone_folder, head, monkeypatch, spec, words):
    monkeypatch.chdir(head.parent)
    with pytest.raises(ProbeError, match=words):
        AutoModel.from_pretrained(backbone_folder, probe=spec)


def test_another_base_model(backbone_folder, tmp_path):
    head = save_head(make_probe(base_model_name_or_path="org/other"), tmp_path / "other")
    AutoModel.from_pretrained(backbone_folder, probe=head)
    with pytest.raises(ProbeError, match="was trained on org/other"):
        AutoModel.from_pretrained(backbone_folder, probe=head, probe_strict=True)


def test_calls_without_it_return_what_they_returned_before(backbone_folder):
    code = f"""
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
classes = (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification)
def types():
    return [type(c.from_pretrained({str(backbone_folder)!r})).__qualname__ for c in classes]
before = types()
import llama_probe
assert types() == before == ["LlamaModel", "LlamaForCausalLM", "LlamaForSequenceClassification"], (before, types())
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_auto_classes_still_refuse_it(backbone_folder, head):
    with pytest.raises(TypeError):
        AutoModelForSequenceClassification.from_pretrained(backbone_folder, probe=str(head))


def test_installing_twice_and_undoing():
    installed = vars(AutoModel)["from_pretrained"]
    auto.install()
    assert vars(AutoModel)["from_pretrained"] is installed
    try:
        auto.uninstall()
        assert not hasattr(AutoModel.from_pretrained, "__without_probe__")
        auto.uninstall()
    finally:
        auto.install()
    assert AutoModel.from_pretrained.__name__ == "from_pretrained" and AutoModel.from_pretrained.__doc__
