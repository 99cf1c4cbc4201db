"""Classification by prompting: likelihoods are those of plain passes, and examples come from training rows."""

import numpy as np
import pytest
import torch
from conftest import make_lm, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_probe.data.known import BENCHMARKS
from llama_probe.data.texts import LabelledTexts
from llama_probe.experiments.reproduction.prompting import (
    LabelPrompt,
    draw_examples,
    instruction,
    label_log_likelihoods,
)


INSTRUCTION = ("Is it nice?", ("No", "Yes, it is"))
IDS = st.integers(3, 259)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def plain(lm, prompt, label) -> float:
    """One forward pass over one row, without padding, cache or prefix."""
    with torch.no_grad():
        log_probs = lm(input_ids=torch.tensor([[*prompt, *label]])).logits[0].log_softmax(dim=-1)
    return sum(float(log_probs[len(prompt) + i - 1, token]) for i, token in enumerate(label))


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(IDS, min_size=1, max_size=9), min_size=1, max_size=5),
    st.lists(st.lists(IDS, min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(IDS, max_size=6),
    st.integers(1, 60),
)
def test_as_one_plain_pass_a_row(rests, labels, start, batch_tokens):
    lm, tokenizer = make_lm(vocab_size=260), make_tokenizer()
    prompts = [[*start, *rest] for rest in rests]
    found = label_log_likelihoods(lm, tokenizer, prompts, labels, batch_tokens)
    expected = [[plain(lm, prompt, label) for label in labels] for prompt in prompts]
    assert found.tolist() == [pytest.approx(row, abs=1e-4) for row in expected]


def test_examples_are_earlier_turns(tokenizer):
    prompt = LabelPrompt(tokenizer, *INSTRUCTION, [("rain", 0), ("sun", 1)])
    shown = tokenizer.decode(prompt.encode(["snow"])[0])
    turns = ["user\nIs it nice?\n\nrain", "assistant\nNo", "user\nsun", "assistant\nYes, it is", "user\nsnow"]
    positions = [shown.index(turn) for turn in turns]
    assert positions == sorted(positions) and shown.endswith("<bos>assistant\n")
    assert tokenizer.decode(prompt.label_ids[1]) == "Yes, it is"


def test_without_a_chat_template():
    bare = make_tokenizer()
    bare.chat_template = None
    prompt = LabelPrompt(bare, *INSTRUCTION, [("rain", 0)])
    assert bare.decode(prompt.encode(["snow"])[0]) == "Is it nice?\n\nrain\nAnswer: No\n\nsnow\nAnswer:"
    assert bare.decode(prompt.label_ids[0]) == " No"


def test_long_texts_are_cut_at_their_end(tokenizer):
    prompt = LabelPrompt(tokenizer, *INSTRUCTION, max_length=20)
    short, long = prompt.encode(["abc", "abcdefgh" * 9])
    assert short == LabelPrompt(tokenizer, *INSTRUCTION).encode(["abc"])[0]
    assert len(long) == len(prompt.prefix_ids) + 20 and long[-len(prompt.suffix_ids) :] == prompt.suffix_ids
    assert long[: len(prompt.prefix_ids) + 3] == short[: len(prompt.prefix_ids) + 3]


def test_examples_come_from_the_training_rows_with_their_labels(tokenizer):
    texts = [f"text {i}" for i in range(60)]
    rows = LabelledTexts(texts, np.arange(60) % 3, ["a", "b", "c"], "single_label_classification", {})
    for seed in range(2):
        examples = draw_examples(rows, 2, seed, tokenizer)
        assert sorted(label for _, label in examples) == [0, 0, 1, 1, 2, 2]
        assert len({text for text, _ in examples}) == 6
        assert all(texts.index(text) % 3 == label for text, label in examples)
    assert len(draw_examples(rows, 30, 0, tokenizer)) == 60, "as many as there are"
    assert {text for text, _ in draw_examples(rows, 2, 0, tokenizer, max_tokens=4)} == {"text"}, "they are cut"


def test_instructions():
    for benchmark in BENCHMARKS.values():
        question, verbalisers = instruction(benchmark)
        assert len(set(verbalisers)) == len(benchmark.label_names)
        assert question == benchmark.question or ", ".join(benchmark.label_names) in question
