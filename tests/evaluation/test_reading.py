"""Readings: the weights of a head beside the tokens that they belong to."""

import pytest
from conftest import make_lm, make_probe, make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llama_probe import AutoModelForProbedGeneration, ProbeError
from llama_probe.data.prompts import PromptFormat
from llama_probe.evaluation.reading import read_weights, token_texts
from llama_probe.heads import Aggregator, get_probe_type


TEXTS = ["good morning", "日本語 🎉 é\n\tbye"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    content = PromptFormat(tokenizer).config_fields() | {"token_scope": "content"}
    heads = {
        "mood": make_probe(probe_type="mha", id2label={0: "fine", 1: "awful"}, **content),
        "all": make_probe(seed=1, probe_type="gate", layers=[1, 3]),
        "value": make_probe(seed=3, probe_type="pooling", num_labels=1, problem_type="regression"),
    }
    return AutoModelForProbedGeneration.from_causal_lm(make_lm(vocab_size=260), heads)


@pytest.fixture
def read(model, tokenizer):
    def read(text, head):
        model.set_active_probes([head])
        return read_weights(model, tokenizer, [text])[0]

    return read


@pytest.mark.parametrize("head", ["mood", "all"])
def test_weights_are_those_of_classify(model, tokenizer, head):
    batch = PromptFormat.from_config(model.probes[head].config, tokenizer).batch(TEXTS)
    expected = model.classify(**batch, output_attentions=True)[head]
    model.set_active_probes([head])
    for row, reading in enumerate(read_weights(model, tokenizer, TEXTS)):
        real = batch["attention_mask"][row].bool()
        assert reading.weights == pytest.approx(expected.token_weights[row][:, real].numpy(), abs=1e-5)
        assert reading.layer_weights == pytest.approx(expected.layer_weights[row].numpy(), abs=1e-5)
        assert list(reading.prediction["scores"].values()) == pytest.approx(
            expected.probabilities[row].tolist(), abs=1e-5
        )
        assert (reading.prediction["label"], reading.text, reading.head) == (expected.labels[row], TEXTS[row], head)
        assert reading.weights.sum(axis=1) == pytest.approx(1) and reading.token_weights.sum() == pytest.approx(1)
        assert (len(reading.layer_weights), len(reading.tokens)) == reading.weights.shape


def test_tokens_join_into_the_prompt(read, tokenizer):
    reading, messages = read(TEXTS[1], "mood"), [{"role": "user", "content": TEXTS[1]}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "".join(reading.tokens) == rendered
    start = reading.tokens.index("日")
    assert reading.tokens[start : start + 4] == ["日", "", "", "本"], "three tokens of one byte each"


def test_what_is_not_read_and_what_is_not_text(model, read):
    def text_of(reading):
        pairs = zip(reading.tokens, reading.template, strict=True)
        return "".join(token for token, template in pairs if not template)

    reading, prefix = read("hi", "mood"), len(model.probes["mood"].config.prefix_ids)
    assert reading.counted == [False] * prefix + [True] * (len(reading.tokens) - prefix)
    assert not reading.weights[:, :prefix].any() and text_of(reading) == "hi"
    whole = read("hi", "all")
    assert all(whole.counted) and whole.template == reading.template
    chat = read([{"role": "system", "content": "x"}, {"role": "user", "content": "hi"}], "all")
    assert text_of(chat).endswith("user\nhi") and chat.text == "hi", "a system turn is not the template's"


def test_heads_that_cannot_be_read(model, tokenizer, read, monkeypatch):
    with pytest.raises(ProbeError, match="mood, all"):
        read_weights(model, tokenizer, ["x"])
    monkeypatch.setattr(get_probe_type("gate"), "weights", Aggregator.weights)  # as a head type of one's own may be
    with pytest.raises(ProbeError, match="'gate'"):
        read("x", "all")


def test_spaces_of_sentencepiece_are_kept():
    vocab = {token: i for i, token in enumerate(["<unk>", "▁good", "▁", "morn", "ing"])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=False))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    assert token_texts(tokenizer, [1, 2, 3, 4]) == [" good", " ", "morn", "ing"]
