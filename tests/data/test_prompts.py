"""Prompts are the same in training and in serving, have one BOS token and are cut to a length."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
from chat_templates import FAMILIES, chat_tokenizer
from conftest import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llama_probe import ProbeConfig, ProbeError
from llama_probe.data.prompts import PromptFormat


CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def prompts():
    return PromptFormat(make_tokenizer())


def served(tokenizer, text):
    """Return the ids that a user of transformers sends to generate()."""
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize("text", [" spaced ", "<bos>", "naïve 你好"])
def test_training_prompts_are_serving_prompts(tokenizer, prompts, text):
    assert prompts.encode([text]) == [served(tokenizer, text)]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_constant_parts_have_one_bos(adds_bos):
    tokenizer = make_tokenizer(adds_bos)
    prompts, raw = PromptFormat(tokenizer), PromptFormat(tokenizer, "raw")
    begin = tokenizer("<bos>system\nBe kind.<eos>\n<bos>user\n", add_special_tokens=False)["input_ids"]
    end = tokenizer("<eos>\n<bos>assistant\n", add_special_tokens=False)["input_ids"]
    assert list(prompts.prefix_ids) == begin and list(prompts.suffix_ids) == end
    assert list(raw.prefix_ids) == [tokenizer.bos_token_id] * adds_bos and raw.suffix_ids == ()
    assert raw.encode(["<bos>Hello"])[0].count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("kind", ["chat", "raw"])
@pytest.mark.parametrize("take", ["encode", "encode_replies"])
def test_values_that_are_not_prompts(prompts, kind, take):
    take = getattr(replace(prompts, kind=kind), take)
    for single in ("Hello", CHAT, CHAT[0]):
        with pytest.raises(ProbeError, match="must be a list of prompts"):
            take(single)
    turns = [{"role": None, "content": "x"}, {"role": "user", "content": None}, {"role": "user", "content": "\udcff"}]
    for wrong in (None, [], ["Hello"], *([turn] for turn in turns), "half \ud83d"):
        with pytest.raises(ProbeError, match="must be a text"):
            take([wrong])


def test_prompts_that_cannot_be_encoded(tokenizer, prompts):
    with pytest.raises(ProbeError, match="prompt_format"):
        replace(prompts, kind="raw").encode([CHAT])
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    replies = call, {**call, "content": None}, *({**CHAT[1], "content": content} for content in (" ", ["parts"]))
    for text in ("Hello", CHAT[:1], [*CHAT, CHAT[0]], *([CHAT[0], reply] for reply in replies)):
        with pytest.raises(ProbeError, match="prompt and a reply"):
            prompts.encode_replies([text])
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['role'] + ': ' + turn['content'] }}{% endfor %}"
    with pytest.raises(ProbeError, match="chat template"):
        PromptFormat(tokenizer).encode([[{"role": "user", "content": ["parts"]}]])


def test_wrong_formats(tokenizer):
    with pytest.raises(ProbeError, match="max_length"):
        PromptFormat(tokenizer, max_length=10)
    with pytest.raises(ProbeError, match="system_prompt"):
        PromptFormat(tokenizer, "raw", system_prompt="x")
    tokenizer.chat_template = None
    with pytest.raises(ProbeError, match="no chat template"):
        PromptFormat(tokenizer)


def test_own_system_prompt(tokenizer):
    prompts = PromptFormat(tokenizer, system_prompt="Be brief.")
    prefix = tokenizer.decode(prompts.prefix_ids)
    assert "Be brief." in prefix and "Be kind." not in prefix
    (ids,) = prompts.encode([[{"role": "system", "content": "Mine."}, CHAT[0]]])
    assert "Be brief." not in tokenizer.decode(ids)


class TestReplies:
    def test_they_follow_the_prompt_as_it_is_served(self, tokenizer, prompts):
        ids, masks = prompts.encode_replies([CHAT])
        prompt = served(tokenizer, "Hello")
        assert ids == [[*prompt, *tokenizer("Good day")["input_ids"]]], "what generate() had read when it was complete"
        assert masks == [[False] * len(prompt) + [True] * 8]
        for scope, chat, expected in (
            ("response", CHAT, (ids, masks, [8])),
            ("all", CHAT, (ids, None, [8])),
            ("prompt", "Hello", (prompts.encode(["Hello"]), None, None)),
        ):
            rows = prompts.encode_for(ProbeConfig(token_scope=scope), [chat])
            assert (rows.prompts, rows.masks, rows.reply_lengths) == expected

    def test_raw(self):
        tokenizer = make_tokenizer(adds_bos=True)
        ids, masks = PromptFormat(tokenizer, "raw").encode_replies([CHAT])
        assert tokenizer.decode(ids[0]) == "<bos>HelloGood day" and sum(masks[0]) == 8

    @pytest.mark.parametrize(
        "prompt, reply, kept",
        [("x" * 9, "y" * 90, (9, 26)), ("x" * 90, "y" * 3, (32, 3)), ("x" * 90, "y" * 90, (17, 18))],
    )
    def test_both_are_cut(self, tokenizer, prompts, prompt, reply, kept):
        constant = len(served(tokenizer, ""))
        prompts = replace(prompts, max_length=constant + 35)
        (ids,), (mask,) = prompts.encode_replies([[{**CHAT[0], "content": prompt}, {**CHAT[1], "content": reply}]])
        text = tokenizer.decode(ids)
        assert (text.count("x"), sum(mask)) == kept and len(ids) == constant + 35
        assert text.rstrip("y").endswith("<eos>\n<bos>assistant\n")


def test_truncation_keeps_the_templates_end_and_is_reported(prompts, caplog):
    prompts = replace(prompts, max_length=60)
    short, long = prompts.encode(["Hi", "a" * 200])
    assert len(long) == 60 and len(short) < 60
    assert tuple(long[-len(prompts.suffix_ids) :]) == prompts.suffix_ids
    assert tuple(long[: len(prompts.prefix_ids)]) == prompts.prefix_ids
    assert "1 of 2 prompts were cut to max_length=60 tokens" in caplog.text


DOCUMENT = "Mix flour and water. How do I bake BAD bread?\n\nThen wait 12 hours."
ASKED = (21, 45)
SYSTEM, EARLIER = {"role": "system", "content": "Be kind."}, [CHAT[0], CHAT[1]]


def decoded(prompts, text, place, ids=None):
    """The request by its tokens."""
    (ids,) = prompts.encode([text]) if ids is None else [ids]
    (mask,) = prompts.request_masks([text], [place], [ids])
    assert len(mask) == len(ids)
    return prompts.tokenizer.decode([token for token, asked in zip(ids, mask, strict=True) if asked])


class TestRequests:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_their_tokens_are_those_of_their_characters(self, family):
        prompts = PromptFormat(chat_tokenizer(family))
        asked = DOCUMENT[slice(*ASKED)]
        assert decoded(prompts, DOCUMENT, (0, *ASKED)).strip() == asked
        assert decoded(prompts, DOCUMENT, (0, 0, len(DOCUMENT))).strip() == DOCUMENT
        chat = [*EARLIER, {"role": "user", "content": f"  {DOCUMENT}  "}]
        assert decoded(prompts, chat, (2, ASKED[0] + 2, ASKED[1] + 2)).strip() == asked
        assert decoded(prompts, [{"role": "user", "content": "  naïve 你é "}], (0, 8, 10)).strip() == "你é"

    def test_behind_a_system_turn_and_in_the_result_of_a_tool(self, prompts):
        asked = DOCUMENT[slice(*ASKED)]
        own = PromptFormat(make_tokenizer(), system_prompt="Be brief.")
        assert decoded(own, DOCUMENT, (0, *ASKED)) == asked
        assert decoded(own, [SYSTEM, CHAT[0]], (1, 0, 5)) == "Hello"
        tools = PromptFormat(chat_tokenizer("qwen"), text_role="tool")
        assert decoded(tools, DOCUMENT, (0, *ASKED)).strip() == asked
        quoted = PromptFormat(chat_tokenizer("gpt-oss"), text_role="tool")  # whose template writes results as JSON
        assert decoded(quoted, DOCUMENT, (0, *ASKED)).strip() == asked

    def test_raw(self):
        raw = PromptFormat(make_tokenizer(adds_bos=True), "raw")
        for text, first in ((DOCUMENT, 0), (f"<bos>{DOCUMENT}", 5)):
            assert decoded(raw, text, (0, ASKED[0] + first, ASKED[1] + first)) == DOCUMENT[slice(*ASKED)]

    @pytest.mark.parametrize("text", [DOCUMENT, [*EARLIER, {"role": "user", "content": DOCUMENT}]])
    def test_what_a_cut_leaves(self, prompts, text):
        place = (0 if isinstance(text, str) else 2, *ASKED)
        (whole,) = prompts.encode([text])
        for lost in (10, 20, 25, 40, 60):
            cut = replace(prompts, max_length=len(whole) - lost)
            (ids,) = cut.encode([text])
            _, found, behind = prompts.tokenizer.decode(ids).partition("How")
            left = (found + behind).partition("<eos>")[0]
            assert decoded(cut, text, place, ids) == left[: ASKED[1] - ASKED[0]]

    def test_where_they_are_not_known(self, prompts, monkeypatch):
        template = "{% for turn in messages %}{{ turn['content'] }}|{{ turn['content'] | upper }}{% endfor %}"
        twice = make_tokenizer()
        twice.chat_template = template
        for format, place in ((prompts, None), (PromptFormat(twice, turn_markers={}), (0, *ASKED))):
            ids = format.encode([DOCUMENT])
            assert format.request_masks([DOCUMENT], [place], ids) == [None]
        monkeypatch.setattr(type(prompts.tokenizer), "is_fast", False)
        assert prompts.request_masks([DOCUMENT], [(0, *ASKED)], prompts.encode([DOCUMENT])) == [None]

    def test_rows_to_learn_from(self, prompts, caplog):
        """A request that was cut off leaves a text without a request."""
        config = ProbeConfig(id2label={0: "bad", 1: "good"}, flagged=["bad"], window=8)
        short = replace(prompts, max_length=len(prompts.encode([DOCUMENT])[0]) - 50)
        places, labels = [(0, *ASKED), (0, 0, 3), None, (0, *ASKED)], np.array([0, 0, 0, 1])
        rows = short.encode_for(config, [DOCUMENT] * 4, labels, places)
        assert rows.labels.tolist() == [1, 0, 0, 1] and labels.tolist() == [0, 0, 0, 1]
        assert [sum(rows[row]["request_mask"]) for row in range(4)] == [0, 3, 0, 0]
        assert "2 texts have lost their request" in caplog.text
        assert "request_mask" not in short.encode_for(config.replace(window=0), [DOCUMENT], labels[:1], places[:1])[0]
        assert "request_mask" not in short.encode_for(config, [DOCUMENT], labels[:1])[0]
        several = ProbeConfig(problem_type="multi_label_classification", window=8)
        labels = np.array([[1.0, np.nan], [1.0, 1.0]], np.float32)
        rows = short.encode_for(several, [DOCUMENT] * 2, labels, places[:2])
        np.testing.assert_equal(rows.labels, [[0, np.nan], [1, 1]])


PARTS = ["the bread ", "w", "word", "    ", "\n", "☂", "<|im_end|>", "flour,", "Instructions"]


@pytest.fixture(scope="module")
def chatml():
    return PromptFormat(chat_tokenizer("chatml"))


@given(parts=st.lists(st.sampled_from(PARTS), min_size=1), max_length=st.integers(60, 99))
@settings(deadline=None, max_examples=8)
def test_a_long_text_is_cut_before_and_after_the_tokenizer_alike(chatml, parts, max_length):
    text = "".join(parts) * (4_000 // len("".join(parts)))
    prompts = replace(chatml, max_length=max_length)
    whole = prompts.encode([[{"role": "user", "content": text}]])  # of chats the tokenizer gets all
    with patch.object(PromptFormat, "_tokenize", autospec=True, side_effect=PromptFormat._tokenize) as tokenize:
        assert prompts.encode([text]) == whole
    assert all(len(call.args[1]) < 2_500 for call in tokenize.call_args_list)


def test_a_long_text_of_few_tokens_is_read_whole():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    prompts = PromptFormat(PreTrainedTokenizerFast(tokenizer_object=words), "raw", max_length=4)
    assert prompts.encode(["x" * 5_000 + " a b a b a"]) == [[0, 1, 2, 1]]


def test_the_config_brings_the_format_back(tokenizer, monkeypatch):
    prompts = PromptFormat(tokenizer, max_length=99, system_prompt="Be brief.")
    config = ProbeConfig(probe_type="gate", **prompts.config_fields())
    monkeypatch.setattr("llama_probe.data.prompts.learn_turn_markers", lambda render: pytest.fail("130 chats again"))
    markers = {"user": {"ids": [5], "skip": 0}, "assistant": {"ids": [6], "skip": 0}}
    own = config.replace(turn_markers=markers)
    other = PromptFormat.from_config(own.replace(chat_template_hash="another"), tokenizer)
    assert other == prompts, "of the tokenizer's own template, whose markers are known"
    assert PromptFormat.from_config(own, tokenizer) == replace(prompts, turn_markers=markers)
