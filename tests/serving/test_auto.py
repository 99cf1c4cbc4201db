"""AutoModel.from_pretrained(..., probe=...): new with the argument, untouched without it."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_probe, probed, save_head
from huggingface_hub.utils import _http
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from llama_probe import AutoModelForProbedGeneration, LlamaForProbedGeneration, ProbeError
from llama_probe.backbone.loading import backbone_target, load_backbone
from llama_probe.serving import auto
from llama_probe.serving.sources import load_or_find_head


AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForProbedGeneration)


@pytest.fixture
def head(tmp_path):
    return save_head(make_probe(), tmp_path / "toxic")


@pytest.mark.parametrize("auto_class", [AutoModel, *AUTO_CLASSES])
def test_probe_gives_the_probed_class(auto_class, backbone_folder, head, prompts):
    model = auto_class.from_pretrained(backbone_folder, probe=head)
    assert type(model) is LlamaForProbedGeneration and model.active_probes == ["toxic"]
    reference = probed({"toxic": head}, vocab_size=260)
    out, expected = (m.generate(prompts, max_new_tokens=3) for m in (model, reference))
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.probe_logits["toxic"], expected.probe_logits["toxic"])


def test_usual_arguments_work_beside_it(backbone_folder, head):
    model, info = AutoModel.from_pretrained(
        backbone_folder, probe=head, dtype=torch.bfloat16, device_map="cpu", output_loading_info=True
    )
    assert model.dtype == torch.bfloat16 and not info["missing_keys"]
    assert model.probes["toxic"].classifier.weight.dtype == torch.float32


def test_another_base_model(backbone_folder, tmp_path):
    head = save_head(make_probe(base_model_name_or_path="org/other"), tmp_path / "other")
    AutoModel.from_pretrained(backbone_folder, probe=head)
    with pytest.raises(ProbeError, match="org/other"):
        AutoModel.from_pretrained(backbone_folder, probe=head, probe_strict=True)


def test_calls_without_it_are_those_of_transformers(backbone_folder):
    installed = vars(AutoModel)["from_pretrained"]
    auto.install()
    assert vars(AutoModel)["from_pretrained"] is installed, "a second time it changes nothing"
    types = [type(c.from_pretrained(backbone_folder)).__name__ for c in (AutoModel, AutoModelForCausalLM)]
    assert types == ["LlamaModel", "LlamaForCausalLM"]
    assert AutoModel.from_pretrained.__name__ == "from_pretrained" and AutoModel.from_pretrained.__doc__


def test_a_head_in_memory(backbone_folder):
    head = make_probe()
    assert AutoModelForCausalLM.from_pretrained(backbone_folder, probe=head).probes["probe"] is head


class TestAHeadsId:
    """The id of a head is enough: its config names the backbone."""

    @pytest.fixture(params=["folder", "hub", "subfolder"])
    def place(self, request, backbone_folder, tmp_path, token, monkeypatch):
        probe = make_probe(base_model_name_or_path=str(backbone_folder), id2label={0: "no", 1: "yes"})
        if request.param == "folder":
            return str(save_head(probe, tmp_path / "mood")), {}
        # A pushed head keeps the name of a local backbone, and not its path.
        monkeypatch.chdir(backbone_folder.parent)
        where = {"subfolder": "heads/mood"} if request.param == "subfolder" else {}
        probe.push_to_hub("alice/mood", **where)
        return "alice/mood", where

    @pytest.mark.parametrize(
        "auto_class", [*AUTO_CLASSES, LlamaForProbedGeneration, AutoModelForSequenceClassification]
    )
    def test_models(self, auto_class, place, prompts):
        model, info = auto_class.from_pretrained(place[0], **place[1], output_loading_info=True)
        assert type(model) is LlamaForProbedGeneration and model.active_probes == ["mood"] and not info["missing_keys"]
        assert model.generate(prompts, max_new_tokens=2).probe_labels["mood"][0] in ("no", "yes")

    def test_config_and_tokenizer(self, place, backbone_folder):
        config = AutoConfig.from_pretrained(place[0], **place[1])
        assert config.model_type == "llama_probe_head" and config.id2label == {0: "no", 1: "yes"}
        assert Path(config.base_model_name_or_path).name == backbone_folder.name
        assert config.probe["probe_type"] == "mha"
        tokenizer = AutoTokenizer.from_pretrained(place[0], **place[1])
        assert tokenizer.chat_template == AutoTokenizer.from_pretrained(backbone_folder).chat_template

    def test_what_is_neither(self, tmp_path):
        for auto_class in (AutoConfig, AutoTokenizer, *AUTO_CLASSES):
            with pytest.raises(OSError):
                auto_class.from_pretrained(str(tmp_path / "nothing"))


def test_the_hub_is_not_asked_for_a_bundled_head(monkeypatch):
    monkeypatch.setattr(auto, "load_or_find_head", lambda load, *rest: load_or_find_head(pytest.fail, *rest))
    assert AutoConfig.from_pretrained("toxicchat-gate").probe["probe_type"] == "gate"


@pytest.mark.parametrize(
    "load",
    [
        lambda place: AutoModel.from_pretrained(place, probe="toxicchat-gate"),
        lambda place: LlamaForProbedGeneration.from_pretrained(place, probe="toxicchat-gate"),
        AutoModelForProbedGeneration.from_pretrained,
        load_backbone,
        backbone_target,
    ],
)
def test_without_a_network_the_hub_is_asked_once(hub, monkeypatch, load):
    waits = []  # between repeated requests
    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": waits.append}))
    with hub.down(), pytest.raises(ProbeError, match=r"^org/tiny [^\n]*llama-probe demo[^\n]*$"):
        load("org/tiny")
    assert not waits
