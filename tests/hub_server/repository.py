"""A repository in memory: blobs named by their content, commits, and the refs that point at commits."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property

from .refusal import Refusal, entry_not_found, revision_not_found


LFS_SUFFIXES = (".safetensors", ".png")
FIRST_FILES = {
    ".gitattributes": "".join(f"*{end} filter=lfs diff=lfs merge=lfs -text\n" for end in LFS_SUFFIXES).encode()
}


def git_hash(data: bytes) -> str:
    """SHA-1 by which git names a blob of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Blob:
    """One version of a file; with `lfs` git holds a pointer to it and not the bytes."""

    data: bytes
    lfs: bool = False

    @property
    def size(self) -> int:
        return len(self.data)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @cached_property
    def oid(self) -> str:
        """The name in git: of the bytes, or of the pointer."""
        return git_hash(self.pointer if self.lfs else self.data)

    @property
    def content_oid(self) -> str:
        """The name by which the client sees that a file has not changed, and under which it caches it."""
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """A whole tree with its history; `oid` follows from all of it."""

    files: Mapping[str, Blob]
    title: str
    description: str
    author: str
    date: datetime
    parent: "Commit | None" = field(default=None, repr=False, compare=False)

    @cached_property
    def oid(self) -> str:
        lines = [self.parent.oid if self.parent else "", self.title, self.description, self.author]
        lines += [self.date.isoformat(), *(f"{path}\0{self.files[path].oid}" for path in sorted(self.files))]
        return hashlib.sha1("\n".join(lines).encode()).hexdigest()

    def history(self) -> list["Commit"]:
        """This commit and its ancestors, newest first."""
        commits = [self]
        while commits[-1].parent is not None:
            commits.append(commits[-1].parent)
        return commits


class Repository:
    """A model repository with its refs; it starts with one commit, so that every ref has a commit to point at."""

    def __init__(self, repo_id: str, files: Mapping[str, Blob], private: bool = False):
        self.id, self.owner, self.private = repo_id, repo_id.split("/")[-2], private
        self.gated: bool | str = False
        self.granted: set[str] = set()
        first = Commit(dict(files), "initial commit", "", self.owner, datetime.now(UTC))
        self.created = first.date
        self.commits = {first.oid: first}
        self.branches, self.tags, self.pulls = {"main": first}, {}, {}
        # LFS objects by sha256: those of the commits, and those that were uploaded and not committed (yet).
        self.objects = {blob.sha256: blob.data for blob in files.values() if blob.lfs}

    def find(self, revision: str) -> Commit:
        """The commit of a branch, tag, pull request or full sha; a `Refusal` where there is none."""
        for refs, prefix in ((self.branches, "refs/heads/"), (self.tags, "refs/tags/"), (self.pulls, "refs/pr/")):
            for name, commit in refs.items():
                if revision == f"{prefix}{name}" or (revision == name and refs is not self.pulls):
                    return commit
        if revision in self.commits:
            return self.commits[revision]
        raise revision_not_found(revision)

    def head(self, revision: str) -> Commit:
        """The commit of a revision that can be committed to; a `Refusal` for a tag or a sha."""
        commit = self.find(revision)
        if revision not in self.branches and not revision.startswith("refs/pr/"):
            raise Refusal(400, f"Commits go to a branch, not to {revision}")
        return commit

    def file(self, commit: Commit, path: str) -> Blob:
        """The file at a path; a `Refusal` where there is none."""
        if path not in commit.files:
            raise entry_not_found(path, commit.oid)
        return commit.files[path]

    def commit(
        self,
        revision: str,
        files: Mapping[str, Blob],
        title: str,
        description: str = "",
        author: str | None = None,
        as_pull: bool = False,
    ) -> Commit:
        """Makes `files` the tree of a branch or pull request, in one step; the same tree again makes no commit.

        With `as_pull` the branch stays where it is, and a new pull request points at the commit.
        """
        parent = self.head(revision)
        commit = Commit(dict(files), title, description, author or self.owner, datetime.now(UTC), parent)
        if dict(files) == dict(parent.files):
            commit = parent
        self.commits[commit.oid] = commit
        self.objects.update({blob.sha256: blob.data for blob in files.values() if blob.lfs})
        if as_pull:
            self.pulls[str(len(self.pulls) + 1)] = commit
        elif revision.startswith("refs/pr/"):
            self.pulls[revision.removeprefix("refs/pr/")] = commit
        else:
            self.branches[revision] = commit
        return commit


def check_path(path: object) -> str:
    """Returns a path that may be committed; a `Refusal` for one that leaves the tree or that git would not hold."""
    parts = path.split("/") if isinstance(path, str) else [""]
    if any(part in ("", ".", "..") or part.lower() == ".git" for part in parts) or re.search(
        r"[\0-\x1f\\]", str(path)
    ):
        raise Refusal(400, f"Invalid path in commit: {path!r}")
    return str(path)


def check_tree(files: Mapping[str, Blob]) -> None:
    """A `Refusal` where one name is both a file and a folder."""
    for path in files:
        folders = [path[: match.start()] for match in re.finditer("/", path)]
        if clash := next((folder for folder in folders if folder in files), None):
            raise Refusal(400, f"{clash} cannot be both a file and a folder")
