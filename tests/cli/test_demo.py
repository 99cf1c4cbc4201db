"""The main job on the demo backbone. Slow: the first test prepares it."""

import re

import pytest
import torch
from command_line import succeed
from repository import ROOT
from transformers import AutoModel, AutoTokenizer

from llama_probe import AutoModelForProbedGeneration, ProbeError
from llama_probe.backbone import loading as backbones
from llama_probe.backbone.loading import demo_backbone, load_backbone
from llama_probe.cli import demo
from llama_probe.data.prompts import PromptFormat
from llama_probe.heads.scope import token_mask


def test_a_folder_without_a_model_and_no_package_with_one(monkeypatch, tmp_path):
    with pytest.raises(ProbeError, match=tmp_path.name):
        load_backbone(str(tmp_path))
    monkeypatch.setenv("LLAMA_PROBE_HOME", str(tmp_path))
    monkeypatch.setattr(backbones, "find_spec", lambda name: None)
    with pytest.raises(ProbeError, match=r"llama_probe\[demo\]"):
        demo_backbone()


@pytest.fixture(scope="module")
def model():
    heads = ["toxicchat-mha", "sst2-mha", "emotion-mha", "toxicchat", "sst2", "emotion", "imdb"]
    return AutoModel.from_pretrained(demo_backbone(), probe=heads, probe_strict=True)


def inputs_for(*texts):
    prompts = PromptFormat(AutoTokenizer.from_pretrained(demo_backbone(), padding_side="left"))
    return prompts.batch(list(texts))


@pytest.mark.slow
def test_it_is_prepared_once():
    folder = demo_backbone()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert demo_backbone() == folder and (folder / "model.safetensors").stat().st_mtime_ns == before
    assert sorted(path.name for path in folder.iterdir())[:2] == ["chat_template.jinja", "config.json"]


@pytest.mark.slow
def test_text_and_labels_from_one_pass(model):
    insult = "Write an insulting message that makes my coworker cry."
    inputs = inputs_for("I am so happy today, everything went well!", insult, "What is 2 + 2?")
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert out.probe_labels["toxicchat-mha"] == ["non-toxic", "toxic", "non-toxic"]
    assert out.probe_labels["emotion-mha"][0] == out.probe_labels["emotion"][0] == "joy"
    assert out.probe_labels["sst2-mha"][:2] == out.probe_labels["sst2"][:2] == ["positive", "negative"]
    assert out.probe_labels["toxicchat"] == ["non-toxic", "toxic", "non-toxic"]
    best = [model.probes[name].config.probe_type for name in ("toxicchat", "sst2", "emotion", "imdb")]
    assert best == ["multimax"] * 4, "by validation rows"
    model.set_active_probes([])
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), out.sequences)
    model.set_active_probes(list(model.probes))


@pytest.mark.slow
def test_half_precision_rounds_off_less_than_the_lm_does(model):
    """Heads that apply their maps in bf16, against what the LM's own bf16 changes of their logits."""
    sentences = "I loved every minute of it.", "What a shame, nobody came.", "You are an idiot.", "Rain fell all day."
    texts = [" ".join(sentences[number % 4] for number in range(30))]
    half, _ = load_backbone("demo", "bfloat16")
    half = AutoModelForProbedGeneration.from_causal_lm(half, dict(model.probes.items()))
    heads, lms = [], []
    for text in texts:
        inputs = inputs_for(text)
        assert inputs["input_ids"].shape[1] > 160
        found, exact = half.classify(**inputs), model.classify(**inputs)
        with torch.no_grad():
            states = half.model(**inputs, output_hidden_states=True).hidden_states
            for name, head in model.probes.items():
                mask = token_mask(head.config, **inputs)
                whole = head(hidden_states=states, attention_mask=mask).logits
                heads.append((found[name].logits - whole).abs().mean())
                lms.append((whole - exact[name].logits).abs().mean())
    assert 0 < torch.stack(heads).mean() < torch.stack(lms).mean() / 4


@pytest.mark.slow
def test_the_demo_command(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(demo, "PROMPTS", demo.PROMPTS[:5:4])
        shown = succeed("demo", "--max-new-tokens", 5)
    for words in ("I finally got the job", "joy", "harmful", "token for token"):
        assert words in shown
    assert len(shown.splitlines()) < 30
    rows = succeed("demo", "--max-new-tokens", 1, "--json")
    assert [row["probes"]["safety"]["label"] for row in rows] == ["harmless"] * 4 + ["harmful"] * 2
    emotions = [row["probes"]["emotion-mha"]["label"] for row in rows]
    assert emotions == ["joy", "sadness", "anger", None, None, None], "None where the prompt tells of no feeling"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^    (\S.*?)(?: \.\.\.)?  +(harmless|harmful) +(.*)$", readme, re.MULTILINE)
    assert len(shown) == 3
    for prompt, safety, emotion in shown:
        (probes,) = [row["probes"] for row in rows if row["prompt"].startswith(prompt)]
        assert probes["safety"]["label"] == safety
        assert (probes["emotion-mha"]["label"] or "no label: unlike the training data") == emotion
