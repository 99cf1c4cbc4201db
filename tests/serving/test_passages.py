"""From spans of tokens to characters of what the user wrote."""

from types import SimpleNamespace

import pytest
from conftest import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_probe import ProbeError
from llama_probe.data.prompts import PromptFormat
from llama_probe.serving.passages import locate


TOKENIZER = make_tokenizer()  # of bytes
CHAT = PromptFormat(TOKENIZER)
MESSAGE = "<bos>{{ message['role'] }}\n%s<eos>\n"
TEMPLATES = {
    "strips": "{% for message in messages %}" + MESSAGE % "{{ message['content'] | trim }}" + "{% endfor %}",
    "quotes": "{% for message in messages %}" + MESSAGE % "{{ message['content'] | tojson }}" + "{% endfor %}",
    "date": "Today is {{ messages | length }}.{% for message in messages %}"
    + MESSAGE % "{{ message['content'] }}"
    + "{% endfor %}",
}


def formatted(template: str, **fields) -> PromptFormat:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    return PromptFormat(tokenizer, **fields)


def turn(content, role="user"):
    return {"role": role, "content": content}


def span_of(ids, words):
    """The place of the tokens that are read as these words."""
    tokens = TOKENIZER(words, add_special_tokens=False)["input_ids"]
    places = [place for place in range(len(ids)) if ids[place : place + len(tokens)] == tokens]
    assert len(places) == 1, "or the test does not say which"
    return places[0], places[0] + len(tokens)


def found(prompts, text, words, before=0, behind=0):
    """The passage of the tokens of these words, and of so many tokens around them."""
    (ids,) = prompts.encode([text])
    first, end = span_of(ids, words)
    (passage,) = locate(prompts, text, ids, {"bad": (first - before, end + behind)})
    assert passage.pop("label") == "bad"
    return passage


def test_a_passage_of_a_text():
    text = "First, something kind. Then the bad part, and more."
    passage = found(CHAT, text, "the bad part")
    assert passage == {"start": 28, "end": 40, "text": "the bad part"} and text[28:40] == "the bad part"
    wider = found(CHAT, text, "the bad part", before=1, behind=2)
    assert wider == {"start": 28, "end": 41, "text": "the bad part,"}, "white space around it is left out"
    assert found(formatted("date"), text, "First,")["start"] == 0
    raw = PromptFormat(TOKENIZER, "raw")
    assert found(raw, text, "the bad part") == passage
    assert found(PromptFormat(make_tokenizer(adds_bos=True), "raw"), text, "the bad part") == passage
    assert found(PromptFormat(make_tokenizer(adds_bos=True), "raw"), f"<bos>{text}", "the bad part")["start"] == 33


def test_labels_have_passages_of_their_own():
    (ids,) = CHAT.encode(["one two"])
    spans = {"a": span_of(ids, "one"), "b": span_of(ids, "two")}
    assert [(each["label"], each["text"]) for each in locate(CHAT, "one two", ids, spans)] == [
        ("a", "one"),
        ("b", "two"),
    ]
    assert locate(CHAT, "one two", ids, {}) == []


@pytest.mark.parametrize("system_prompt", [None, "Be brief, user."])
def test_a_passage_of_a_chat(system_prompt):
    """Messages are counted as the user gave them, and characters in the content of the message."""
    prompts = PromptFormat(TOKENIZER, system_prompt=system_prompt)
    chat = [
        turn("Hello"),
        turn("Yes?", "assistant"),
        turn("user"),
        turn("Go on", "assistant"),
        turn("Now the bad part"),
    ]
    assert found(prompts, chat, "the bad part") == {"start": 4, "end": 16, "message": 4, "text": "the bad part"}
    assert found(prompts, chat, "Hello") == {"start": 0, "end": 5, "message": 0, "text": "Hello"}
    # "user" is a role, and in one case in the system prompt, before it is a content
    assert found(prompts, chat, "\nuser<eos>") == {"start": 0, "end": 4, "message": 2, "text": "user"}


def test_a_window_is_cut_to_the_message():
    chat = [turn("Hello there"), turn("Yes?", "assistant"), turn("bad")]
    assert found(CHAT, chat, "Hello there", before=4) == {"start": 0, "end": 11, "message": 0, "text": "Hello there"}
    assert found(CHAT, chat, "bad", before=9, behind=9) == {"start": 0, "end": 3, "message": 2, "text": "bad"}
    # over two messages: the one with more of it
    assert found(CHAT, chat, "there<eos>\n<bos>assistant\nYes")["message"] == 0
    assert found(CHAT, chat, "re<eos>\n<bos>assistant\nYes?")["text"] == "Yes?"
    nowhere = found(CHAT, chat, "Be kind.")
    assert nowhere == {"start": None, "end": None, "message": None, "text": "Be kind."}, (
        "the template's own system prompt"
    )


def test_templates_that_write_a_content_in_another_way():
    text = "  bad part  "
    assert found(formatted("strips"), text, "bad part") == {"start": 2, "end": 10, "text": "bad part"}
    assert found(formatted("quotes"), "bad part", "bad part") == {"start": 0, "end": 8, "text": "bad part"}
    quoted = found(formatted("quotes"), 'the "bad" part', 'bad\\" part')
    assert quoted == {"start": None, "end": None, "text": 'bad\\" part'}
    chat = [turn([{"type": "text", "text": "Hello"}]), turn("bad")]
    assert found(formatted("quotes"), chat, "bad") == {"start": 0, "end": 3, "message": 1, "text": "bad"}
    assert found(formatted("quotes"), chat, "Hello")["start"] is None


def test_texts_that_were_cut():
    text = "something kind, and the bad part, and a long tale " + "on and on " * 20
    prompts = PromptFormat(TOKENIZER, max_length=110)
    assert found(prompts, text, "the bad part") == {"start": 20, "end": 32, "text": "the bad part"}
    chat = [turn("a long tale " * 20), turn("Yes?", "assistant"), turn("the bad part")]
    assert len(prompts.encode([chat])[0]) < len(CHAT.encode([chat])[0])
    assert found(prompts, chat, "the bad part") == {"start": 0, "end": 12, "message": 2, "text": "the bad part"}


def test_characters_of_several_tokens_are_whole():
    passage = found(CHAT, "ein schönes Café", "Caf", behind=1)
    assert passage == {"start": 12, "end": 16, "text": "Café"}
    assert found(CHAT, "naïve 你 word", "word", before=2) == {"start": 6, "end": 12, "text": "你 word"}


def test_a_text_that_is_a_tools():
    marker = {"ids": [1], "skip": 0}
    markers = {"tool": marker, "user": marker, "assistant": marker}
    prompts = PromptFormat(TOKENIZER, text_role="tool", turn_markers=markers)
    assert found(prompts, "The mail: the bad part", "the bad part") == {"start": 10, "end": 22, "text": "the bad part"}


def test_what_cannot_be_located():
    (ids,) = CHAT.encode(["one two"])
    with pytest.raises(ProbeError, match="token ids"):
        locate(CHAT, "three four", ids, {"a": (0, 2)})
    slow = SimpleNamespace(tokenizer=SimpleNamespace(is_fast=False))
    with pytest.raises(ProbeError, match="fast tokenizer"):
        locate(slow, "one two", ids, {"a": (0, 2)})


CONTENTS = st.text(st.sampled_from("ab \né你<>\"'{}user"), max_size=12)


@settings(max_examples=100, deadline=None)
@given(st.lists(CONTENTS, min_size=1, max_size=5), st.booleans(), st.data())
def test_any_span_of_any_chat(contents, is_stripped, data):
    """The tokens of a part of a message are found as this part."""
    prompts = formatted("strips") if is_stripped else CHAT
    chat = [turn(content, "assistant" if number % 2 else "user") for number, content in enumerate(contents)]
    message = data.draw(st.integers(0, len(chat) - 1))
    content = contents[message]
    first = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(first, len(content)))
    part = content[first:end]
    if not part.strip():
        return
    (ids,) = prompts.encode([chat])
    # Tokens are bytes: those before the content are all but those of a chat that begins with the content and what follows.
    count = [len(TOKENIZER(each, add_special_tokens=False)["input_ids"]) for each in (content[:first], part)]
    marked = [*chat[:message], turn("\ue005" + content, chat[message]["role"]), *chat[message + 1 :]]
    (with_mark,) = prompts.encode([marked])
    mark = TOKENIZER("\ue005", add_special_tokens=False)["input_ids"]
    place = next(i for i in range(len(with_mark)) if with_mark[i : i + len(mark)] == mark)
    cut = len(content) - len(content.lstrip()) if is_stripped else 0
    start = place + count[0] - len(content[:cut].encode())
    stop = start + count[1]
    if is_stripped and (first < cut or end > len(content.rstrip())):
        return
    (passage,) = locate(prompts, chat, ids, {"bad": (start, stop)})
    assert passage["message"] == message and passage["text"] == part.strip()
    assert content[passage["start"] : passage["end"]] == part.strip()
