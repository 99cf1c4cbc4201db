"""The server: its state, and the thread of the test process in which it runs."""

import asyncio
import hashlib
import hmac
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from .accounts import Accounts
from .app import make_app
from .faults import Faults
from .repository import LFS_SUFFIXES, Blob, Repository


class HubServer:
    """A Hub on 127.0.0.1 whose LFS objects are on another origin, the same port of localhost.

    Attributes:
        url: what `HF_ENDPOINT` is set to.
        requests: `(method, path, status)` of every request in order; paths are quoted as they came, without queries, and
            the status is `None` where a fault cut the connection. No header is kept.
        faults: what goes wrong, see `Faults`.
        repositories: by id.
        errors: tracebacks of the server's own errors, of which there should be none.
        lfs_bytes: files of this size or more go up as LFS objects; `.safetensors` and `.png` always do.
        part_bytes: LFS objects of more bytes go up in parts.
        env: environment of a subprocess whose client is to use this server; set by the fixture.
    """

    def __init__(self) -> None:
        self._server: uvicorn.Server | None = None
        self._secret, self.port = secrets.token_bytes(), 0
        self.reset()

    def reset(self) -> None:
        """Forgets all users, repositories, faults and requests."""
        self.accounts, self.faults = Accounts(), Faults()
        self.repositories: dict[str, Repository] = {}
        self.parts: dict[tuple[str, str, int], bytes] = {}
        self.requests: list[tuple[str, str, int | None]] = []
        self.errors: list[str] = []
        self.lfs_bytes, self.part_bytes = 2**20, 5 * 2**20
        self.env: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def cdn_url(self) -> str:
        return f"http://localhost:{self.port}"

    def __enter__(self) -> "HubServer":
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> "HubServer":
        """Starts the thread, on the port of the last time if there was one; returns once requests are taken."""
        # asyncio turns Nagle's delay of 40 ms off only for sockets that name their protocol.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        # A client that waits for longer than the keep-alive between two requests would meet a closed connection.
        options = {"loop": "asyncio", "http": "h11", "ws": "none", "lifespan": "off", "timeout_keep_alive": 600}
        config = uvicorn.Config(make_app(self), log_config=None, log_level="critical", access_log=False, **options)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="hub", daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the Hub server did not start")
            time.sleep(0.002)
        return self

    def stop(self) -> None:
        """Ends the thread and closes all connections."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(timeout=10)
        if self._thread.is_alive():
            raise RuntimeError("the Hub server did not stop")

    @contextmanager
    def down(self) -> Iterator[None]:
        """Nothing listens at the server's address for the time of a `with` block; its state is kept."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    async def abort(self, scope: Mapping) -> None:
        """Closes the connection of a request without an answer."""
        for connection in list(self._server.server_state.connections):
            if connection.scope is scope:
                connection.transport.abort()
        await asyncio.sleep(0)

    def add_user(self, name: str) -> str:
        """Adds a user; returns a token that may write to the user's repositories."""
        return self.accounts.add_user(name)

    def add_token(self, user: str, role: str = "read", repos: Iterable[str] = ()) -> str:
        """Adds a token of the role `read`, `write` or `fine` (which reaches `repos` only) for a user."""
        return self.accounts.add_token(user, role, repos)

    def plant(
        self, repo_id: str, files: Mapping[str, bytes | None], *, branch: str = "main", private: bool = False
    ) -> str:
        """Commits files, unchecked, to a repository that is made if need be; returns the sha.

        Paths and ids may be what no Hub would take; that of a data set begins with `datasets/`. `None` deletes a file; `branch`
        may be new.
        """
        blobs = {
            path: Blob(data, lfs=path.endswith(LFS_SUFFIXES) or len(data) >= self.lfs_bytes)
            for path, data in files.items()
            if data is not None
        }
        if repo_id not in self.repositories:
            self.repositories[repo_id] = Repository(repo_id, blobs if branch == "main" else {}, private)
        repo = self.repositories[repo_id]
        head = repo.branches.setdefault(branch, repo.branches["main"])
        kept = {path: blob for path, blob in head.files.items() if path not in files}
        return repo.commit(branch, {**kept, **blobs}, "Plant files").oid

    def head(self, repo_id: str, revision: str = "main") -> str:
        """The sha of a revision."""
        return self.repositories[repo_id].find(revision).oid

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds at a revision."""
        return {path: blob.data for path, blob in self.repositories[repo_id].find(revision).files.items()}

    def clear_requests(self) -> None:
        """Empties the log."""
        self.requests.clear()

    def count(self, method: str | None = None, path: str = "") -> int:
        """How many requests the log holds, of a method and with `path` in their path."""
        return sum(method in (None, verb) and path in where for verb, where, _ in self.requests)

    def signature(self, method: str, path: str) -> str:
        """What a URL must carry to be taken without a token."""
        return hmac.new(self._secret, f"{method} {path}".encode(), hashlib.sha256).hexdigest()

    def signed(self, origin: str, method: str, path: str) -> str:
        """A URL that may be used without a token, for one method."""
        return f"{origin}{path}?key={self.signature(method, path)}"

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of this process, changed so that a client started in it knows this server and no other."""
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
        }
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
