"""The server: repositories in memory, the requests that it answers, and the threads in which it runs."""

import base64
import hashlib
import json
import re
import secrets
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


_ID = r"(?P<id>[^/]+(?:/[^/]+)?)"
_API = rf"/api/(?P<kind>models|datasets)/{_ID}"
_REVISION = r"(?P<revision>[^/]+)"
# Requests, and the methods of `Handler` that answer them.
ROUTES = {
    r"GET /api/whoami-v2": "whoami",
    r"POST /api/repos/create": "create",
    r"POST /api/validate-yaml": "validate",
    rf"POST {_API}/preupload/{_REVISION}": "preupload",
    rf"POST {_API}/commit/{_REVISION}": "commit",
    rf"POST {_API}/branch/{_REVISION}": "branch",
    rf"GET {_API}/tree/{_REVISION}(?:/(?P<path>.*))?": "tree",
    rf"GET {_API}(?:/revision/{_REVISION})?": "info",
    rf"GET /(?P<kind>datasets/)?{_ID}/resolve/{_REVISION}/(?P<path>.*)": "resolve",
}

_COMMIT = {"method": "POST", "path": "/commit/"}
# Faults by name: what they do to a request, and which requests they are for.
FAULTS = {
    "answer": {"status": 500},  # with `code` as the client's name for the error
    "forbid": {"status": 403, **_COMMIT},
    "run": {},  # call `action` before the request is answered
    "lose": {},  # do what is asked for, and answer 500
    "cut upload": _COMMIT,  # close the connection in the middle of the upload
    "truncate": {"method": "GET"},  # send half of a file, with `declared` under the Content-Length of the whole
    "wrong sha": {"method": "GET"},  # send a file with its last byte changed, under the old etag
}


class Refusal(Exception):
    """Ends a request with a status, a message, and the `X-Error-Code` from which the client picks its exception."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        headers |= {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.answer = status, headers, json.dumps({"error": message}).encode()


def oid_of(data: bytes) -> str:
    """The name under which the client caches a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Repository:
    """A model or a data set: trees by the id of their commit. It starts with one."""

    def __init__(self, repo_id: str, files: Mapping[str, bytes], private: bool = False):
        self.id, self.owner, self.private = repo_id, repo_id.split("/")[-2], private
        self.commits: dict[str, Mapping[str, bytes]] = {}
        self.refs: dict[str, str] = {}  # commits of branches by name, of pull requests as refs/pr/N
        self.commit("main", files)

    def find(self, revision: str) -> tuple[str, dict[str, bytes]]:
        """The commit of a branch, pull request or full sha, and a copy of its tree; a `Refusal` if there is none."""
        oid = self.refs.get(revision.removeprefix("refs/heads/"), revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, dict(self.commits[oid])

    def commit(self, revision: str, files: Mapping[str, bytes]) -> str:
        """Make `files` the tree of a revision, after `main` if it is new; the same tree again makes no commit."""
        oid = self.refs.get(revision, self.refs.get("main", ""))
        if self.commits.get(oid) != files:
            lines = [oid, *(f"{path}\0{oid_of(files[path])}" for path in sorted(files))]
            oid = hashlib.sha1("\n".join(lines).encode()).hexdigest()
        self.commits[oid], self.refs[revision] = dict(files), oid
        return oid


@dataclass
class Fault:
    """A fault for requests of a method whose path holds `path`; it affects `times` of them, or all if None."""

    kind: str
    method: str | None = None
    path: str = ""
    times: int | None = 1
    status: int | None = None
    code: str | None = None
    declared: bool = True
    action: Callable[[], object] = lambda: None
    hits: int = 0

    def befalls(self, method: str, path: str) -> bool:
        is_next = self.method in (None, method) and self.path in path and self.hits != self.times
        self.hits += is_next
        return is_next


class HubServer(ThreadingHTTPServer):
    """A Hub on 127.0.0.1 that takes each file with its commit, as the Hub does with small ones.

    Attributes:
        url: value for `HF_ENDPOINT`.
        requests: `(method, path, status)` of each request; no query, no header; the status is None if it was cut.
        repositories: by id; that of a data set begins with `datasets/`.
        errors: tracebacks of the server's own errors.
    """

    server_port = 0

    def __init__(self) -> None:
        self.answering = threading.Lock()
        self.reset()
        self.start()

    def reset(self) -> None:
        self.tokens: dict[str, tuple[str, str]] = {}  # (user, role) by token
        self.faults: list[Fault] = []
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, int | None]] = []
        self.errors: list[str] = []

    def start(self) -> None:
        """Listen, on the port of the last time if there was one."""
        super().__init__(("127.0.0.1", self.server_port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        # shutdown() waits for the next poll.
        threading.Thread(target=self.serve_forever, args=(0.01,), name="hub", daemon=True).start()

    # What tests call

    @contextmanager
    def down(self) -> Iterator[None]:
        """Nothing listens at the server's address inside the block; its state is kept."""
        from huggingface_hub import close_session

        close_session()  # it holds connections
        self.shutdown()
        self.server_close()
        try:
            yield
        finally:
            self.start()

    def add_user(self, user: str, role: str = "write") -> str:
        """Return a token of the role `read` or `write`."""
        token = "hf_" + secrets.token_hex(17)
        self.tokens[token] = (user, role)
        return token

    def fault(self, kind: str, **fields) -> Fault:
        """Let a fault of `FAULTS` happen to the next requests that match it.

        The client repeats a request that was cut, or answered with 408, 429 or 5xx, up to five times. So one such fault
        is mended by the client, and six are an error.
        """
        self.faults.append(Fault(kind, **{**FAULTS[kind], **fields}))
        return self.faults[-1]

    def plant(self, repo_id: str, files: Mapping[str, bytes], *, branch: str = "main", private: bool = False) -> None:
        """Commit files, unchecked, to a repository and branch that may be new."""
        repo = self.repositories.setdefault(repo_id, Repository(repo_id, files, private))
        repo.commit(branch, {**repo.commits[repo.refs.get(branch, repo.refs["main"])], **files})

    def head(self, repo_id: str, revision: str = "main") -> str:
        return self.repositories[repo_id].find(revision)[0]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[repo_id].find(revision)[1]

    def count(self, method: str, path: str) -> int:
        """Count requests of a method with `path` in their path."""
        return sum(method == verb and path in where for verb, where, _ in self.requests)


class Handler(BaseHTTPRequestHandler):
    """Answers one connection. A route returns a JSON value, or (status, headers, bytes)."""

    server: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.where = urlsplit(self.path).path
        faults = (fault for fault in self.server.faults if fault.befalls(self.command, unquote(self.where)))
        self.fault = fault = next(faults, Fault("none"))
        length = 1 if fault.kind == "cut upload" else int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length)
        if fault.kind == "cut upload" or len(self.body) < length:  # or the client was killed
            self.server.requests.append((self.command, self.where, None))
            self.close_connection = True
            return
        try:
            if fault.status is not None:
                raise Refusal(fault.status, "a fault that was asked for", fault.code)
            fault.action()
            with self.server.answering:
                answer = self._route()
            if fault.kind == "lose":
                raise Refusal(500, "a fault that was asked for")
        except Refusal as refusal:
            answer = refusal.answer
        except Exception:
            self.server.errors.append(traceback.format_exc())
            answer = 501, {}, b""  # the client does not repeat a request after it
        self._send(*(answer if isinstance(answer, tuple) else (200, {}, json.dumps(answer).encode())))

    do_HEAD = do_POST = do_GET

    def _send(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.server.requests.append((self.command, self.where, status))
        self.send_response(status)
        headers = {"Content-Length": str(len(data)), **headers}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.close_connection |= int(headers["Content-Length"]) != len(data)

    def _route(self):
        line = f"{self.command.replace('HEAD', 'GET')} {self.where}"
        for route, name in ROUTES.items():
            if match := re.fullmatch(route, line):
                self.part = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return getattr(self, name)()
        raise AssertionError(f"no route for {line}")

    # Who may do what

    @property
    def visitor(self) -> tuple[str, str] | None:
        """(user, role) of the request's token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.tokens:
            # The client tells a wrong token from a hidden repository by these words.
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.server.tokens.get(token)

    def readable(self) -> tuple[Repository, str, dict[str, bytes]]:
        """The repository that the request names, the commit of the revision, and its tree."""
        visitor = self.visitor
        kind = "datasets/" if self.part.get("kind", "").startswith("datasets") else ""
        repo = self.server.repositories.get(kind + self.part["id"])
        if repo is None or (repo.private and (visitor is None or visitor[0] != repo.owner)):
            raise Refusal(401 if visitor is None else 404, "Repository not found", "RepoNotFound")
        return repo, *repo.find(self.part.get("revision", "main"))

    def writable(self) -> tuple[Repository, str, dict[str, bytes]]:
        repo, oid, files = self.readable()
        if self.visitor != (repo.owner, "write"):
            raise Refusal(403, "Forbidden: this token has no write access to the repository")
        return repo, oid, files

    # Routes

    def whoami(self):
        return {"type": "user", "name": self.visitor[0], "orgs": [], "auth": {}}

    def create(self):
        (user, role), body = self.visitor, json.loads(self.body)
        repo_id = f"{body.get('organization') or user}/{body['name']}"
        answer = {"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if role != "write" or not repo_id.startswith(f"{user}/"):
            raise Refusal(403, "You don't have the rights to create this model")
        if repo_id in self.server.repositories:
            return 409, {}, json.dumps({"error": "You already created this model repo", **answer}).encode()
        private = body.get("visibility") == "private" or body.get("private", False)
        self.server.repositories[repo_id] = Repository(repo_id, {".gitattributes": b""}, private)
        return answer

    def validate(self):
        return {"errors": [], "warnings": []}

    def info(self):
        repo, oid, files = self.readable()
        siblings = [{"rfilename": path} for path in sorted(files)]
        return {"id": repo.id.removeprefix("datasets/"), "sha": oid, "tags": [], "siblings": siblings}

    def tree(self):
        (_, _, files), folder = self.readable(), self.part.get("path", "")
        start = f"{folder}/" if folder else ""
        entries = {}
        for path in sorted(name for name in files if name.startswith(start)):
            first, _, rest = path.removeprefix(start).partition("/")
            if rest:
                entries[start + first] = {"type": "directory", "path": start + first, "size": 0, "oid": "0" * 40}
            if not rest or "recursive" in self.path:
                entries[path] = {"type": "file", "path": path, "size": len(files[path]), "oid": oid_of(files[path])}
        if folder and not entries:
            raise Refusal(404, f"Entry not found: {folder}", "EntryNotFound")
        return list(entries.values())

    def branch(self):
        name = self.part.pop("revision")
        repo, oid, _ = self.writable()
        if name in repo.refs:
            raise Refusal(409, "Reference already exists")
        repo.refs[name] = oid
        return {}

    def preupload(self):
        (_, oid, files), answer = self.writable(), []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            known = {"oid": oid_of(files[path])} if path in files else {}
            answer.append({"path": path, "uploadMode": "regular", "shouldIgnore": False, **known})
        return {"files": answer, "commitOid": oid}

    def commit(self):
        """Apply all lines of a commit to a copy of the tree, and only then make it the branch's."""
        (repo, head, files), as_pull = self.writable(), "create_pr" in self.path
        header, *lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        if header["value"].get("parentCommit", head) != head:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        for line in lines:
            if line["key"] == "deletedFile":
                del files[line["value"]["path"]]
            else:
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        oid = repo.commit(f"refs/pr/{number}" if as_pull else self.part["revision"], files)
        page = f"{self.server.url}/{repo.id}"
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{page}/commit/{oid}"}
        return answer | ({"pullRequestUrl": f"{page}/discussions/{number}"} if as_pull else {})

    def resolve(self):
        (_, oid, files), path = self.readable(), self.part["path"]
        if path not in files:
            raise Refusal(404, f"Entry not found: {path}", "EntryNotFound", **{"X-Repo-Commit": oid})
        data, headers = files[path], {"X-Repo-Commit": oid, "ETag": f'"{oid_of(files[path])}"'}
        if self.fault.kind == "wrong sha":
            return 200, headers, data[:-1] + bytes([data[-1] ^ 0xFF])
        if self.fault.kind == "truncate":
            declared = {"Content-Length": str(len(data))} if self.fault.declared else {}
            return 200, headers | declared, data[: len(data) // 2]
        return 200, headers, data
