"""classify(): text in, labels out."""

import functools
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_probe, make_tokenizer, probed, with_novelty
from transformers.utils import logging

from llama_probe import ProbeError
from llama_probe.backbone import passes as passes_module
from llama_probe.data import batches
from llama_probe.data.prompts import PromptFormat


TOKENIZER = make_tokenizer()
TEXTS = ["Hi", "A much longer text than that one", "Something between", "x"]


@functools.cache
def fields(kind="chat", **changes):
    return PromptFormat(TOKENIZER, kind, **changes).config_fields()


@pytest.fixture
def model():
    return probed(vocab_size=260)


def alone(model, name, texts, max_length=None):
    """What a head gives for texts that are rendered by hand, one at a time."""
    config = model.probes[name].config
    prompts = PromptFormat.from_config(config, TOKENIZER)
    prompts.max_length = max_length or prompts.max_length
    return torch.cat([model.classify(**prompts.batch([text]), probes=name)[name].logits for text in texts])


def test_each_head_reads_its_own_format(model, monkeypatch):
    monkeypatch.setattr(passes_module, "BATCH_TOKENS", 60)
    model.add_probe("chat", make_probe(token_scope="content", **fields(system_prompt="Be brief.")))
    model.add_probe("raw", make_probe(1, num_labels=3, **fields("raw", max_length=9)))
    model.add_probe("other", make_probe(2, probe_type="gate", **fields(system_prompt="Be brief.")))
    passes = []
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    found = model.classify(TEXTS, tokenizer=TOKENIZER)
    assert list(found) == ["chat", "raw", "other"] and 2 < len(passes) < 8, "heads of one format share passes"
    for name in found:
        torch.testing.assert_close(found[name].logits, alone(model, name, TEXTS), atol=1e-5, rtol=1e-4)
        assert len(found[name].labels) == 4 and found[name].probabilities.shape[0] == 4
    assert list(model.classify(TEXTS, tokenizer=TOKENIZER, probes="raw")) == ["raw"]


@pytest.mark.parametrize("names", [("tool", "user"), ("user", "tool")])
def test_a_text_is_the_users_and_a_tools_for_heads_that_read_these(model, names):
    for name in names:
        model.add_probe(name, make_probe(token_scope=name, **fields()))
    outputs = model.classify(TEXTS, tokenizer=TOKENIZER)
    for name in names:
        torch.testing.assert_close(outputs[name].logits, alone(model, name, TEXTS), atol=1e-5, rtol=1e-4)
    assert len(outputs["tool"].logits.unique(dim=0)) == len(outputs["user"].logits.unique(dim=0)) == len(TEXTS)


def test_a_start_that_no_head_reads_runs_once(model):
    texts = [f"text {number:02}" for number in range(12)]
    probe = model.add_probe("a", make_probe(token_scope="content", **fields()))
    model.add_probe("last", make_probe(probe_type="last", token_scope="prompt", **fields()))
    expected, ran = {name: alone(model, name, texts) for name in model.probes}, []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: ran.append(tuple(args[0].shape[:2])))
    found = {name: output.logits for name, output in model.classify(texts, tokenizer=TOKENIZER).items()}
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    start = len(probe.config.prefix_ids)
    whole = PromptFormat.from_config(probe.config, TOKENIZER).batch(texts)["input_ids"].shape[1]
    assert ran == [(1, start), (12, whole - start)]
    model.add_probe("whole", make_probe(token_scope="prompt", **fields()))
    model.classify(texts, tokenizer=TOKENIZER)
    assert ran[2:] == [(12, whole)], "one head reads it"


def test_many_texts_are_read_in_parts(model, monkeypatch):
    model.add_probe("a", with_novelty(make_probe(**fields())))
    whole = model.classify(TEXTS * 3, tokenizer=TOKENIZER)["a"]
    monkeypatch.setattr(batches, "_CHUNK", 5)
    model.add_probe("b", make_probe(token_scope="last_user", **fields()))
    with pytest.raises(ProbeError, match=r"rows \[7\] hold no token"):
        model.classify([*TEXTS, *TEXTS[:3], [{"role": "system", "content": "Hi"}]], tokenizer=TOKENIZER)
    parts = model.classify(TEXTS * 3, tokenizer=TOKENIZER)["a"]
    torch.testing.assert_close(parts.logits, whole.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(parts.novelty, whole.novelty, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS])
def test_texts_in_other_forms(model, texts):
    model.add_probe("a", make_probe(**fields()))
    expected = alone(model, "a", texts)
    chats = [[{"role": "user", "content": text}] for text in texts]
    datasets = pytest.importorskip("datasets")  # which vLLM's environment does not have
    forms = [texts, chats, np.array(texts), datasets.Dataset.from_dict({"text": texts})["text"]]
    for given in forms + ([texts[0], chats[0]] if len(texts) == 1 else []):
        found = model.classify(given, tokenizer=TOKENIZER)["a"].logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_replies(model):
    model.add_probe("a", make_probe(token_scope="response", **fields()))
    chats = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}] for text in TEXTS]
    found = model.classify(chats, tokenizer=TOKENIZER)["a"].logits
    one_by_one = [model.classify(chat, tokenizer=TOKENIZER)["a"].logits for chat in chats]
    torch.testing.assert_close(found, torch.cat(one_by_one), atol=1e-5, rtol=1e-4)
    with pytest.raises(ProbeError, match="reply"):
        model.classify(TEXTS, tokenizer=TOKENIZER)


LONG = "a text of which no head has seen the end, " * 4
WINDOWS = {"window": 16, "flagged": ["LABEL_1"], "token_scope": "content"}


def cut_to(caplog):
    """What the warnings since the last call say of cut texts: how many, and the limit."""
    text, _ = caplog.text, caplog.clear()
    return re.findall(r"(\d) of \d prompts were cut to max_length=(\d+)", text)


def test_heads_with_windows_read_texts_whole(model, caplog):
    """Other heads read as much as their training rows had. A limit of the user counts for all."""
    model.add_probe("cut", make_probe(**fields(max_length=90)))
    model.add_probe("windows", make_probe(**fields(max_length=90), **WINDOWS))
    texts = ["Hi", LONG]
    found = model.classify(texts, tokenizer=TOKENIZER)
    assert cut_to(caplog) == [("1", "90")], "of the head without windows"
    torch.testing.assert_close(found["cut"].logits, alone(model, "cut", texts))
    whole = alone(model, "windows", texts, max_length=1000)
    caplog.clear()
    torch.testing.assert_close(found["windows"].logits, whole, atol=1e-5, rtol=1e-4)
    shorter = model.classify(texts, tokenizer=TOKENIZER, max_length=70)
    assert cut_to(caplog) == [("1", "70")], "both heads share one format now"
    for name, output in shorter.items():
        torch.testing.assert_close(output.logits, alone(model, name, texts, max_length=70), atol=1e-5, rtol=1e-4)
    longer = model.classify(texts, tokenizer=TOKENIZER, max_length=1000, probes="cut")["cut"].logits
    torch.testing.assert_close(longer, alone(model, "cut", texts, max_length=1000), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(longer[1], found["cut"].logits[1], atol=1e-3), "or any text would pass"


def test_texts_that_the_backbone_was_not_made_for_are_warned_of(caplog):
    model = probed(vocab_size=260, max_position_embeddings=100)
    model.add_probe("windows", make_probe(**fields(), **WINDOWS))
    model.classify(TEXTS, tokenizer=TOKENIZER)
    assert "max_position_embeddings" not in caplog.text
    model.classify([*TEXTS, LONG], tokenizer=TOKENIZER)
    assert "1 of 5 texts" in caplog.text and "max_position_embeddings=100" in caplog.text


def test_weights_and_mistakes(model):
    model.add_probe("a", make_probe(**fields()))
    processor = SimpleNamespace(tokenizer=TOKENIZER)  # as multimodal backbones have
    found = model.classify(TEXTS, tokenizer=processor, output_attentions=True)["a"]
    assert found.token_weights.shape[:2] == (4, 5) and found.layer_weights.shape == (4, 5)
    for words, call in {
        "attention_mask": {"input_ids": TEXTS, "tokenizer": TOKENIZER, "attention_mask": torch.ones(4, 4)},
        "input_ids": {"input_ids": [], "tokenizer": TOKENIZER},
        "input_ids must": {"input_ids": [[1, 2]]},
        "max_length=9": {"input_ids": torch.ones(1, 4, dtype=torch.long), "max_length": 9},
        "max_length=3": {"input_ids": TEXTS, "tokenizer": TOKENIZER, "max_length": 3},
    }.items():
        with pytest.raises(ProbeError, match=words):
            model.classify(**call)


@pytest.mark.parametrize("side, rows", [("left", 4), ("right", 4), ("left", 1)])
def test_padding_without_a_mask_is_warned_of(model, caplog, side, rows):
    model.add_probe("a", make_probe(**fields()))
    inputs = PromptFormat(TOKENIZER).batch(TEXTS, side)
    shortest = inputs["attention_mask"].sum(dim=1).argsort()[:rows]
    for call in (model.classify, model):
        logging.get_logger("llama_probe").warning_once.__func__.cache_clear()
        caplog.clear()
        call(**inputs)
        assert "attention_mask" not in caplog.text
        call(inputs["input_ids"][shortest])
        assert "Pass the tokenizer's attention_mask" in caplog.text
