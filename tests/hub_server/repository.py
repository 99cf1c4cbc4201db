"""A repository in memory: commits, and the branches and pull requests that point at them."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import yaml


LFS_SUFFIXES = (".safetensors", ".png")
FIRST_FILES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


class Refusal(Exception):
    """Ends a request with a status, a message, and the `X-Error-Code` from which the client picks its exception."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.body = status, {"error": message}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


@dataclass(frozen=True)
class Blob:
    """One version of a file; with `lfs` the client downloads it from another origin."""

    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def oid(self) -> str:
        """The name under which the client caches the file."""
        git = hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()
        return self.sha256 if self.lfs else git

    def entry(self, path: str) -> dict:
        """The file as the API lists it."""
        lfs = {"lfs": {"oid": self.sha256, "sha256": self.sha256, "size": len(self.data), "pointerSize": 1}}
        return {"type": "file", "path": path, "size": len(self.data), "oid": self.oid, **(lfs if self.lfs else {})}


@dataclass(frozen=True)
class Commit:
    """A whole tree, after another one."""

    files: Mapping[str, Blob]
    parent: str = ""

    @cached_property
    def oid(self) -> str:
        lines = [self.parent, *(f"{path}\0{self.files[path].oid}" for path in sorted(self.files))]
        return hashlib.sha1("\n".join(lines).encode()).hexdigest()


class Repository:
    """A model or a data set; it starts with one commit."""

    def __init__(self, repo_id: str, files: Mapping[str, Blob], private: bool = False):
        self.id, self.owner, self.private = repo_id, repo_id.split("/")[-2], private
        first = Commit(dict(files))
        self.commits = {first.oid: first}
        self.refs = {"main": first}  # branches by name, pull requests as refs/pr/N
        self.objects = {blob.sha256: blob.data for blob in files.values() if blob.lfs}

    def find(self, revision: str) -> Commit:
        """The commit of a branch, pull request or full sha; a `Refusal` if there is none."""
        found = self.refs.get(revision.removeprefix("refs/heads/")) or self.commits.get(revision)
        if found is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def commit(self, revision: str, files: Mapping[str, Blob], as_pull: bool = False) -> Commit:
        """Make `files` the tree of a revision; the same tree again makes no commit."""
        parent = self.find(revision)
        commit = parent if dict(files) == dict(parent.files) else Commit(dict(files), parent.oid)
        self.commits[commit.oid] = commit
        self.objects.update({blob.sha256: blob.data for blob in files.values() if blob.lfs})
        if as_pull:
            revision = f"refs/pr/{sum(ref.startswith('refs/pr/') for ref in self.refs) + 1}"
        self.refs[revision] = commit
        return commit


def folder_entry(path: str) -> dict:
    return {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}


def card_data(files: Mapping[str, Blob]) -> dict:
    """The metadata of a tree's README; a `Refusal` if the Hub does not take it."""
    return check_card(files["README.md"].data.decode("utf-8", "replace")) if "README.md" in files else {}


def check_card(text: str) -> dict:
    match = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---(\r?\n|$)", text, re.DOTALL)
    data = (yaml.safe_load(match.group(1)) if match else None) or {}
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise Refusal(400, '"tags" must be an array of strings')
    return json.loads(json.dumps(data, default=str))


def check_path(path: object) -> str:
    """Return a path that may be committed; a `Refusal` if it leaves the tree."""
    parts = path.split("/") if isinstance(path, str) else [""]
    if any(part in ("", ".", "..", ".git") for part in parts) or "\\" in str(path):
        raise Refusal(400, f"Invalid path in commit: {path!r}")
    return str(path)
