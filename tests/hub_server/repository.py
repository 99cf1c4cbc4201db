"""A repository in memory: commits, and the branches and pull requests that point at them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property


LFS_SUFFIXES = (".safetensors", ".png")


class Refusal(Exception):
    """Ends a request with a status, a message, and the `X-Error-Code` from which the client picks its exception."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.body = status, {"error": message}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


@dataclass(frozen=True)
class Blob:
    """One version of a file; with `lfs` the client downloads it from another origin."""

    data: bytes
    lfs: bool = False

    @cached_property
    def oid(self) -> str:
        """The name under which the client caches the file."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    def entry(self, path: str) -> dict:
        """The file as the API lists it."""
        lfs = {"lfs": {"oid": self.oid, "sha256": self.oid, "size": len(self.data), "pointerSize": 1}}
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

    def find(self, revision: str) -> Commit:
        """The commit of a branch, pull request or full sha; a `Refusal` if there is none."""
        found = self.refs.get(revision.removeprefix("refs/heads/")) or self.commits.get(revision)
        if found is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def commit(self, revision: str, files: Mapping[str, Blob]) -> Commit:
        """Make `files` the tree of a revision, after `main` if it is new; the same tree again makes no commit."""
        parent = self.refs.get(revision, self.refs["main"])
        commit = parent if dict(files) == dict(parent.files) else Commit(dict(files), parent.oid)
        self.commits[commit.oid] = self.refs[revision] = commit
        return commit
