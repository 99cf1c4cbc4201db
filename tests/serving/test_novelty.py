"""Novelty in what models with heads return, and labels that are left out because of it."""

import pickle

import pytest
import torch
from cases import MARKERS, USER
from conftest import make_probe, make_tokenizer, probed, with_novelty
from transformers import pipeline

from llama_probe import ProbeError
from llama_probe.data.prompts import PromptFormat


def head(**changes):
    return with_novelty(make_probe(**{"probe_type": "gate", "num_labels": 3, **changes}))


@pytest.fixture
def model():
    heads = {"a": head(), "b": head(probe_type="mha", layers=[0, 2, 4]), "old": make_probe(seed=2)}
    return probed(heads)


@torch.no_grad()
def test_abstaining(model, prompts):
    novelty = model(prompts).probe_novelty["a"]
    at = float(novelty.sort().values[1])
    labels = model(prompts).probe_labels["a"]
    expected = [None if value > at else label for value, label in zip(novelty.tolist(), labels, strict=True)]
    assert expected.count(None) == 1
    plain = model.generate(prompts, max_new_tokens=1, num_beams=2)
    assert plain.probe_labels["a"] == labels and plain.abstain_at is None and plain.probe_novelty.keys() == {"a", "b"}
    for found in (plain.probe_novelty["a"], pickle.loads(pickle.dumps(plain)).probe_novelty["a"]):
        torch.testing.assert_close(found, novelty, atol=1e-4, rtol=1e-4)
    assert model.generate(prompts, max_new_tokens=1, probes="a", abstain_at=at).probe_labels == {"a": expected}
    out = model.generate(prompts, max_new_tokens=1, abstain_at={"a": at})
    found = model.classify(prompts, abstain_at={"a": at})
    assert out.probe_labels["a"] == found["a"].labels == expected
    assert None not in out.probe_labels["old"] + found["old"].labels
    for call in (model.classify, model.generate):
        with pytest.raises(ProbeError, match="'old' has no novelty"):
            call(prompts, abstain_at=0.5)


def test_texts_and_a_pipeline():
    tokenizer, texts = make_tokenizer(), ["good morning", "a", "what is this about?"]
    model = probed({"a": head(**PromptFormat(tokenizer).config_fields())}, vocab_size=260)
    found = model.classify(texts, tokenizer=tokenizer)["a"]
    for text, value in zip(texts, found.novelty.tolist(), strict=True):
        assert float(model.classify(text, tokenizer=tokenizer)["a"].novelty) == pytest.approx(value, abs=1e-4)
    at = float(found.novelty.sort().values[1])
    assert model.classify(texts, tokenizer=tokenizer, abstain_at=at)["a"].labels.count(None) == 1
    tools = {"tools": head(token_scope="tool", turn_markers=MARKERS)}
    write = pipeline("probed-text-generation", model=model, tokenizer=tokenizer, probe=tools)
    found = write(tokenizer.decode([USER, 40]), max_new_tokens=1, abstain_at=0)[0]["probes"]
    assert found["a"]["label"] is None and found["a"]["score"] is None and 0 <= found["a"]["novelty"] <= 1
    assert found["tools"]["novelty"] is None and found["tools"]["label"], "it has read nothing"
