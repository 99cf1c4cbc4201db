"""What stands around a text must not change a head's label, and a table says how often it does."""

import pytest
from conftest import make_lm, make_probe, make_tokenizer

from llama_probe import ProbeError
from llama_probe.data.prompts import PromptFormat
from llama_probe.evaluation.wrappings import kept_labels, wrap, wrappings


TEXTS = ["bake bread", "rob a bank", "write a poem", "sum two numbers", "a cold day"]


def make_head(**changes):
    prompts = PromptFormat.create(make_tokenizer())
    head = make_probe(**{"token_scope": "user", **prompts.config_fields(), **changes})
    head.set_backbone(make_lm(vocab_size=260))
    return head, prompts


def test_the_text_is_in_each_of_twelve_chats():
    prompts = PromptFormat.create(make_tokenizer())
    found = wrappings(prompts)
    assert len(found) == 12
    for turns in found.values():
        assert "bake bread" in prompts.render(wrap(turns, "bake bread"))
    assert prompts.render(wrap(found["system prompt in capitals"], "x")).count("BE KIND.") == 1


def test_a_template_without_system_turns_has_seven():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for turn in messages %}{% if turn.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "<bos>{{ turn.role }}\n{{ turn.content }}<eos>\n{% endfor %}<bos>assistant\n"
    )
    assert len(wrappings(PromptFormat.create(tokenizer))) == 7


def test_flagged_rows_are_wrapped_and_counted():
    head, prompts = make_head(threshold=0.0)  # flags everything
    found = kept_labels(head, TEXTS, prompts, most=3)
    assert found["rows"] == 3 and set(found["kept"].values()) == {1.0} and len(found["kept"]) == 12
    head, prompts = make_head(threshold=0.0, token_scope="last_user")
    assert "second turn" not in kept_labels(head, TEXTS, prompts)["kept"]


def test_a_head_that_reads_the_system_prompt_is_found_out():
    head, prompts = make_head(token_scope="prompt", num_labels=5)
    kept = kept_labels(head, TEXTS, prompts)["kept"]
    assert min(kept.values()) < 1


@pytest.mark.parametrize("changes", [{"threshold": 1.0}, {"token_scope": "response"}])
def test_nothing_to_wrap(changes):
    head, prompts = make_head(**changes)
    with pytest.raises(ProbeError, match="wrappings"):
        kept_labels(head, TEXTS, prompts)
