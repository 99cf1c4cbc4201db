"""Exported repositories: what is written, what is refused before anything is, and how they get to a Hub."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import make_lm, make_probe, make_tokenizer, read_head, save_head
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
)

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
    return export_repository(lm, folder, {"toxic": toxic()} if probe is None else probe, **kwargs)


def test_what_is_in_it(lm, tmp_path):
    lm.generation_config.max_new_tokens = 7
    folder = export(lm, tmp_path / "new" / "tiny-chat", tokenizer=make_tokenizer(), license="mit")
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
    # The model at hand is as it was.
    assert type(lm).__name__ == "LlamaForCausalLM" and not hasattr(lm.config, "auto_map")


def test_the_card(lm, tmp_path):
    heads = {"toxic": toxic(base_model_name_or_path="org/tiny"), "mood": make_probe(1, probe_type="gate")}
    folder = export(lm, tmp_path / "x", heads, tokenizer=make_tokenizer(), license="mit", repo_id=REPO)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("llama_probe", "text-generation")
    assert (card.data.base_model, card.data.license) == ("org/tiny", "mit") and "custom_code" in card.data.tags
    assert "| [`toxic`](toxic/README.md) | mha | `fine`, `toxic` |" in card.text and "(mood/README.md)" in card.text
    assert f'AutoModel.from_pretrained("{REPO}", probe="toxic", trust_remote_code=True)' in card.text
    assert f'AutoModel.from_pretrained("{REPO}", probe="toxic")' in card.text and "import llama_probe" in card.text
    assert f'probe="{REPO}:mood"' in (folder / "mood" / "README.md").read_text()
    # Labels come from somebody's data: whatever is in them, a head is one row of the table.
    odd = make_probe(id2label={0: "a|b", 1: "c d"})
    card = ModelCard.load(export(lm, tmp_path / "odd", {"odd": odd}, tokenizer=make_tokenizer()) / "README.md")
    assert "| [`odd`](odd/README.md) | mha | `a\\|b`, `c d` | not stated | not stated |\n" in card.text
    # Without a chat template, and named by the folder.
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    card = ModelCard.load(export(lm, tmp_path / "plain", tokenizer=tokenizer, base_model="org/other") / "README.md")
    assert card.data.base_model == "org/other" and card.data.license is None
    assert 'from_pretrained("plain", ' in card.text and "apply_chat_template" not in card.text
    assert 'prompt = "Write me a short poem about rain."' in card.text


def test_results_of_a_head_go_along(lm, tmp_path):
    source = bundled_heads()["toxicchat-gate"]
    measured = json.loads((source / "results.json").read_text())
    head = toxic()
    head.results = measured
    folder = export(lm, tmp_path / "x", {"toxic": head}, tokenizer=make_tokenizer())
    assert read_results(folder / "toxic") == measured
    card = (folder / "README.md").read_text()
    assert f"{measured['card']['dataset_name']} | {measured['card']['license']} |" in card


def test_code_in_the_card_of_a_folder_of_any_name(lm, tmp_path):
    card = (export(lm, tmp_path / 'a "b" <c>', tokenizer=make_tokenizer()) / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    texts = [{item.value for item in ast.walk(ast.parse(block)) if isinstance(item, ast.Constant)} for block in blocks]
    assert len(texts) == 3 and all('a "b" <c>' in found for found in texts)
    assert '# `a "b" <c>`' in card


def test_backbones_in_all_forms(backbone_folder, lm, tmp_path):
    head = save_head(toxic(), tmp_path / "heads" / "toxic")
    reference = export_repository(lm, tmp_path / "reference", head, tokenizer=make_tokenizer())
    probed = LlamaForProbedGeneration.from_causal_lm(make_lm(vocab_size=260), {"toxic": head})
    loaded = AutoModelForCausalLM.from_pretrained(backbone_folder)
    for number, (backbone, options) in enumerate(
        [
            (backbone_folder, {"probe": head}),
            (str(backbone_folder), {"probe": [head]}),
            (loaded, {"probe": str(head)}),
            (probed, {"tokenizer": make_tokenizer()}),
            (reference, {"probe": "toxic"}),
        ]
    ):
        folder = export_repository(backbone, tmp_path / str(number), **options)
        for path in reference.rglob("*"):
            if path.is_file() and path.name != "README.md":
                same = path.read_bytes() == (folder / path.relative_to(reference)).read_bytes()
                assert same or path.name == "tokenizer_config.json", path
    both = export_repository(probed, tmp_path / "both", {"again": head}, tokenizer=make_tokenizer())
    assert all(read_config(both / name).id2label[1] == "toxic" for name in ("toxic", "again"))
    assert probed.active_probes == ["toxic"]
    half = export_repository(backbone_folder, tmp_path / "half", head, dtype="bfloat16")
    assert load_file(half / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


def test_an_empty_folder_is_used_and_another_is_not(lm, tmp_path):
    (tmp_path / "empty").mkdir()
    assert (export(lm, tmp_path / "empty", tokenizer=make_tokenizer()) / "config.json").is_file()
    for folder in (tmp_path / "empty", tmp_path / "empty" / "README.md"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ProbeError, match="is not an empty folder"):
            export(lm, folder, tokenizer=make_tokenizer())
        assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_stays_the_same_one(lm, tmp_path, monkeypatch):
    """Somebody may work in it, or it may be a link, or a mount that nothing can take the place of."""
    for name in ("here", "linked"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("linked")
    monkeypatch.chdir(tmp_path / "here")
    export(lm, ".", tokenizer=make_tokenizer())
    export(lm, "../link", tokenizer=make_tokenizer())
    for name in (".", "../linked"):
        found = sorted(os.listdir(name))
        assert {"config.json", "model.safetensors", "toxic"} <= set(found) and not found[0].startswith(".")
    assert sorted(os.listdir("..")) == ["here", "link", "linked"] and (tmp_path / "link").is_symlink()
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ProbeError, match="is not an empty folder"):
        export(lm, "../link", tokenizer=make_tokenizer())


def test_an_empty_folder_is_empty_again_where_it_fails(lm, tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    monkeypatch.setattr("llama_probe.serving.export.write_card", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(lm, tmp_path / "x", tokenizer=make_tokenizer())
    assert not list((tmp_path / "x").iterdir())


def test_kinds_that_the_repository_has_no_code_for_are_refused(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_PROBE_TYPES", dict(registry._PROBE_TYPES))
    own = type("Own", (registry.get_probe_type("gate"),), {"__module__": "my_kinds"})
    registry.register_probe_type("own")(own)
    with pytest.raises(ProbeError, match=r"'toxic' is of the kind 'own', .* it has attentive, gate"):
        export(lm, tmp_path / "x", {"toxic": make_probe(probe_type="own")}, tokenizer=make_tokenizer())
    assert not list(tmp_path.iterdir())


def test_the_card_shows_prompts_as_its_first_head_was_trained_on_them(lm, tmp_path):
    for name, changes, expected in (
        ("raw", {"prompt_format": "raw"}, 'prompt = "Write me'),
        (
            "system",
            {"system_prompt": "Be brief."},
            'prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", ',
        ),
    ):
        card = export(lm, tmp_path / name, {"toxic": toxic(**changes)}, tokenizer=make_tokenizer()) / "README.md"
        assert card.read_text().count(expected) == 2
        assert ("apply_chat_template" in card.read_text()) == (name == "system")


@pytest.mark.parametrize("scope", ["prompt", "response", "all"])
def test_the_code_of_the_card_works_when_pasted(lm, tmp_path, monkeypatch, scope):
    monkeypatch.chdir(tmp_path)
    card = export(lm, "x", {"toxic": toxic(token_scope=scope)}, tokenizer=make_tokenizer()) / "README.md"
    _, with_package, _ = (part.split("```")[0] for part in card.read_text().split("```python\n")[1:])
    exec(with_package, {})


def test_relative_folders(lm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export(lm, "here", tokenizer=make_tokenizer()) == tmp_path / "here"


@pytest.mark.parametrize(
    "probe, words",
    [
        ({}, "there is no head to export"),
        ({"modeling_llama_probe": toxic()}, "cannot be called 'modeling_llama_probe'"),
        ({"Heads_Gate_llama_probe": toxic()}, "cannot be called"),
        ({"additional_chat_templates": toxic()}, "cannot be called"),
        ({"mood": toxic(), "Mood": toxic()}, "differ in upper and lower case only"),
        ({"config.json": toxic()}, "cannot name a head"),
        ({"toxic": make_probe(hidden_size=64)}, "hidden_size"),
        ("no-such-head", "no-such-head"),
    ],
)
def test_heads_that_are_refused(lm, tmp_path, probe, words):
    with pytest.raises(ProbeError, match=words):
        export(lm, tmp_path / "x", probe, tokenizer=make_tokenizer())
    assert not list(tmp_path.iterdir())


def test_other_families_are_refused_before_they_are_loaded(tmp_path, monkeypatch):
    MistralConfig(architectures=["MistralForCausalLM"]).save_pretrained(tmp_path / "mistral")
    monkeypatch.setattr("llama_probe.serving.export.load_backbone", lambda *args, **kwargs: pytest.fail("was loaded"))
    with pytest.raises(ProbeError, match="is of the type 'mistral'"):
        export(tmp_path / "mistral", tmp_path / "x")


def test_backbones_that_are_refused(lm, tmp_path):
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    mistral = MistralForCausalLM(MistralConfig(**sizes, vocab_size=260, num_key_value_heads=2))
    mistral.save_pretrained(tmp_path / "mistral")
    make_tokenizer().save_pretrained(tmp_path / "mistral")
    for backbone in (mistral, tmp_path / "mistral", AutoModelForProbedGeneration.from_causal_lm(mistral)):
        with pytest.raises(ProbeError, match=r"only LlamaForCausalLM can be exported .*push_probe_to_hub"):
            export(backbone, tmp_path / "x", tokenizer=make_tokenizer())
    with pytest.raises(ProbeError, match="cannot be loaded"):
        export(tmp_path / "nothing", tmp_path / "x")
    with pytest.raises(ProbeError, match="pass tokenizer="):
        export(lm, tmp_path / "x")
    lm.generation_config.update(do_sample=False, temperature=0.3)
    with pytest.raises(
        ProbeError, match=r"the backbone cannot be saved: .*`temperature`"
    ):  # the reason, on a further line
        export(lm, tmp_path / "x", tokenizer=make_tokenizer())
    lm.generation_config.num_return_sequences = 3
    with pytest.raises(ProbeError, match="the backbone cannot be saved"):
        export(lm, tmp_path / "x", tokenizer=make_tokenizer())
    probed = LlamaForProbedGeneration.from_causal_lm(make_lm(vocab_size=260), {"toxic": toxic()})
    with pytest.raises(ProbeError, match="attached already"):
        export(probed, tmp_path / "x", {"toxic": toxic()}, tokenizer=make_tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["mistral"]


def test_adapters_are_refused(lm, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(lm, peft.LoraConfig(target_modules=["q_proj"]))
    for backbone in (adapted, adapted.get_base_model()):
        with pytest.raises(ProbeError, match=r"merge_and_unload\(\)"):
            export(backbone, tmp_path / "x", tokenizer=make_tokenizer())
    merged = adapted.merge_and_unload()
    assert export(merged, tmp_path / "x", tokenizer=make_tokenizer()).is_dir()


def test_other_backbones_are_warned_of(lm, tmp_path, caplog):
    lm.config._name_or_path = "org/tiny"
    head = toxic(base_model_name_or_path="org/other")
    export(lm, tmp_path / "x", {"toxic": head}, tokenizer=make_tokenizer())
    assert "was trained on org/other" in caplog.text and "states no licence" in caplog.text
    assert ModelCard.load(tmp_path / "x" / "README.md").data.base_model == "org/tiny"


# To a Hub.


@pytest.fixture
def token(hub):
    return hub.add_user("alice")


@pytest.fixture
def repository(lm, tmp_path):
    return export(lm, tmp_path / "tiny-chat", tokenizer=make_tokenizer(), repo_id=REPO, license="mit")


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_push_is_one_commit(hub, token, repository):
    (repository / ".cache").mkdir()
    (repository / ".cache" / "x").write_text("x")
    info = push_repository(repository, REPO, token=token, private=True, commit_message="Mine")
    expected = {path: data for path, data in contents(repository).items() if not path.startswith(".")}
    files = hub.files(REPO)
    files.pop(".gitattributes")
    assert info.oid == hub.head(REPO) and files == expected
    assert hub.count("POST", "/commit/") == 1
    model = AutoModelForProbedGeneration.from_pretrained(REPO, probe="toxic", token=token)
    assert type(model) is LlamaForProbedGeneration and model.active_probes == ["toxic"]
    with pytest.raises(OSError, match="not a valid model identifier"):
        AutoModelForCausalLM.from_pretrained(REPO, token=False)


def test_a_second_push_replaces_weights_code_and_heads_and_keeps_the_rest(hub, token, repository):
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
    assert hub.files(REPO) == contents(repository) | {name: old[name] for name in kept}
    before = hub.head(REPO)
    push_repository(repository, REPO, token=token)
    assert hub.head(REPO) == before


def test_branches_and_pull_requests(hub, token, repository):
    push_repository(repository, REPO, token=token, revision="next")
    assert "config.json" in hub.files(REPO, "next") and "config.json" not in hub.files(REPO)
    info = push_repository(repository, REPO, token=token, create_pr=True)
    assert info.pr_url and "config.json" not in hub.files(REPO)


def test_pushes_that_fail(hub, token, repository, tmp_path, monkeypatch):
    hub.plant("bob/model", {"config.json": b"{}"})
    before = hub.head("bob/model")
    for repo_id, options, words in [
        ("bob/model", {"token": token}, "may not write to bob/model"),
        (REPO, {"token": "hf_wrongwrong"}, "does not know this token"),
        ("a/b/c", {"token": token}, "repo_id='a/b/c' is not allowed"),
    ]:
        with pytest.raises(ProbeError, match=words) as caught:
            push_repository(repository, repo_id, **options)
        assert "hf_wrong" not in str(caught.value) and token not in str(caught.value)
    assert hub.head("bob/model") == before
    model_info = HfApi.model_info

    def somebody_else_is_faster(*args, **kwargs):
        info = model_info(*args, **kwargs)
        hub.plant(REPO, {"theirs.txt": b"1"})
        return info

    with monkeypatch.context() as patch, pytest.raises(ProbeError, match="somebody else pushed"):
        patch.setattr(HfApi, "model_info", somebody_else_is_faster)
        push_repository(repository, REPO, token=token)
    assert set(hub.files(REPO)) == {".gitattributes", "theirs.txt"}
    secret, link = tmp_path / "secret", repository / "toxic" / "notes.txt"
    secret.write_text("mine")
    link.symlink_to(secret)
    hub.clear_requests()
    with pytest.raises(ProbeError, match=r"notes.txt is a symbolic link out of the folder, to .*secret"):
        push_repository(repository, REPO, token=token)
    assert not hub.requests
    link.unlink()
    save_head(toxic(), tmp_path / "head")
    for folder in (tmp_path / "nothing", tmp_path / "head"):
        with pytest.raises(ProbeError, match="is not an exported repository"):
            push_repository(folder, REPO, token=token)


# The command.


def run(*args, **env):
    code = "import typer; from llama_probe.cli.export import export; typer.run(export)"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


def test_the_command(hub, token, backbone_folder, tmp_path):
    head = save_head(toxic(), tmp_path / "toxic")
    options = ["--backbone", backbone_folder, "--probe", head, "--license", "mit", "--push", REPO, "--json"]
    done = run(tmp_path / "out", *options, HF_TOKEN=token)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "folder": str(tmp_path / "out"),
        "commit": hub.head(REPO),
        "url": f"{hub.url}/{REPO}/commit/{hub.head(REPO)}",
        "pull_request": None,
    }
    assert f'from_pretrained("{REPO}", probe="toxic"' in hub.files(REPO)["README.md"].decode()
