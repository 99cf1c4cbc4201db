"""Heads on the Hub: how they are named, fetched, and uploaded in one commit."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from glob import escape
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import tqdm

from ..errors import ProbeError
from ..files import package_version
from .folder import CONFIG_NAME, HEAD_FILES, WEIGHTS_NAME


# What the Hub's client raises. HTTPError: it cannot reach the Hub. With OSError: the Hub refuses. RuntimeError and ValueError wrap
# these errors, or are about a path or a card.
_FAILED = (HTTPError, OSError, RuntimeError, ValueError)
_FOLDER = re.compile(r"(\w[\w.-]*/)*")
_REFERENCE = re.compile(r"(?P<repo_id>[\w.-]+/[\w.-]+)(@(?P<revision>[^:\s]+))?(:(?P<subfolder>[^:\s]+))?")


@dataclass(frozen=True)
class HubReference:
    """A head on the Hub: `user/repo`, with `@revision` and `:subfolder` if needed."""

    repo_id: str
    revision: str | None = None
    subfolder: str | None = None

    def __post_init__(self):
        check_subfolder(self.subfolder)

    @classmethod
    def parse(cls, text: str) -> HubReference | None:
        """Return the reference that a text spells, or None if it does not look like one."""
        match = _REFERENCE.fullmatch(text)
        return None if match is None or text.startswith((".", "/")) else cls(**match.groupdict())

    @classmethod
    def unless_path(cls, place: str | os.PathLike) -> HubReference | None:
        """Return the reference that a place spells, or None for an existing path and for anything that is no reference."""
        return None if os.path.exists(str(place)) else cls.parse(str(place))

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo_id}{revision}" + (f":{self.subfolder}" if self.subfolder else "")

    def path(self, name: str) -> str:
        """Return the path of one of the head's files in the repository."""
        return f"{self.subfolder}/{name}" if self.subfolder else name


@dataclass(frozen=True)
class HubOptions:
    """Options for fetching files, with the names and defaults of `from_pretrained` in transformers.

    Attributes:
        revision: branch, tag or commit of the head, if its reference names none. It is never the backbone's revision.
        token: None for the token of the user who is logged in, False for no token.
        cache_dir: replaces the cache in `HF_HOME`.
        local_files_only: do not ask the Hub. `HF_HUB_OFFLINE=1` does the same for all calls.
    """

    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)  # tracebacks and logs show reprs
    cache_dir: str | os.PathLike | None = None
    local_files_only: bool = False
    force_download: bool = False

    @classmethod
    def beside(cls, kwargs: Mapping[str, Any], revision: str | None = None) -> HubOptions:
        """Return the options for heads that are loaded with a backbone, from its keyword arguments. `revision` is the heads'."""
        options = {name: kwargs[name] for name in cls.__dataclass_fields__ if kwargs.get(name) is not None}
        return cls(**options | {"revision": revision})


class _NoBar(tqdm):
    """A progress bar that is never shown, because a head is small."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "disable": True})


def hub_api(token: str | bool | None) -> HfApi:
    """Return the Hub's client, which tells the Hub the name and version of this package."""
    return HfApi(token=token, library_name="llama_probe", library_version=package_version())


def check_subfolder(subfolder: str | None) -> None:
    """Raise `ProbeError` unless a subfolder is None or a plain relative path inside its repository."""
    if subfolder is not None and (re.search(r"[\\:]", subfolder) or {"", ".", ".."} & set(subfolder.split("/"))):
        raise ProbeError(f"subfolder={subfolder!r} must be a relative path inside the repository")


def download_head(reference: HubReference, options: HubOptions = HubOptions(), *, only_config: bool = False) -> Path:
    """Fetch a head, or only its config, into the Hub's cache, and return its folder there. All files are of one commit.

    If all files are cached, one request asks for the commit of a branch or tag, and no request is made for a commit.

    Raises:
        ProbeError: the repository, revision or head does not exist, the token may not read it, the Hub is out of reach
            and the head is not cached, or a download broke off. No part of a file is kept then.
    """
    api = hub_api(options.token)
    revision = reference.revision or options.revision
    names = HEAD_FILES[:1] if only_config else HEAD_FILES
    try:
        if (
            options.force_download
        ):  # without this request, the client would take the cached files if the Hub does not answer
            revision = api.model_info(reference.repo_id, revision=revision).sha
        snapshot = api.snapshot_download(
            reference.repo_id,
            revision=revision,
            allow_patterns=[escape(reference.path(name)) for name in names],
            cache_dir=options.cache_dir,
            local_files_only=options.local_files_only,
            force_download=options.force_download,
            tqdm_class=_NoBar,
        )
    except _FAILED as error:
        # `a/b` may have been meant for a folder.
        is_plain = str(reference) == reference.repo_id and not os.path.isdir(reference.repo_id)
        no_folder = f", and there is no folder {reference.repo_id}" if is_plain else ""
        raise ProbeError(f"{reference} cannot be fetched{no_folder}: {reason(error, options.token)}") from None
    folder = Path(snapshot, reference.subfolder or "")
    for name in names[:2]:
        if not os.path.isfile(folder / name):
            asks = not options.local_files_only
            heads = heads_on_hub(reference.repo_id, replace(options, revision=revision)) if asks else []
            listed = ", ".join(str(replace(reference, subfolder=head or None)) for head in heads)
            hint = f"; heads in it: {listed}" if heads else ""
            raise ProbeError(f"{reference} is not a head: it has no {name}{hint}")
    return folder


def heads_on_hub(repo_id: str, options: HubOptions = HubOptions()) -> list[str]:
    """Return the subfolders of a repository that hold a head, `""` for its root. Empty if the repository cannot be read."""
    try:
        info = hub_api(options.token).model_info(repo_id, revision=options.revision)
    except _FAILED:
        return []
    files = {item.rfilename for item in info.siblings or []}
    starts = [file.removesuffix(CONFIG_NAME) for file in files if file.endswith(CONFIG_NAME)]
    heads = [start for start in starts if f"{start}{WEIGHTS_NAME}" in files and _FOLDER.fullmatch(start)]
    return sorted(start.removesuffix("/") for start in heads)


def full_repo_id(repo_id: str, token: str | bool | None = None) -> str:
    """Return `repo_id`, with the user's own name before it if it has none."""
    with _push_errors(repo_id, token):
        return repo_id if "/" in repo_id else hub_api(token).get_full_repo_name(repo_id)


def commit_files(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    is_stale: Callable[[str], bool],
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload with llama_probe",
    only_if_missing: Collection[str] = (),
) -> CommitInfo:
    """Upload files in one commit; create the repository and the branch if they are missing.

    If another commit comes in between, the Hub refuses the push. A push replaces all files or none.

    Args:
        is_stale: returns True for a path in the repository that is not among `files` and is to be deleted.
        private, token, revision, create_pr, commit_message: as in `PreTrainedModel.push_to_hub`.
        only_if_missing: paths of `files` that do not replace an existing file.

    Raises:
        ProbeError: the Hub refused. The message gives the reason, and says whether the files may have been uploaded.
    """
    api = hub_api(token)
    with _push_errors(repo_id, token):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
        there = {item.rfilename for item in info.siblings or []}
        kept = there & set(only_if_missing)
        added = [CommitOperationAdd(path, content) for path, content in files.items() if path not in kept]
        deleted = [CommitOperationDelete(path) for path in sorted(there - set(files)) if is_stale(path)]
    with _push_errors(repo_id, token, is_sent=True):
        return api.create_commit(
            repo_id,
            added + deleted,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=info.sha,
        )


@contextmanager
def _push_errors(repo_id: str, token: str | bool | None, is_sent: bool = False) -> Iterator[None]:
    """Turn errors of a push into one line. With `is_sent` the commit may have reached the Hub."""
    try:
        yield
    except _FAILED as error:
        cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
        status = getattr(getattr(cause, "response", None), "status_code", 500)
        # The Hub may have kept a commit whose answer was lost. All other errors come before the commit.
        is_unknown = is_sent and isinstance(cause, HTTPError) and status >= 500
        outcome = "it is not known if the Hub kept it: look at its page" if is_unknown else "nothing was uploaded"
        raise ProbeError(f"the push to {repo_id} failed, and {outcome}; {reason(error, token)}") from None


def reason(error: Exception, token: str | bool | None) -> str:
    """Return the error of the Hub's client in one line, without the given token and without any text that looks like a token."""
    cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
    text = " ".join(str(cause).split())
    if isinstance(token, str) and token:
        text = text.replace(token, "***")
    return re.sub(r"(hf|api_org)_[A-Za-z0-9]{8,}", "***", text)
