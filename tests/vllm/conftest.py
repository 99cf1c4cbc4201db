"""Fixtures of all tests with vLLM: a tiny backbone with heads, and a client of the server that a module starts."""

import openai
import pytest
from tiny_engine import TinyServing, make_serving


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyServing:
    """A Llama."""
    return make_serving(tmp_path_factory.mktemp("serving"))


@pytest.fixture
def client(url):
    """OpenAI's, of the server that a module starts."""
    # A busy server may close an idle connection just as it is used again.
    with openai.OpenAI(base_url=url, api_key="none", timeout=250, max_retries=1) as client:
        yield client
