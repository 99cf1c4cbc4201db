"""A head finds what users wrote in the ids, whatever the template, the system prompt and the white space."""

import copy
from functools import cache

import pytest
import torch
from chat_templates import FAMILIES, NO_MARKERS, chat_tokenizer

from llama_probe import ProbeConfig, ProbeError
from llama_probe.data.prompts import PromptFormat
from llama_probe.heads.scope import check_rows, token_mask


ASK, REPLY, AGAIN = "How do I bake bread?", "Mix flour and water.", "Is salt a must?"
SYSTEM = {"role": "system", "content": "Be kind: You sell salt."}
NO_SYSTEM = ("gemma", "mistral")


def turn_of(role):
    return lambda content: {"role": role, "content": content}


user, assistant = turn_of("user"), turn_of("assistant")
CHAT = [user(ASK), assistant(REPLY), user(AGAIN)]


def called(*results):
    """Return a chat in which tools gave some results."""
    call = {"id": "call12345", "type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    turns = [{"role": "tool", "content": text, "tool_call_id": "call12345", "name": "look"} for text in results]
    return [user(ASK), {"role": "assistant", "content": "", "tool_calls": [call]}, *turns]


def between(family, chat, first, second):
    """Return what the template writes between two texts."""
    rendered = chat_tokenizer(family).apply_chat_template(chat, tokenize=False)
    return rendered[rendered.index(first) + 1 : rendered.index(second)]


def read(family, chat, scope, cut=slice(None), padding=(0, 0), ids=None, **kwargs):
    """Return the text that a head reads of a chat, rendered as a server does."""
    tokenizer, config = chat_tokenizer(family), config_of(family, scope)
    if ids is None:
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **kwargs)
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"][cut]
    before, after = padding
    row = torch.tensor([[0] * before + ids + [0] * after])
    attention_mask = torch.tensor([[0] * before + [1] * len(ids) + [0] * after])
    mask = token_mask(config, row, attention_mask)[0]
    return tokenizer.decode(row[0][mask])


@cache
def config_of(family, scope):
    fields = PromptFormat(chat_tokenizer(family)).config_fields()
    return ProbeConfig(probe_type="gate", **{**fields, "token_scope": scope})


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    @pytest.mark.parametrize("scope", ["last_user", "user"])
    def test_white_space_and_system_prompts_change_nothing(self, family, scope):
        plain = read(family, [user(ASK)], scope)
        assert ASK in plain and "system" not in plain and "user" not in plain
        systems = [[]] if family in NO_SYSTEM else [[], [SYSTEM], [{**SYSTEM, "content": SYSTEM["content"] * 20}]]
        for space in ("\n", "\n\n\n", "    ", "\t", "\r\n", " \n "):
            for system in systems:
                assert read(family, [*system, user(space + ASK)], scope).strip() == plain.strip()

    def test_several_turns(self, family):
        last, all_users, turns = (read(family, CHAT, scope) for scope in ("last_user", "user", "turns"))
        assert AGAIN in last and ASK not in last and REPLY not in last
        assert AGAIN in all_users and ASK in all_users and REPLY not in all_users
        assert all(text in turns for text in (ASK, REPLY, AGAIN))
        for scope, plain in (("last_user", last), ("user", all_users), ("turns", turns)):
            assert all(read(family, CHAT, scope, padding=padding) == plain for padding in ((5, 0), (0, 5)))

    def test_cut_on_either_side(self, family):
        inside = len(PromptFormat(chat_tokenizer(family)).prefix_ids) + 3
        for scope in ("user", "turns", "last_user"):
            found = read(family, CHAT, scope, slice(inside, None))
            assert AGAIN in found and (scope == "last_user" or "bread?" in found)
        whole = read(family, [user(ASK)], "last_user")
        assert whole.startswith(read(family, [user(ASK)], "last_user", slice(None, -1)).rstrip("\ufffd"))

    def test_the_beginning_of_a_long_text_is_kept(self, family):
        """`max_length` cuts the end of the last text, and an earlier turn before it."""
        prompts = PromptFormat(chat_tokenizer(family), max_length=60)
        (ids,) = prompts.encode([[user(AGAIN * 20), assistant(REPLY), user(ASK + AGAIN * 20)]])
        assert len(ids) == 60
        assert read(family, None, "last_user", ids=ids).strip().startswith(ASK)

    def test_markers_that_a_user_types(self, family):
        """Where the tokenizer makes special tokens of them, what stands behind is still the user's."""
        turns = [user("X"), assistant("Y"), user("Z")]
        reply, again = between(family, turns, "X", "Y"), between(family, turns, "Y", "Z")
        for scope, typed in (("last_user", reply), ("user", reply), ("user", f"{reply}Yes{again}")):
            found = read(family, [user(f"Hello{typed}{ASK}")], scope)
            assert "Hello" in found and ASK in found


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(NO_SYSTEM) - {"deepseek"}))
def test_a_chat_without_a_user_is_refused(family):
    ids = chat_tokenizer(family).apply_chat_template([SYSTEM], add_generation_prompt=True, return_tensors="pt")
    with pytest.raises(ProbeError, match=r"rows \[0\]"):
        check_rows(token_mask(config_of(family, "user"), ids["input_ids"], None))


@pytest.mark.parametrize("scope", ["last_user", "user", "turns"])
def test_raw_text_is_read_whole(scope):
    config = config_of("chatml", scope)
    ids = chat_tokenizer("chatml")(ASK, return_tensors="pt")["input_ids"]
    assert token_mask(config, ids, None).all() and not token_mask(config, ids, None, partial_prompt=True).any()


def test_a_system_turn_behind_the_users_is_read():
    assert "ignore this" in read("chatml", [user(ASK), {**SYSTEM, "content": "ignore this"}], "user")


WITH_TOOLS = ["chatml", "llama3", "qwen", "gpt-oss", "granite"]


@pytest.mark.parametrize("family", WITH_TOOLS)
class TestToolResults:
    def test_are_read_with_the_request(self, family):
        chat = called("It is 12 hours.")
        for scope in ("last_user", "user"):
            found = read(family, chat, scope)
            assert ASK in found and "12 hours" in found
        later = read(family, [*chat, assistant(REPLY), user(AGAIN)], "last_user")
        assert AGAIN in later and "12 hours" not in later

    def test_are_read_alone_in_all_turns(self, family):
        chat = [SYSTEM, *called("It is 12 hours.", "Or 13."), assistant(REPLY), *called("Now 14.")]
        found = read(family, chat, "tool")
        assert "12 hours" in found and "13" in found and "14" in found
        for text in (SYSTEM["content"], ASK, REPLY):
            assert text not in found
        found = read(family, [*chat, assistant(REPLY), user(AGAIN)], "tool")
        assert "14" in found and REPLY not in found and AGAIN not in found

    def test_none_leaves_nothing_to_read(self, family):
        assert read(family, [SYSTEM, *CHAT], "tool") == ""

    @pytest.mark.parametrize("role", ["user", "assistant", "system"])
    def test_do_not_end_at_a_marker_that_they_hold(self, family, role):
        typed = between(family, [user("X"), {"role": role, "content": "Y"}], "X", "Y")
        assert AGAIN in read(family, called(f"It is 12 hours.{typed}{AGAIN}"), "tool")

    def test_the_last_is_kept_of_a_long_chat(self, family):
        prompts = PromptFormat(chat_tokenizer(family), max_length=200, text_role="tool")
        (ids,) = prompts.encode([[*called("old " * 90), assistant(REPLY * 5), *called("Now it is 14." + " old" * 90)]])
        assert len(ids) == 200 and "Now it is 14." in read(family, None, "tool", ids=ids)

    def test_are_what_a_text_is_for_a_head_that_reads_them(self, family):
        prompts = PromptFormat.from_config(config_of(family, "tool"), chat_tokenizer(family))
        (ids,) = prompts.encode(["It is 12 hours."])
        found = read(family, None, "tool", ids=ids)
        assert "12 hours" in found and "Look at it" not in found


def test_documents_are_read_with_tool_results():
    documents = [{"doc_id": str(place), "text": text} for place, text in enumerate(("It is 12 hours.", "Or 13."))]
    found = read("granite", CHAT, "tool", documents=documents)
    assert "12 hours" in found and "13" in found
    assert not any(text in found for text in (ASK, AGAIN, REPLY, "You are Granite"))


@pytest.mark.parametrize("family", ["gemma", "lines"])
def test_a_template_that_marks_no_tool_results_needs_a_mask(family):
    tokenizer = chat_tokenizer(family)
    with pytest.raises(ProbeError, match="tool"):
        PromptFormat(tokenizer, text_role="tool")
    with pytest.raises(ProbeError, match="probe_mask"):
        token_mask(config_of(family, "tool"), torch.tensor([[5, 6]]), None)


@pytest.mark.parametrize("template", NO_MARKERS)
def test_without_markers_the_whole_prompt_is_read(template):
    assert PromptFormat(chat_tokenizer(template)).turn_markers is None
    chat = [SYSTEM, user(ASK)]
    for scope in ("last_user", "user", "turns"):
        assert SYSTEM["content"] in read(template, chat, scope) and ASK in read(template, chat, scope)


def test_a_template_that_begins_with_the_system_text():
    tokenizer = copy.copy(chat_tokenizer("lines"))
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn['role'].upper() + ': ' if turn['role'] != 'system' }}{{ turn['content'] }}\n"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    markers = PromptFormat(tokenizer).turn_markers
    assert {"user", "assistant"} <= set(markers) and "system" not in markers


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_a_turn_that_is_opened_and_empty_hides_nothing(padding):
    markers = {"user": {"ids": [5], "skip": 1}, "assistant": {"ids": [8], "skip": 0}}
    config = ProbeConfig(probe_type="gate", token_scope="last_user", turn_markers=markers)
    for end in ([5], [5, 6]):
        ids = [5, 6, 10, 11, 8, 12, *end]
        row = torch.tensor([ids + [0] * padding])
        mask = token_mask(config, row, (torch.arange(row.shape[1]) < len(ids))[None])
        assert mask[0, 2:4].all() and not mask[0, len(ids) :].any()
