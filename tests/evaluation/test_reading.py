"""Readings: the weights of a head beside the tokens that they belong to."""

import numpy as np
import pytest
import torch
from conftest import make_lm, make_probe, make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llama_probe import AutoModelForProbedGeneration, ProbeError
from llama_probe.data.prompts import PromptFormat
from llama_probe.evaluation.reading import printable, read_texts, token_texts


TEXTS = ["good morning", "日本語 🎉 é\n\tbye"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    content = PromptFormat.create(tokenizer).config_fields() | {"token_scope": "content"}
    heads = {
        "mood": make_probe(probe_type="mha", id2label={0: "fine", 1: "awful"}, **content),
        "all": make_probe(seed=1, probe_type="gate", layers=[1, 3]),
        "several": make_probe(seed=2, probe_type="gate", num_labels=3, problem_type="multi_label_classification"),
        "value": make_probe(seed=3, probe_type="pooling", num_labels=1, problem_type="regression"),
    }
    return AutoModelForProbedGeneration.from_causal_lm(make_lm(vocab_size=260), heads)


def test_weights_are_those_of_classify(model, tokenizer):
    for head in ("mood", "all"):
        prompt_format = PromptFormat.from_config(model.probes[head].config, tokenizer)
        batch = prompt_format.batch(TEXTS)
        expected = model.classify(**batch, output_attentions=True)[head]
        for row, reading in enumerate(read_texts(model, tokenizer, TEXTS, head)):
            real = batch["attention_mask"][row].bool()
            assert reading.weights == pytest.approx(expected.token_weights[row][:, real].numpy(), abs=1e-5)
            assert reading.layer_weights == pytest.approx(expected.layer_weights[row].numpy(), abs=1e-5)
            assert list(reading.probabilities.values()) == pytest.approx(
                expected.probabilities[row].tolist(), abs=1e-5
            )
            assert reading.label == expected.labels[row] and reading.text == TEXTS[row] and reading.head == head
            assert reading.weights.sum(axis=1) == pytest.approx(1) and reading.token_weights.sum() == pytest.approx(1)
            assert len(reading.layers) == len(reading.weights) and len(reading.tokens) == reading.weights.shape[1]


def test_tokens_join_into_the_prompt(model, tokenizer):
    (reading,) = read_texts(model, tokenizer, [TEXTS[1]], "mood")
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": TEXTS[1]}], tokenize=False, add_generation_prompt=True
    )
    assert "".join(reading.tokens) == rendered
    start = reading.tokens.index("日")
    assert reading.tokens[start : start + 4] == ["日", "", "", "本"], "three tokens of one byte each"


def test_what_is_not_read_and_what_is_not_text(model, tokenizer):
    (reading,) = read_texts(model, tokenizer, ["hi"], "mood")
    prefix = model.probes["mood"].config.prefix_ids
    assert reading.counted == [False] * len(prefix) + [True] * (len(reading.tokens) - len(prefix))
    assert not reading.weights[:, : len(prefix)].any()
    text = [token for token, template in zip(reading.tokens, reading.template, strict=True) if not template]
    assert "".join(text) == "hi"
    assert all(position >= len(prefix) for position, _ in reading.top_tokens(1000, slot=0))
    (whole,) = read_texts(model, tokenizer, ["hi"], "all")
    assert all(whole.counted) and whole.template == reading.template
    (chat,) = read_texts(
        model, tokenizer, [[{"role": "system", "content": "x"}, {"role": "user", "content": "hi"}]], "all"
    )
    text = [token for token, template in zip(chat.tokens, chat.template, strict=True) if not template]
    assert "".join(text).endswith("user\nhi") and chat.text == "hi", "a system turn of one's own is not the template's"


def test_top_tokens_are_the_heaviest(model, tokenizer):
    (reading,) = read_texts(model, tokenizer, ["good morning"], "mood")
    for slot, weights in ((None, reading.token_weights), (2, reading.weights[2])):
        top = reading.top_tokens(3, slot)
        assert [weight for _, weight in top] == pytest.approx(sorted(weights, reverse=True)[:3])
        assert all(weights[position] == weight for position, weight in top)


def test_verdicts(model, tokenizer):
    found = {name: read_texts(model, tokenizer, ["good morning"], name)[0] for name in model.active_probes}
    label = found["mood"].label
    assert found["mood"].verdict == f"{label} ({found['mood'].probabilities[label]:.0%})"
    assert found["several"].label == [n for n, value in found["several"].probabilities.items() if value >= 0.5]
    model.probes["several"].config.threshold = [0.0, 1.0, 0.0]
    (several,) = read_texts(model, tokenizer, ["good morning"], "several")
    first, third = (f"{name} ({several.probabilities[name]:.0%})" for name in ("LABEL_0", "LABEL_2"))
    assert several.verdict == f"{first}, {third}"
    model.probes["several"].config.threshold = 1.0
    assert read_texts(model, tokenizer, ["good morning"], "several")[0].verdict == "no label"
    assert found["value"].verdict == f"LABEL_0 {found['value'].label[0]:.3g}"


def test_weights_that_say_little_are_noted(model, tokenizer):
    def note(head):
        return read_texts(model, tokenizer, ["good morning"], head)[0].note

    assert note("mood") is None and note("all") is None
    assert "takes the mean" in note("value")
    model.probes["value"].config.pool = "max"
    assert "largest value" in note("value")
    torch.nn.init.zeros_(next(p for n, p in model.probes["all"].named_parameters() if "token" in n))
    assert "not learned where to look" in note("all")


def test_a_scale_does_not_blow_up_small_differences(model, tokenizer):
    (reading,) = read_texts(model, tokenizer, ["good morning"], "value")
    assert reading.even_share == pytest.approx(1 / len(reading.tokens))
    assert reading.scale_end(reading.token_weights) == pytest.approx(2 * reading.even_share)
    assert reading.scale_end(np.array([0.1, 0.9])) == 0.9


def test_errors(model, tokenizer):
    with pytest.raises(ProbeError, match=r"head=None.*mood, all, several, value"):
        read_texts(model, tokenizer, ["x"])
    with pytest.raises(ProbeError, match="head='other'"):
        read_texts(model, tokenizer, ["x"], "other")
    model.add_probe("raw", make_probe(prompt_format="raw"))
    with pytest.raises(ProbeError, match="an empty text"):
        read_texts(model, tokenizer, [""], "raw")


def test_bytes_that_make_no_character(tokenizer):
    ids = tokenizer("日")["input_ids"]
    assert token_texts(tokenizer, ids[:2]) == ["\ufffd", "\ufffd"]
    assert token_texts(tokenizer, [*ids[:2], *tokenizer("ab")["input_ids"]]) == ["\ufffd", "\ufffd", "a", "b"]


def test_spaces_of_sentencepiece_are_kept():
    vocab = {token: i for i, token in enumerate(["<unk>", "▁good", "▁", "morn", "ing"])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=False))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    assert token_texts(tokenizer, [1, 2, 3, 4]) == [" good", " ", "morn", "ing"]


def test_visible():
    assert printable("a\nb\tc") == "a⏎b⇥c"
    assert printable("x\u202eabc\u200b\x07") == "x\\u202eabc\\u200b\\u0007", "what moves or hides text is spelled out"
    assert printable("日本 é 👩\u200d👧 שלום") == "日本 é 👩\u200d👧 שלום"
