"""Fixtures of all tests with vLLM: a tiny backbone with heads, and prompts of which its guard flags some."""

import openai
import pytest
from conftest import make_lm
from tiny_engine import PROMPTS, SIZES, TinyServing, make_serving
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyServing:
    """A Llama."""
    return make_serving(tmp_path_factory.mktemp("serving"), make_lm(**SIZES))


@pytest.fixture(scope="session")
def threshold(tiny) -> float:
    """At which `guard` halts about half of `PROMPTS`."""
    return tiny.threshold(PROMPTS)


@pytest.fixture(scope="session")
def chats(tiny) -> dict[str, list[int]]:
    """Token ids of the prompts, by text."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.backbone)
    words = ("alpha", "beta", "gamma", "delta", "eps", "zeta")
    texts = [f"{word} number {i} " * (1 + 3 * i) for i, word in enumerate(words)]
    asked = ([{"role": "user", "content": text}] for text in texts)
    rendered = (tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in asked)
    return dict(zip(texts, rendered, strict=True))


@pytest.fixture(scope="session")
def flagged(tiny, chats) -> dict[str, bool]:
    """By text, and the threshold."""
    threshold = tiny.threshold(list(chats.values()))
    return {"threshold": threshold, **{text: tiny.is_flagged(ids, threshold) for text, ids in chats.items()}}


@pytest.fixture
def client(url):
    """OpenAI's, of the server that a module starts."""
    with openai.OpenAI(base_url=url, api_key="none", timeout=250, max_retries=0) as client:
        yield client
