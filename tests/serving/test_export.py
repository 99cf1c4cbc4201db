"""Exported repositories: their files, what is refused before anything is written, and how they get to a Hub."""

import ast
import json
import re

import pytest
import torch
from command_line import succeed
from conftest import make_lm, make_probe, make_tokenizer, read_head, save_head
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, MistralConfig, MistralForCausalLM

from llama_probe import AutoModelForProbedGeneration, LlamaForProbedGeneration, ProbeError
from llama_probe.heads import registry
from llama_probe.heads.configuration import read_config
from llama_probe.hub.folder import HEAD_FILES, read_results
from llama_probe.hub.resolve import bundled_heads
from llama_probe.serving.export import export_repository, push_repository
from llama_probe.serving.remote_code import AUTO_MAP, CUSTOM_PIPELINES, flat_files


REPO = "alice/tiny-chat"


@pytest.fixture
def lm():
    return make_lm(vocab_size=260)


def toxic(**changes):
    return make_probe(id2label={0: "fine", 1: "toxic"}, threshold=0.3, **changes)


def export(lm, folder, probe=None, **kwargs):
    kwargs.setdefault("tokenizer", make_tokenizer())
    return export_repository(lm, folder, {"toxic": toxic()} if probe is None else probe, **kwargs)


def test_what_is_in_it(lm, tmp_path):
    lm.generation_config.max_new_tokens = 7
    folder = export(lm, tmp_path / "new" / "tiny-chat", license="mit")
    assert folder == tmp_path / "new" / "tiny-chat" and list(folder.parent.iterdir()) == [folder]
    model_files = {"config.json", "generation_config.json", "model.safetensors"}
    tokenizer_files = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    found = {path.name for path in folder.iterdir()}
    assert found == {"README.md", "toxic", *model_files, *tokenizer_files, *flat_files()}
    assert all((folder / name).read_text() == text for name, text in flat_files().items())
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert (config["auto_map"], config["custom_pipelines"]) == (AUTO_MAP, CUSTOM_PIPELINES)
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == lm.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in lm.state_dict().items())
    assert GenerationConfig.from_pretrained(folder).max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(folder)("abc")["input_ids"] == make_tokenizer()("abc")["input_ids"]
    head = read_head(folder / "toxic")
    assert head.config.id2label == {0: "fine", 1: "toxic"} and head.config.threshold == 0.3
    assert all(torch.equal(head.state_dict()[name], tensor) for name, tensor in toxic().state_dict().items())
    assert {path.name for path in (folder / "toxic").iterdir()} <= set(HEAD_FILES)
    assert type(lm).__name__ == "LlamaForCausalLM" and not hasattr(lm.config, "auto_map"), "the model is as it was"


def test_the_card(lm, tmp_path):
    heads = {"toxic": toxic(base_model_name_or_path="org/tiny"), "mood": make_probe(1, probe_type="gate")}
    folder = export(lm, tmp_path / "x", heads, license="mit", repo_id=REPO)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("llama_probe", "text-generation")
    assert (card.data.base_model, card.data.license) == ("org/tiny", "mit") and "custom_code" in card.data.tags
    assert "| [`toxic`](toxic/README.md) | mha | `fine`, `toxic` |" in card.text and "(mood/README.md)" in card.text
    assert f'AutoModel.from_pretrained("{REPO}", probe="toxic", trust_remote_code=True)' in card.text
    assert f'AutoModel.from_pretrained("{REPO}", probe="toxic")' in card.text and "import llama_probe" in card.text
    assert f'probe="{REPO}:mood"' in (folder / "mood" / "README.md").read_text()


def test_the_card_of_odd_names_and_labels(lm, tmp_path):
    """Labels come from data: whatever is in them, a head is one row of the table."""
    odd = make_probe(id2label={0: "a|b", 1: "c d"})
    card = (export(lm, tmp_path / 'a "b" <c>', {"odd": odd}) / "README.md").read_text()
    assert "| [`odd`](odd/README.md) | mha | `a\\|b`, `c d` | not stated | not stated |\n" in card
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    texts = [{item.value for item in ast.walk(ast.parse(block)) if isinstance(item, ast.Constant)} for block in blocks]
    assert len(texts) == 3 and all('a "b" <c>' in found for found in texts) and '# `a "b" <c>`' in card


@pytest.mark.parametrize("changes, chat", [({"prompt_format": "raw"}, False), ({"system_prompt": "Be brief."}, True)])
def test_the_card_shows_prompts_as_its_first_head_was_trained_on_them(lm, tmp_path, changes, chat):
    folder = export(lm, tmp_path / "x", {"toxic": toxic(**changes)}, base_model="org/other")
    card = ModelCard.load(folder / "README.md")
    expected = '[{"role": "system", "content": "Be brief."}, {"role": "user", ' if chat else '"Write me'
    assert card.text.count(f"prompt = {expected}") == 2 and ("apply_chat_template" in card.text) == chat
    assert card.data.base_model == "org/other" and card.data.license is None


def test_the_card_of_a_kind_with_its_own_code(lm, tmp_path, own_kind):
    card = (export(lm, tmp_path / "x", {"own": own_kind}, trust_remote_code=True) / "README.md").read_text()
    assert card.count('probe="own", trust_remote_code=True)') == 3 and card.count("`own/probe_kind.py`") == 2


def test_results_of_a_head_go_along(lm, tmp_path):
    measured = json.loads((bundled_heads()["toxicchat-gate"] / "results.json").read_text())
    head = toxic()
    head.results = measured
    folder = export(lm, tmp_path / "x", {"toxic": head})
    assert read_results(folder / "toxic") == measured
    card = (folder / "README.md").read_text()
    assert f"{measured['card']['dataset_name']} | {measured['card']['license']} |" in card


def test_backbones_in_all_forms(backbone_folder, lm, tmp_path):
    head = save_head(toxic(), tmp_path / "heads" / "toxic")
    reference = export_repository(lm, tmp_path / "reference", head, tokenizer=make_tokenizer())
    probed = LlamaForProbedGeneration.from_causal_lm(make_lm(vocab_size=260), {"toxic": head})
    loaded = AutoModelForCausalLM.from_pretrained(backbone_folder)
    forms = [
        (str(backbone_folder), {"probe": [head]}),
        (loaded, {"probe": str(head)}),
        (probed, {"tokenizer": make_tokenizer()}),
        (reference, {"probe": "toxic"}),
    ]
    for number, (backbone, options) in enumerate(forms):
        folder = export_repository(backbone, tmp_path / str(number), **options)
        for path in reference.rglob("*"):
            if path.is_file() and path.name not in ("README.md", "tokenizer_config.json"):
                assert path.read_bytes() == (folder / path.relative_to(reference)).read_bytes(), path
    both = export(probed, tmp_path / "both", {"again": head})
    assert all(read_config(both / name).id2label[1] == "toxic" for name in ("toxic", "again"))
    half = export_repository(backbone_folder, tmp_path / "half", head, dtype="bfloat16")
    assert load_file(half / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "probe, words",
    [
        ({}, "no head"),
        ({"config.json": toxic()}, "config.json"),
        ({"toxic": make_probe(hidden_size=64)}, "hidden_size"),
        ("no-such-head", "no-such-head"),
    ],
)
def test_heads_that_are_refused(lm, tmp_path, probe, words):
    with pytest.raises(ProbeError, match=words):
        export(lm, tmp_path / "x", probe)
    assert not list(tmp_path.iterdir())


def test_a_kind_without_a_file_is_refused(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_PROBE_TYPES", dict(registry._PROBE_TYPES))
    own = type("Own", (registry.get_probe_type("gate"),), {"__module__": "__main__"})
    registry.register_probe_type("own")(own)
    with pytest.raises(ProbeError, match="'own'"):
        export(lm, tmp_path / "x", {"toxic": make_probe(probe_type="own")})
    assert not list(tmp_path.iterdir())


def test_other_families_are_refused_before_they_are_loaded(tmp_path, monkeypatch):
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    mistral = MistralForCausalLM(MistralConfig(**sizes, vocab_size=260, num_key_value_heads=2))
    mistral.save_pretrained(tmp_path / "mistral")
    monkeypatch.setattr("llama_probe.serving.export.load_backbone", lambda *args, **kwargs: pytest.fail("was loaded"))
    for backbone in (mistral, tmp_path / "mistral", AutoModelForProbedGeneration.from_causal_lm(mistral)):
        with pytest.raises(ProbeError, match="only LlamaForCausalLM"):
            export(backbone, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["mistral"]


def test_backbones_that_are_refused(lm, tmp_path):
    with pytest.raises(ProbeError, match="cannot be loaded"):
        export(tmp_path / "nothing", tmp_path / "x")
    with pytest.raises(ProbeError, match="tokenizer="):
        export(lm, tmp_path / "x", tokenizer=None)
    lm.generation_config.update(do_sample=False, temperature=0.3)
    with pytest.raises(ProbeError, match=r"cannot be saved: .*`temperature`"):
        export(lm, tmp_path / "x")
    probed = LlamaForProbedGeneration.from_causal_lm(make_lm(vocab_size=260), {"toxic": toxic()})
    with pytest.raises(ProbeError, match="attached already"):
        export(probed, tmp_path / "x", {"toxic": toxic()})
    assert not list(tmp_path.iterdir())


def test_adapters_are_refused(lm, tmp_path):
    adapted = get_peft_model(lm, LoraConfig(target_modules=["q_proj"]))
    for backbone in (adapted, adapted.get_base_model()):
        with pytest.raises(ProbeError, match=r"merge_and_unload\(\)"):
            export(backbone, tmp_path / "x")
    assert export(adapted.merge_and_unload(), tmp_path / "x").is_dir()


def test_other_backbones_are_warned_of(lm, tmp_path, caplog):
    lm.config._name_or_path = "org/tiny"
    export(lm, tmp_path / "x", {"toxic": toxic(base_model_name_or_path="org/other")})
    assert "was trained on org/other" in caplog.text and "states no licence" in caplog.text
    assert ModelCard.load(tmp_path / "x" / "README.md").data.base_model == "org/tiny"


class TestHub:
    @pytest.fixture
    def token(self, hub):
        return hub.add_user("alice")

    @pytest.fixture
    def repository(self, lm, tmp_path):
        return export(lm, tmp_path / "tiny-chat", repo_id=REPO, license="mit")

    @staticmethod
    def contents(folder):
        paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in paths.items() if not name.startswith(".")}

    def test_a_push_is_one_commit(self, hub, token, repository):
        (repository / ".cache").mkdir()
        (repository / ".cache" / "x").write_text("x")
        info = push_repository(repository, REPO, token=token, private=True, commit_message="Mine")
        files = hub.files(REPO)
        files.pop(".gitattributes")
        assert info.oid == hub.head(REPO) and files == self.contents(repository)
        assert hub.count("POST", "/commit/") == 1
        model = AutoModelForProbedGeneration.from_pretrained(REPO, probe="toxic", token=token)
        assert type(model) is LlamaForProbedGeneration and model.active_probes == ["toxic"]
        with pytest.raises(OSError, match="not a valid model identifier"):
            AutoModelForCausalLM.from_pretrained(REPO, token=False)

    def test_a_second_push_replaces_weights_code_and_heads_and_keeps_the_rest(self, hub, token, repository):
        old = {
            "gone_llama_probe.py": b"1",
            "model-00001-of-00002.safetensors": b"2",
            "model.safetensors.index.json": b"{}",
            "toxic/results.json": b"{}",
            "toxic/notes.txt": b"kept",
            "mood/probe_config.json": b"{}",
            "notes.txt": b"kept",
            "own.py": b"kept",
        }
        hub.plant(REPO, old)
        push_repository(repository, REPO, token=token)
        kept = {"toxic/notes.txt", "mood/probe_config.json", "notes.txt", "own.py"}
        assert hub.files(REPO) == self.contents(repository) | {name: old[name] for name in kept}
        before = hub.head(REPO)
        push_repository(repository, REPO, token=token)
        assert hub.head(REPO) == before

    def test_folders_that_are_not_pushed(self, hub, token, repository, tmp_path):
        (tmp_path / "secret").write_text("mine")
        (repository / "toxic" / "notes.txt").symlink_to(tmp_path / "secret")
        save_head(toxic(), tmp_path / "head")
        places = {"notes.txt": repository, "nothing": tmp_path / "nothing", "head": tmp_path / "head"}
        for words, folder in places.items():
            with pytest.raises(ProbeError, match=words):
                push_repository(folder, REPO, token=token)
        assert not hub.requests

    def test_the_command(self, hub, token, backbone_folder, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", token)
        head = save_head(toxic(), tmp_path / "toxic")
        options = ("--backbone", backbone_folder, "--probe", head, "--license", "mit", "--push", REPO, "--json")
        assert succeed("export", tmp_path / "out", *options) == {
            "folder": str(tmp_path / "out"),
            "commit": hub.head(REPO),
            "url": f"{hub.url}/{REPO}/commit/{hub.head(REPO)}",
            "pull_request": None,
        }
        assert f'from_pretrained("{REPO}", probe="toxic"' in hub.files(REPO)["README.md"].decode()
