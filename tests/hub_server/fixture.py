"""The fixture `hub`; `from hub_server.fixture import hub` in conftest.py makes it known to all tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session

from .client import point_client_at
from .server import HubServer


RUNNING = pytest.StashKey[HubServer]()


def running_server(config: pytest.Config) -> HubServer:
    """The server of this test run. It is no fixture of its own, so that importing `hub` alone is enough."""
    if RUNNING not in config.stash:
        config.stash[RUNNING] = HubServer().start()
        config.add_cleanup(config.stash[RUNNING].stop)
    return config.stash[RUNNING]


@pytest.fixture
def hub(pytestconfig: pytest.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty Hub that the client of this process uses for the time of a test, with a cache of its own.

    `hub.env` is the environment for subprocesses. An error of the server's own fails the test.
    """
    server = running_server(pytestconfig)
    server.reset()
    close_session()
    point_client_at(server, tmp_path / "hf_home", monkeypatch)
    yield server
    close_session()
    assert not server.errors, server.errors[0]
