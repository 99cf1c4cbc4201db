"""Prompts are the same in training and in serving, have one BOS token and are cut to a length."""

import logging

import pytest
import torch
from conftest import make_tokenizer

from llama_probe import ProbeConfig, ProbeError
from llama_probe.backbone.fingerprint import template_hash
from llama_probe.data.prompts import PromptFormat, is_text


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def served(tokenizer, text, **kwargs):
    """What a user of transformers sends to generate()."""
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, **kwargs)["input_ids"]


@pytest.mark.parametrize("text", ["Hello", " spaced ", "<bos>", "naïve 你好", "x" * 300])
def test_training_prompts_are_serving_prompts(tokenizer, text):
    assert PromptFormat.create(tokenizer).encode([text]) == [served(tokenizer, text)]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_constant_parts_are_found(adds_bos):
    tokenizer = make_tokenizer(adds_bos)
    prompts = PromptFormat.create(tokenizer)
    begin = tokenizer("<bos>system\nBe kind.<eos>\n<bos>user\n", add_special_tokens=False)["input_ids"]
    end = tokenizer("<eos>\n<bos>assistant\n", add_special_tokens=False)["input_ids"]
    assert list(prompts.prefix_ids) == begin and list(prompts.suffix_ids) == end
    raw = PromptFormat.create(tokenizer, "raw")
    assert list(raw.prefix_ids) == ([tokenizer.bos_token_id] if adds_bos else [])
    assert raw.suffix_ids == ()


def test_there_is_never_a_second_bos():
    tokenizer = make_tokenizer(adds_bos=True)
    bos = tokenizer.bos_token_id
    assert PromptFormat.create(tokenizer).encode(["Hello"])[0][:2].count(bos) == 1
    for text in ("Hello", "<bos>Hello"):
        assert PromptFormat.create(tokenizer, "raw").encode([text])[0].count(bos) == 1


@pytest.mark.parametrize("kind", ["chat", "raw"])
def test_one_prompt_is_not_a_list_of_prompts(tokenizer, kind):
    prompts = PromptFormat.create(tokenizer, kind)
    for single in ("Hello", TestReplies.chat, TestReplies.chat[0], {"text": "Hello"}):
        for take in (prompts.encode, prompts.encode_replies, prompts.batch):
            with pytest.raises(ProbeError, match="must be a list of prompts"):
                take(single)


@pytest.mark.parametrize("kind", ["chat", "raw"])
@pytest.mark.parametrize("wrong", [None, [], 5, ["Hello"], [{"content": "Hello"}], float("nan")])
def test_values_that_are_not_prompts(tokenizer, kind, wrong):
    prompts = PromptFormat.create(tokenizer, kind, **({"system_prompt": "Be brief."} if kind == "chat" else {}))
    for take in (prompts.encode, prompts.encode_replies, prompts.batch):
        with pytest.raises(ProbeError, match="must be a text, or chat messages"):
            take(["Hello", wrong] if take != prompts.encode_replies else [wrong])


def test_an_empty_batch(tokenizer):
    with pytest.raises(ProbeError, match="texts="):
        PromptFormat.create(tokenizer).batch([])
    assert PromptFormat.create(tokenizer).encode([]) == []


def test_own_system_prompt(tokenizer):
    prompts = PromptFormat.create(tokenizer, system_prompt="Be brief.")
    prefix = tokenizer.decode(prompts.prefix_ids)
    assert "Be brief." in prefix and "Be kind." not in prefix
    chat = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Hi"}]
    assert "Be brief." not in tokenizer.decode(prompts.encode([chat])[0])


class TestReplies:
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]

    def test_they_follow_the_prompt_as_it_is_served(self, tokenizer):
        ids, masks = PromptFormat.create(tokenizer).encode_replies([self.chat])
        prompt = served(tokenizer, "Hello")
        assert ids == [[*prompt, *tokenizer("Good day")["input_ids"]]], "what generate() had read when it was complete"
        assert masks == [[False] * len(prompt) + [True] * 8]

    def test_raw(self):
        tokenizer = make_tokenizer(adds_bos=True)
        ids, masks = PromptFormat.create(tokenizer, "raw").encode_replies([self.chat])
        assert tokenizer.decode(ids[0]) == "<bos>HelloGood day" and sum(masks[0]) == 8

    @pytest.mark.parametrize(
        "prompt, reply, kept",
        [("x" * 9, "y" * 90, (9, 26)), ("x" * 90, "y" * 3, (32, 3)), ("x" * 90, "y" * 90, (17, 18))],
    )
    def test_both_are_cut(self, tokenizer, prompt, reply, kept):
        constant = len(served(tokenizer, ""))
        prompts = PromptFormat.create(tokenizer, max_length=constant + 35)
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        (ids,), (mask,) = prompts.encode_replies([chat])
        text = tokenizer.decode(ids)
        assert (text.count("x"), sum(mask)) == kept and len(ids) == constant + 35
        assert text.rstrip("y").endswith("<eos>\n<bos>assistant\n")

    def test_what_a_head_reads(self, tokenizer):
        prompts = PromptFormat.create(tokenizer)
        ids, masks = prompts.encode_replies([self.chat])
        assert prompts.encode_for(ProbeConfig(token_scope="response"), [self.chat]) == (ids, masks, [sum(masks[0])])
        assert prompts.encode_for(ProbeConfig(token_scope="all"), [self.chat]) == (ids, None, [sum(masks[0])])
        assert prompts.encode_for(ProbeConfig(), ["Hello"]) == (prompts.encode(["Hello"]), None, None)

    @pytest.mark.parametrize(
        "text", ["Hello", chat[:1], chat[1:], [*chat, chat[0]], [chat[0], {**chat[1], "content": " "}]]
    )
    def test_a_row_without_one(self, tokenizer, text):
        with pytest.raises(ProbeError, match="needs rows with a prompt and a reply"):
            PromptFormat.create(tokenizer).encode_replies([text])


def test_truncation_keeps_the_templates_end_and_is_reported(tokenizer, caplog):
    prompts = PromptFormat.create(tokenizer, max_length=60)
    logger = logging.getLogger("llama_probe.data.prompts")
    logger.addHandler(caplog.handler)
    try:
        short, long = prompts.encode(["Hi", "a" * 200])
    finally:
        logger.removeHandler(caplog.handler)
    assert len(long) == 60 and len(short) < 60
    assert tuple(long[-len(prompts.suffix_ids) :]) == prompts.suffix_ids
    assert tuple(long[: len(prompts.prefix_ids)]) == prompts.prefix_ids
    assert "1 of 2 prompts were cut to max_length=60 tokens" in caplog.text


def test_batches_are_ready_for_generate(tokenizer):
    prompts = PromptFormat.create(tokenizer)
    batch = prompts.batch(["Hi", "Hello there"])
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][:, -1].all()
    row = batch["input_ids"][0][batch["attention_mask"][0].bool()]
    assert row.tolist() == served(tokenizer, "Hi")
    assert torch.equal(
        prompts.batch(["Hi", "Hello there"], "right")["attention_mask"], batch["attention_mask"].flip(1)
    )


@pytest.mark.parametrize("side", ["middle", None, "LEFT"])
def test_wrong_padding_side(tokenizer, side):
    with pytest.raises(ProbeError, match="padding_side="):
        PromptFormat.create(tokenizer).batch(["Hello"], padding_side=side)


def test_the_config_brings_the_format_back(tokenizer):
    prompts = PromptFormat.create(tokenizer, max_length=99, system_prompt="Be brief.")
    config = ProbeConfig(probe_type="gate", **prompts.config_fields())
    assert config.chat_template_hash == template_hash(tokenizer)
    back = PromptFormat.from_config(config, tokenizer)
    assert back == prompts


def test_is_text():
    turn = {"role": "user", "content": "x"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert all(
        map(is_text, ["", [turn], [turn, call], [{"role": "user", "content": [{"type": "text", "text": "x"}]}]])
    )
    wrong = [None, 1, [], ["x"], [{"role": "user"}], [turn, {"role": "user", "content": None, "tool_calls": None}]]
    wrong += [[{"role": None, "content": "x"}], "half \ud83d", [{"role": "user", "content": "\udcff"}]]
    assert not any(map(is_text, wrong))


@pytest.mark.parametrize("kind", ["chat", "raw"])
def test_lone_surrogates(tokenizer, kind):
    with pytest.raises(ProbeError, match=r"'\\ud83d'"):
        PromptFormat.create(tokenizer, kind).encode(["whole", "half \ud83d"])


def test_turns_that_the_template_cannot_render(tokenizer):
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['role'] + ': ' + turn['content'] }}{% endfor %}"
    for chat in ([{"role": "user", "content": None}], [{"role": "user", "content": [{"type": "text", "text": "x"}]}]):
        with pytest.raises(ProbeError, match="chat template"):
            PromptFormat.create(tokenizer).encode([chat])


def test_refusals(tokenizer):
    for values, field in (
        ({"kind": "xml"}, "prompt_format"),
        ({"max_length": 10}, "max_length"),
        ({"kind": "raw", "system_prompt": "x"}, "system_prompt"),
    ):
        with pytest.raises(ProbeError, match=field):
            PromptFormat.create(tokenizer, **values)
    with pytest.raises(ProbeError, match="prompt_format"):
        PromptFormat.create(tokenizer, "raw").encode([[{"role": "user", "content": "x"}]])
    tokenizer.chat_template = None
    with pytest.raises(ProbeError, match="no chat template"):
        PromptFormat.create(tokenizer)
