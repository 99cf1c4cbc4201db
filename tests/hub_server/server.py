"""The server: its state, the requests it answers, and the threads of the test process in which it runs."""

import base64
import hashlib
import json
import re
import secrets
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

from .repository import LFS_SUFFIXES, Blob, Refusal, Repository


_ID = r"(?P<id>[^/]+(?:/[^/]+)?)"
_API = rf"/api/(?P<kind>models|datasets)/{_ID}"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES = {
    "whoami": r"GET /api/whoami-v2",
    "create": r"POST /api/repos/create",
    "validate": r"POST /api/validate-yaml",
    "preupload": rf"POST {_API}/preupload/{_REVISION}",
    "commit": rf"POST {_API}/commit/{_REVISION}",
    "branch": rf"POST {_API}/branch/{_REVISION}",
    "tree": rf"GET {_API}/tree/{_REVISION}(?:/(?P<path>.*))?",
    "info": rf"GET {_API}(?:/revision/{_REVISION})?",
    "batch": rf"POST /{_ID}\.git/info/lfs/objects/batch",
    "put": rf"PUT /cdn/{_ID}/(?P<oid>\w{{64}})",
    "get": rf"GET /cdn/{_ID}/(?P<oid>\w{{64}})/.*",
    "resolve": rf"GET /(?P<kind>datasets/)?{_ID}/resolve/{_REVISION}/(?P<path>.*)",
}

_COMMIT = {"method": "POST", "path": "/commit/"}
_UPLOAD = {"method": "PUT", "path": "/cdn/"}
# Faults by name: what they do to a request, and which requests they are for.
FAULTS = {
    "answer": {"status": 500},  # with `code` as the client's name for the error
    "forbid": {"status": 403, **_COMMIT},
    "refuse upload": {"status": 403, **_UPLOAD},
    "run": {},  # call `action` before the request is answered
    "lose": {},  # do what is asked for, and answer 500
    "cut upload": _UPLOAD,  # close the connection in the middle of the upload of a large file
    "truncate": {"method": "GET"},  # send half of a file, with `declared` under the Content-Length of the whole
    "wrong sha": {"method": "GET"},  # send a file with its last byte changed, under the old etag
}


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
    action: Callable[[], object] | None = None
    hits: int = 0

    def befalls(self, method: str, path: str) -> bool:
        if self.method not in (None, method) or self.path not in unquote(path) or self.hits == self.times:
            return False
        self.hits += 1
        return True


class HubServer:
    """A Hub on 127.0.0.1 whose large files are on another origin, the same port of localhost.

    Attributes:
        url: value for `HF_ENDPOINT`.
        requests: `(method, path, status)` of each request; no query, no header; the status is None if it was cut.
        repositories: by id; that of a data set begins with `datasets/`.
        renamed: new id of a repository by its old one.
        errors: tracebacks of the server's own errors.
        env: environment for a subprocess whose client uses this server; set by the fixture.
    """

    def __init__(self) -> None:
        self.port = 0
        self.reset()

    def reset(self) -> None:
        self.tokens: dict[str, tuple[str, str]] = {}  # (user, role) by token
        self.faults: list[Fault] = []
        self.repositories: dict[str, Repository] = {}
        self.renamed: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}  # large files by sha256
        self.requests: list[tuple[str, str, int | None]] = []
        self.errors: list[str] = []
        self.env: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def cdn_url(self) -> str:
        return f"http://localhost:{self.port}"

    # What tests call

    def start(self) -> "HubServer":
        """Listen, on the port of the last time if there was one."""
        handler = type("Handler", (Handler,), {"hub": self})
        self._lock, self._connections = threading.Lock(), set()
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        # shutdown() waits for the next poll.
        threading.Thread(target=self._server.serve_forever, args=(0.01,), name="hub", daemon=True).start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def down(self) -> Iterator[None]:
        """Nothing listens at the server's address inside the block; its state is kept."""
        self.stop()
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

    def take(self, kinds: tuple[str, ...], method: str, path: str) -> Fault | None:
        return next((fault for fault in self.faults if fault.kind in kinds and fault.befalls(method, path)), None)

    def plant(self, repo_id: str, files: Mapping[str, bytes], *, branch: str = "main", private: bool = False) -> None:
        """Commit files, unchecked, to a repository and branch that may be new."""
        blobs = {path: Blob(data, path.endswith(LFS_SUFFIXES)) for path, data in files.items()}
        self.objects |= {blob.oid: blob.data for blob in blobs.values() if blob.lfs}
        if repo_id not in self.repositories:
            self.repositories[repo_id] = Repository(repo_id, blobs, private)
        repo = self.repositories[repo_id]
        repo.commit(branch, {**repo.refs.get(branch, repo.refs["main"]).files, **blobs})

    def head(self, repo_id: str, revision: str = "main") -> str:
        return self.repositories[repo_id].find(revision).oid

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.repositories[repo_id].find(revision).files.items()}

    def count(self, method: str | None = None, path: str = "") -> int:
        """Count requests of a method with `path` in their path."""
        return sum(method in (None, verb) and path in where for verb, where, _ in self.requests)


class Handler(BaseHTTPRequestHandler):
    """Answers one connection. A route returns a JSON value, or (status, headers, bytes)."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def setup(self):
        super().setup()
        self.hub._connections.add(self.connection)

    def finish(self):
        with suppress(OSError):
            super().finish()
        self.hub._connections.discard(self.connection)

    def log_message(self, *args):
        pass

    def do_GET(self):
        hub, self.where = self.hub, urlsplit(self.path).path
        self.query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        fault = hub.take(("answer", "forbid", "refuse upload", "cut upload", "run", "lose"), self.command, self.where)
        fault = fault or Fault("none")
        if fault.kind == "cut upload":
            self.rfile.read(1)
            hub.requests.append((self.command, self.where, None))
            self.close_connection = True
            return
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length)
        if len(self.body) < length:  # the client was killed
            self.close_connection = True
            return
        try:
            if fault.status is not None:
                raise Refusal(fault.status, "a fault that was asked for", fault.code)
            if fault.action is not None:
                fault.action()
            with hub._lock:
                answer = self._route()
            if fault.kind == "lose":
                raise Refusal(500, "a fault that was asked for")
        except Refusal as refusal:
            answer = refusal.status, refusal.headers, json.dumps(refusal.body).encode()
        except Exception:
            hub.errors.append(traceback.format_exc())
            answer = 501, {}, b""  # the client does not repeat a request after it
        self._send(*(answer if isinstance(answer, tuple) else (200, {}, json.dumps(answer).encode())))

    do_HEAD = do_POST = do_PUT = do_GET

    def _send(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.hub.requests.append((self.command, self.where, status))
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        if int(headers.get("Content-Length", len(data))) != len(data):
            self.close_connection = True

    def _route(self):
        at_cdn = self.headers["Host"] == urlsplit(self.hub.cdn_url).netloc
        if at_cdn != self.where.startswith("/cdn/") or (at_cdn and self.headers.get("Authorization")):
            raise Refusal(400, "the wrong origin, or a token was sent to the CDN")
        line = f"{self.command.replace('HEAD', 'GET')} {self.where}"
        for name, route in ROUTES.items():
            if match := re.fullmatch(route, line):
                self.part = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                if new := self.hub.renamed.get(self.part.get("id")):
                    return 307, {"Location": self.path.replace(self.part["id"], new)}, b""
                return getattr(self, f"on_{name}")()
        raise AssertionError(f"no route for {line}")

    # Who may do what

    @property
    def visitor(self) -> tuple[str, str] | None:
        """(user, role) of the request's token."""
        given = self.headers.get("Authorization")
        if given is None:
            return None
        if given.removeprefix("Bearer ") not in self.hub.tokens:
            # The client tells a wrong token from a hidden repository by these words.
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[given.removeprefix("Bearer ")]

    def readable(self) -> Repository:
        visitor = self.visitor
        kind = "datasets/" if self.part.get("kind", "").startswith("datasets") else ""
        repo = self.hub.repositories.get(kind + self.part["id"])
        if repo is None or (repo.private and (visitor is None or visitor[0] != repo.owner)):
            raise Refusal(401 if visitor is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self) -> Repository:
        repo = self.readable()
        if self.visitor != (repo.owner, "write"):
            raise Refusal(403, "Forbidden: this token has no write access to the repository")
        return repo

    @property
    def json(self):
        return json.loads(self.body)

    # Routes

    def on_whoami(self):
        return {"type": "user", "name": self.visitor[0], "orgs": [], "auth": {}}

    def on_create(self):
        (user, role), body = self.visitor, self.json
        repo_id = f"{body.get('organization') or user}/{body['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if role != "write" or not repo_id.startswith(f"{user}/"):
            raise Refusal(403, "You don't have the rights to create this model")
        if repo_id in self.hub.repositories:
            return 409, {}, json.dumps({"error": "You already created this model repo", **answer}).encode()
        private = body.get("visibility") == "private" or body.get("private", False)
        self.hub.repositories[repo_id] = Repository(repo_id, {".gitattributes": Blob(b"")}, private)
        return answer

    def on_validate(self):
        tags = metadata(self.json["content"]).get("tags", [])
        if isinstance(tags, list):
            return {"errors": [], "warnings": []}
        errors = [{"message": '"tags" must be an array of strings'}]
        return 400, {}, json.dumps({"errors": errors, "warnings": []}).encode()

    def on_info(self):
        repo = self.readable()
        commit = repo.find(self.part.get("revision", "main"))
        card = commit.files.get("README.md", Blob(b"")).data.decode("utf-8", "replace")
        return {
            "id": repo.id.removeprefix("datasets/"),
            "sha": commit.oid,
            "cardData": metadata(card),
            "tags": [],
            "siblings": [
                {"rfilename": path, "blobId": blob.oid, "lfs": blob.entry(path).get("lfs")}
                for path, blob in sorted(commit.files.items())
            ],
        }

    def on_tree(self):
        commit, folder = self.readable().find(self.part["revision"]), self.part.get("path", "")
        start = f"{folder}/" if folder else ""
        entries = {}
        for path, blob in sorted(commit.files.items()):
            if path.startswith(start):
                first, _, rest = path.removeprefix(start).partition("/")
                if rest:
                    entries[start + first] = {"type": "directory", "path": start + first, "size": 0, "oid": "0" * 40}
                if not rest or "recursive" in self.query:
                    entries[path] = blob.entry(path)
        if folder and not entries:
            raise Refusal(404, f"Entry not found: {folder}", "EntryNotFound")
        return list(entries.values())

    def on_branch(self):
        repo = self.writable()
        if self.part["revision"] in repo.refs:
            raise Refusal(409, "Reference already exists")
        repo.refs[self.part["revision"]] = repo.refs["main"]
        return {}

    def on_preupload(self):
        commit, answer = self.writable().find(self.part["revision"]), []
        for path in (file["path"] for file in self.json["files"]):
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            known = {"oid": commit.files[path].oid} if path in commit.files else {}
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return {"files": answer, "commitOid": commit.oid}

    def on_batch(self):
        repo, objects = self.writable(), []
        for item in self.json["objects"]:
            upload = {"upload": {"href": f"{self.hub.cdn_url}/cdn/{repo.id}/{item['oid']}"}}
            actions = {} if item["oid"] in self.hub.objects else {"actions": upload}
            objects.append({"oid": item["oid"], "size": item["size"], **actions})
        return {"transfer": "basic", "objects": objects}

    def on_put(self):
        if hashlib.sha256(self.body).hexdigest() != self.part["oid"]:
            raise Refusal(400, "The uploaded bytes do not have the declared sha256")
        self.hub.objects[self.part["oid"]] = self.body
        return {}

    def on_commit(self):
        """Apply all lines of a commit to a copy of the tree, and only then make it the branch's."""
        repo, as_pull, revision = self.writable(), "create_pr" in self.query, self.part["revision"]
        header, *lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        head = repo.find(revision)
        if header["value"].get("parentCommit", head.oid) != head.oid:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile":
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], lfs=True)
            else:
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        commit = repo.commit(f"refs/pr/{number}" if as_pull else revision, files)
        page = f"{self.hub.url}/{repo.id}"
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{page}/commit/{commit.oid}"}
        return answer | ({"pullRequestUrl": f"{page}/discussions/{number}"} if as_pull else {})

    def on_resolve(self):
        repo, path = self.readable(), self.part["path"]
        commit = repo.find(self.part["revision"])
        if path not in commit.files:
            raise Refusal(404, f"Entry not found: {path}", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"'}
        if not blob.lfs:
            return self._file(blob.data, headers)
        # The file's name is in the URL so that faults find it.
        location = f"{self.hub.cdn_url}/cdn/{self.part['id']}/{blob.oid}/{quote(path)}"
        linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(blob.data)), "Location": location}
        return 302, headers | linked, b""

    def on_get(self):
        return self._file(self.hub.objects[self.part["oid"]], {"ETag": f'"{self.part["oid"]}"'})

    def _file(self, data: bytes, headers: dict[str, str]):
        if self.hub.take(("wrong sha",), self.command, self.where):
            data = data[:-1] + bytes([data[-1] ^ 0xFF])
        if fault := self.hub.take(("truncate",), self.command, self.where):
            headers |= {"Content-Length": str(len(data))} if fault.declared else {}
            data = data[: len(data) // 2]
        return 200, headers, data


def metadata(card: str) -> dict:
    """The metadata of a card, as JSON values."""
    match = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---(\r?\n|$)", card, re.DOTALL)
    data = (yaml.safe_load(match.group(1)) if match else None) or {}
    return json.loads(json.dumps(data, default=str))
