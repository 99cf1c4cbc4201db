"""Chats for a server with a guard, some of which it flags, and how they are asked."""

import pytest
from tiny_engine import TinyServing, tiny  # noqa: F401 - a fixture
from transformers import AutoTokenizer


TEXTS = [
    f"{word} number {i} " * (1 + 3 * i) for i, word in enumerate(("alpha", "beta", "gamma", "delta", "eps", "zeta"))
]


@pytest.fixture(scope="module")
def chats(tiny: TinyServing) -> dict[str, list[int]]:  # noqa: F811
    """Token ids of the prompts, by text."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.backbone)

    def ids(text: str) -> list[int]:
        chat = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)

    return {text: ids(text) for text in TEXTS}


@pytest.fixture(scope="module")
def flagged(tiny: TinyServing, chats) -> dict[str, bool]:  # noqa: F811
    threshold = tiny.threshold(list(chats.values()))
    scores = {text: float(tiny.reference(ids).probe_probabilities["guard"][0, 1]) for text, ids in chats.items()}
    found = {text: score >= threshold for text, score in scores.items()}
    assert 0 < sum(found.values()) < len(found)
    return {"threshold": threshold, **found}


def ask(client, text: str, **kwargs):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(
        model="tiny", messages=messages, **{"temperature": 0.0, "max_tokens": 4, **kwargs}
    )
