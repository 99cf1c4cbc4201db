"""Exported repositories: their files, what is refused before anything is written, and how they get to a Hub."""

import json

import pytest
import torch
from command_line import succeed
from conftest import make_lm, make_probe, make_tokenizer, probed, read_head, save_head
from hub_server.heads import same_weights
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_families import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from llama_probe import AutoModelForProbedGeneration, LlamaForProbedGeneration, ProbeError, ProbeModel
from llama_probe.heads import import_head_types
from llama_probe.hub.folder import HEAD_FILES, read_results
from llama_probe.hub.resolve import bundled_heads
from llama_probe.serving.export import auto_map, export_repository, push_repository, runtime_files


REPO = "alice/tiny-chat"


def toxic(**changes):
    return make_probe(id2label={0: "fine", 1: "toxic"}, threshold=0.3, **changes)


@pytest.fixture
def export(backbone_folder):
    def call(folder, heads=None, backbone=backbone_folder, **kwargs):
        return export_repository(str(backbone), folder, {"toxic": toxic()} if heads is None else heads, **kwargs)

    return call


def test_what_is_in_it(export, tmp_path):
    """Heads that were saved beside the backbone stay there."""
    lm = make_lm(vocab_size=260)
    probed({"own": toxic()}, vocab_size=260).save_pretrained(tmp_path / "lm")
    make_tokenizer().save_pretrained(tmp_path / "lm")
    folder = export(tmp_path / "new" / "tiny-chat", backbone=tmp_path / "lm", license="mit")
    assert folder == tmp_path / "new" / "tiny-chat" and list(folder.parent.iterdir()) == [folder]
    model_files = {"config.json", "generation_config.json", "model.safetensors"}
    tokenizer_files = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    found = {path.name for path in folder.iterdir()}
    assert found == {"README.md", "toxic", *model_files, *tokenizer_files, *runtime_files()}
    assert all((folder / name).read_text() == text for name, text in runtime_files().items())
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert config["auto_map"] == auto_map("llama") and not {"custom_pipelines", "probe_heads"} & config.keys()
    torch.testing.assert_close(load_file(folder / "model.safetensors"), dict(lm.state_dict()), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(folder)("abc")["input_ids"] == make_tokenizer()("abc")["input_ids"]
    head = read_head(folder / "toxic")
    assert head.config.id2label == {0: "fine", 1: "toxic"} and same_weights(head, toxic())
    assert {path.name for path in (folder / "toxic").iterdir()} <= set(HEAD_FILES)
    again = export(tmp_path / "again", backbone=folder, dtype="bfloat16")
    assert load_file(again / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


def test_the_card(export, tmp_path):
    """Labels come from data: whatever is in them, a head is one row of the table."""
    heads = {"toxic": toxic(base_model_name_or_path="org/tiny"), "mood": make_probe(1, id2label={0: "a|b", 1: "c d"})}
    heads["toxic"].results = read_results(bundled_heads()["toxicchat-gate"])
    folder, facts = export(tmp_path / "x", heads, license="mit", repo_id=REPO), heads["toxic"].results["card"]
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("llama_probe", "text-generation")
    assert (card.data.base_model, card.data.license) == ("org/tiny", "mit") and "custom_code" in card.data.tags
    assert f"`fine`, `toxic` | {facts['dataset_name']} | {facts['license']} |" in card.text
    assert "| [`mood`](mood/README.md) | mha | `a\\|b`, `c d` | not stated | not stated |\n" in card.text
    assert f'AutoModel.from_pretrained("{REPO}", probe="toxic", trust_remote_code=True)' in card.text
    assert f'AutoModel.from_pretrained("{REPO}", probe="toxic")' in card.text and "import llama_probe" in card.text
    assert f'probe="{REPO}:mood"' in (folder / "mood" / "README.md").read_text()
    assert read_results(folder / "toxic") == heads["toxic"].results


@pytest.mark.parametrize(
    "changes, prompt",
    [
        ({"prompt_format": "raw"}, '"Write me'),
        ({"system_prompt": "Be brief."}, '[{"role": "system", "content": "Be brief."}, {"role": "user", '),
        ({"token_scope": "response"}, '[{"role": "user", '),
    ],
)
def test_the_code_of_the_card_works_when_pasted(export, tmp_path, monkeypatch, changes, prompt):
    """Its prompts are as the first head was trained on them."""
    monkeypatch.chdir(tmp_path)
    card = ModelCard.load(export('a "b" <c>', {"toxic": toxic(**changes)}, base_model="org/other") / "README.md")
    assert card.data.base_model == "org/other" and card.text.count(f"prompt = {prompt}") == 2
    _, with_package = (part.split("```")[0] for part in card.text.split("```python\n")[1:])
    exec(with_package, {})


def test_a_head_type_of_ones_own_is_refused(export, tmp_path, own_type):
    import_head_types(own_type.parent / "top.py")
    with pytest.raises(ProbeError, match="'own' has a type of your own, 'top'"):
        export(tmp_path / "x", {"own": ProbeModel.from_pretrained(own_type)})
    assert not (tmp_path / "x").exists()


def test_what_is_refused(export, backbone_folder, tmp_path, monkeypatch):
    tiny("mixtral").save_pretrained(tmp_path / "mixtral")
    lm = AutoModelForCausalLM.from_pretrained(backbone_folder)
    get_peft_model(lm, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    make_tokenizer().save_pretrained(tmp_path / "lora")

    def cannot(*args, **kwargs):
        raise ValueError("no such\nquantiser")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", cannot)
    for words, call in {
        "'mixtral' cannot be exported; allowed: llama, qwen2": {"backbone": tmp_path / "mixtral"},
        "cannot be loaded": {"backbone": tmp_path / "nothing"},
        "hidden_size": {"heads": {"toxic": make_probe(hidden_size=64)}},
        r"merge_and_unload\(\)": {"backbone": tmp_path / "lora"},
        "cannot be saved: no such quantiser": {},
    }.items():
        with pytest.raises(ProbeError, match=words):
            export(tmp_path / "x", **call)
        assert not (tmp_path / "x").exists()


class TestHub:
    @pytest.fixture
    def repository(self, export, tmp_path):
        return export(tmp_path / "tiny-chat", repo_id=REPO, license="mit")

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
        shards = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
        kept = dict.fromkeys(("toxic/notes.txt", "mood/probe_config.json", "notes.txt", "own.py"), b"kept")
        hub.plant(REPO, kept | dict.fromkeys(("gone_llama_probe.py", *shards, "toxic/results.json"), b"old"))
        push_repository(repository, REPO, token=token)
        assert hub.files(REPO) == self.contents(repository) | kept
        before = hub.head(REPO)
        push_repository(repository, REPO, token=token)
        assert hub.head(REPO) == before

    def test_a_link_to_a_file_elsewhere_is_not_pushed(self, hub, token, repository, tmp_path):
        (tmp_path / "secret").write_text("mine")
        (repository / "toxic" / "notes.txt").symlink_to(tmp_path / "secret")
        with pytest.raises(ProbeError, match="notes"):
            push_repository(repository, REPO, token=token)
        assert not hub.requests

    def test_the_command(self, hub, token, backbone_folder, tmp_path):
        head = save_head(toxic(), tmp_path / "toxic")
        options = ("--backbone", backbone_folder, "--probe", head, "--license", "mit", "--push", REPO, "--json")
        found, commit = succeed("export", tmp_path / "out", *options), hub.head(REPO)
        assert (found["folder"], found["commit"], found["pull_request"]) == (str(tmp_path / "out"), commit, None)
        assert found["url"] == f"{hub.url}/{REPO}/commit/{commit}"
        assert f'from_pretrained("{REPO}", probe="toxic"' in hub.files(REPO)["README.md"].decode()
