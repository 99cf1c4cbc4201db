"""The fixtures `hub`, a server that the `huggingface_hub` and `transformers` of this process are pointed at, and `token`."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

# All that copies constants, or makes an HfApi, at import: imported during a test, it would keep the test's values.
import transformers.utils.hub
import transformers.utils.logging
from huggingface_hub import _snapshot_download, close_session, constants, file_download, hf_api  # noqa: F401
from huggingface_hub.utils import _cache_assets, _cache_manager, _git_credential, _http  # noqa: F401
from huggingface_hub.utils import tqdm as _tqdm  # noqa: F401

from .server import HubServer


RUNNING = pytest.StashKey[HubServer]()
LIBRARIES = ("huggingface_hub", "transformers", "llama_probe")


def changed_constants(server: HubServer, home: Path) -> dict[str, object]:
    """The constants that the client would have, had it been imported with the server's environment."""
    return {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_URL_HOSTS": constants.HF_URL_HOSTS | {urlsplit(server.url).hostname},
        "HF_HOME": str(home),
        **dict.fromkeys(("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"), str(home / "hub")),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
        "HF_MODULES_CACHE": str(home / "modules"),
        **dict.fromkeys(("HF_HUB_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_HUB_DISABLE_SYMLINKS"), False),
        **dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"), True),
    }


def point_client_at(server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make plain calls (no `endpoint=`, no `cache_dir=`) use the server, an empty cache in `home`, and no token.

    The environment is changed as well. The waits between the client's repetitions are left out: they last 23 s.
    """
    server.env = server.environment(home)
    for key in set(os.environ) - set(server.env):
        monkeypatch.delenv(key)
    for key, value in server.env.items():
        if os.environ.get(key) != value:
            monkeypatch.setenv(key, value)
    values = changed_constants(server, home)
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in LIBRARIES:
            for constant in values.keys() & vars(module).keys():
                monkeypatch.setattr(module, constant, values[constant])
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", False)
    monkeypatch.setattr(_http, "_HUB_ORIGINS", _http._HUB_ORIGINS | {_http._url_origin(server.url)})
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", impatient)


@pytest.fixture
def hub(pytestconfig: pytest.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty Hub that the client of this process uses, with a cache of its own.

    `hub.env` is the environment for subprocesses. An error of the server's own fails the test.
    """
    # No fixture of its own, so that importing `hub` alone is enough.
    if RUNNING not in pytestconfig.stash:
        pytestconfig.stash[RUNNING] = HubServer().start()
        pytestconfig.add_cleanup(pytestconfig.stash[RUNNING].stop)
    server = pytestconfig.stash[RUNNING]
    server.reset()
    close_session()
    point_client_at(server, tmp_path / "hf_home", monkeypatch)
    yield server
    close_session()
    assert not server.errors, server.errors[0]


@pytest.fixture(name="token")
def alices_token(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The write token of the user alice, who is logged in."""
    token = hub.add_user("alice")
    monkeypatch.setenv("HF_TOKEN", token)
    return token
