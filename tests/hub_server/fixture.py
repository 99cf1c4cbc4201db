"""The fixtures `hub`, a Hub on loopback that the `huggingface_hub` and `transformers` of this process use, and `token`."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import close_session, constants, file_download
from huggingface_hub.utils import _http

from . import HOME, HUB, HubServer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty Hub that plain calls use (no `endpoint=`, no `cache_dir=`), with an empty cache, and no token.

    An error of the server's own fails the test. The waits between the client's repetitions are left out: they last 23 s.
    """
    HUB.reset()
    close_session()
    shutil.rmtree(Path(HOME.name, "hub"), ignore_errors=True)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", impatient)
    yield HUB
    close_session()
    assert not HUB.errors, HUB.errors[0]


@pytest.fixture(name="token")
def alices_token(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The write token of the user alice, who is logged in."""
    token = hub.add_user("alice")
    monkeypatch.setenv("HF_TOKEN", token)
    return token
