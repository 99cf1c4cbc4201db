"""Heads on the Hub: how they are named, fetched, and uploaded in one commit."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, TypeVar

from huggingface_hub import (
    _CACHED_NO_EXIST,
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    constants,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash
from transformers.utils.hub import extract_commit_hash

from ..errors import ProbeError, first_line
from ..files import package_version
from .folder import CONFIG_NAME, HEAD_FILES, WEIGHTS_NAME


T = TypeVar("T")

_FAILED = (HTTPError, OSError)  # HTTPError: the Hub cannot be reached; both: it refuses
_REFUSED = (400, 401, 403, 404, 413, 422)  # answers to a commit after which nothing of it can be there
_OVERTAKEN = (409, 412)
_PATIENCE = 5  # times the client's timeout, for all files of a head
_FOLDER = re.compile(r"(\w[\w.-]*/)*")
_REFERENCE = re.compile(r"(?P<repo_id>[\w.-]+/[\w.-]+)(@(?P<revision>[^:\s]+))?(:(?P<subfolder>[^:\s]+))?")


@dataclass(frozen=True)
class HubReference:
    """A head on the Hub: `user/repo`, with `@revision` and `:subfolder` if needed."""

    repo_id: str
    revision: str | None = None
    subfolder: str | None = None

    def __post_init__(self):
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise ProbeError(f"{self.repo_id!r} cannot name a repository on the Hub: {error}") from None
        check_subfolder(self.subfolder)

    @classmethod
    def parse(cls, text: str) -> HubReference | None:
        """Return the reference that a text spells, or None if it does not look like one."""
        match = _REFERENCE.fullmatch(text)
        if match is None or text.startswith((".", "/")):
            return None
        return cls(**match.groupdict())

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
        revision: branch, tag or commit of heads whose reference names none. Never the backbone's.
        token: None for the one that is logged in, False for none.
        cache_dir: replaces the cache in `HF_HOME`.
        local_files_only: do not ask the Hub. `HF_HUB_OFFLINE=1` does the same for all calls.
        force_download: fetch cached files again.
        trust_remote_code: run the code file of a head whose kind the package does not have.
    """

    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)  # tracebacks and logs show reprs
    cache_dir: str | os.PathLike | None = None
    local_files_only: bool = False
    force_download: bool = False
    trust_remote_code: bool = False

    @classmethod
    def beside(cls, kwargs: Mapping[str, Any], revision: str | None = None) -> HubOptions:
        """Return the options for heads that are loaded with a backbone: its keyword arguments but its revision."""
        names = ("token", "cache_dir", "local_files_only", "force_download", "trust_remote_code")
        return cls(revision, **{name: kwargs[name] for name in names if kwargs.get(name) is not None})


def _api(token: str | bool | None) -> HfApi:
    return HfApi(token=token, library_name="llama_probe", library_version=package_version())


def check_subfolder(subfolder: str | None) -> None:
    """Raise `ProbeError` unless a subfolder is None or a plain relative path inside its repository."""
    if subfolder is None:
        return
    path = PurePosixPath(subfolder)
    plain = "\\" not in subfolder and ":" not in subfolder and str(path) == subfolder
    if not plain or path.is_absolute() or not path.parts or ".." in path.parts:
        raise ProbeError(f"subfolder={subfolder!r} must be a relative path inside the repository")


def download_head(reference: HubReference, options: HubOptions = HubOptions(), *, only_config: bool = False) -> Path:
    """Fetch the files of a head, or its config alone, all of one commit, into the Hub's cache.

    If everything is cached, the Hub is asked once for a branch or a tag, and not at all for a commit.

    Returns:
        The folder with the files.

    Raises:
        ProbeError: the repository, revision or head does not exist, this token may not read it, it is not cached and
            the Hub is out of reach, it takes longer than five times `HF_HUB_DOWNLOAD_TIMEOUT`, or a file arrived damaged
            twice.
    """

    def fetch() -> Path:
        config = _fetch(reference, CONFIG_NAME, reference.revision or options.revision, options)
        if only_config:
            return config.parent
        commit = extract_commit_hash(str(config), None)
        _fetch(reference, WEIGHTS_NAME, commit, options)
        for name in HEAD_FILES[2:]:
            path = reference.path(name)
            cached = try_to_load_from_cache(reference.repo_id, path, cache_dir=options.cache_dir, revision=commit)
            if cached is not _CACHED_NO_EXIST or options.force_download:
                with suppress(*_FAILED):  # a head runs without the files that describe it
                    _download(reference, name, commit, options)
        return config.parent

    return _in_time(fetch, str(reference))


def _in_time(ask: Callable[[], T], what: str) -> T:
    """Call a function that asks the Hub, in a thread that is abandoned if it takes too long.

    The client's own timeout is for each read, and a Hub that sends one byte a second never exceeds it.
    """
    limit, answer = constants.HF_HUB_DOWNLOAD_TIMEOUT, Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=copy_context().run, args=(run,), name="hub", daemon=True).start()
    if not wait([answer], _PATIENCE * limit).done:
        raise ProbeError(
            f"{what} was not fetched in {_PATIENCE * limit:g} s: set HF_HUB_DOWNLOAD_TIMEOUT above {limit:g}"
        )
    return answer.result()


def without_waiting(reference: HubReference, options: HubOptions) -> HubOptions:
    """Return options for a head: with `local_files_only` if it is not cached and the Hub does not answer one request.

    The client would repeat a failed request for half a minute.
    """
    revision, path = reference.revision or options.revision, reference.path(CONFIG_NAME)
    cached = try_to_load_from_cache(reference.repo_id, path, cache_dir=options.cache_dir, revision=revision)
    is_known = options.local_files_only or isinstance(cached, str)  # the client needs no connection for it
    if is_known or _hub_answers(reference.repo_id, path, revision, options.token):
        return options
    return replace(options, local_files_only=True)


def is_within_reach(place: str | os.PathLike, kwargs: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Return False if a Hub id is not cached and the Hub must not be asked or does not answer.

    Args:
        place: folder, file or Hub id of a backbone or a head. Anything else is not checked.
        kwargs: keyword arguments of its `from_pretrained`, for the token, the cache and offline settings.
    """
    is_name = isinstance(place, (str, os.PathLike)) and not os.path.exists(place)
    reference, options = HubReference.parse(str(place)) if is_name else None, HubOptions.beside(kwargs)
    if reference is None:
        return True
    name = repo_folder_name(repo_id=reference.repo_id, repo_type="model")
    if Path(options.cache_dir or constants.HF_HUB_CACHE, name, "snapshots").is_dir():
        return True
    return not options.local_files_only and _hub_answers(reference.repo_id, "config.json", None, options.token)


def check_within_reach(place: str | os.PathLike, kwargs: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Raise `ProbeError` unless a Hub id is cached or the Hub answers. The client would try for over a minute, file by file."""
    if not kwargs.get("local_files_only") and not is_within_reach(place, kwargs):
        raise ProbeError(f"{place} is not in the cache, and the Hub does not answer; `llama-probe demo` needs no Hub")


def _hub_answers(repo_id: str, path: str, revision: str | None, token: str | bool | None) -> bool:
    """Ask the Hub once for a file; False if there is no answer."""
    try:
        _in_time(lambda: _api(token).file_exists(repo_id, path, revision=revision), path)
    except HfHubHTTPError:
        return True
    except _FAILED:
        return False
    return True


def heads_on_hub(repo_id: str, options: HubOptions = HubOptions()) -> list[str]:
    """Return the plainly named subfolders of a repository that hold a head, `""` for its root; empty if it cannot be read."""
    if options.local_files_only:
        return []
    try:
        info = _api(options.token).model_info(repo_id, revision=options.revision)
    except _FAILED:
        return []
    files = {item.rfilename for item in info.siblings or []}
    starts = [file.removesuffix(CONFIG_NAME) for file in files if file.endswith(CONFIG_NAME)]
    heads = [start for start in starts if f"{start}{WEIGHTS_NAME}" in files and _FOLDER.fullmatch(start)]
    return sorted(start.removesuffix("/") for start in heads)


def full_repo_id(repo_id: str, token: str | bool | None = None) -> str:
    """Return `repo_id`, with the user's own name before it if it has none."""
    with _push_errors(repo_id, token):
        return repo_id if "/" in repo_id else _api(token).get_full_repo_name(repo_id)


def commit_files(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    stale: Callable[[str], bool],
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload with llama_probe",
    only_if_missing: Collection[str] = (),
) -> CommitInfo:
    """Upload files in one commit; create the repository and the branch if they are missing.

    A push is refused if another one came in between. If the answer to a push is lost, the branch is looked at for its
    files.

    Args:
        repo_id: `user/name`, or a name for the own user.
        files: contents by path in the repository.
        stale: tells if another file of the repository is a rest of an earlier version and is deleted.
        private, token, revision, create_pr, commit_message: as in `PreTrainedModel.push_to_hub`.
        only_if_missing: paths of `files` that do not replace an existing file.

    Raises:
        ProbeError: the Hub refused; the message gives its reason, and says if it is not known that nothing was uploaded.
    """
    api = _api(token)
    with _push_errors(repo_id, token):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
        there = {item.rfilename for item in info.siblings or []}
        wanted = {path: data for path, data in files.items() if path not in only_if_missing or path not in there}
        gone = [path for path in sorted(there - set(files)) if stale(path)]
        try:
            return api.create_commit(
                repo_id,
                [CommitOperationAdd(path, data) for path, data in wanted.items()]
                + [CommitOperationDelete(path) for path in gone],
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=info.sha,
            )
        except (*_FAILED, RuntimeError) as error:
            if _status(error) in _REFUSED:
                raise
            found = None
            if not create_pr:
                with suppress(*_FAILED):
                    found = api.model_info(repo_id, revision=revision, files_metadata=True)
            if found is not None and found.sha != info.sha and _holds(found, wanted, gone):
                url = f"{api.endpoint}/{repo_id}/commit/{found.sha}"
                return CommitInfo(url, commit_message, "", found.sha, _endpoint=api.endpoint)
            if _status(error) in _OVERTAKEN or (found is not None and found.sha == info.sha):
                raise
            raise ProbeError(
                f"the push to {repo_id} failed, and it is not known if it was kept: look at its page; "
                f"the Hub said: {hide_secrets(first_line(error), token)}"
            ) from None


def _holds(info: ModelInfo, wanted: Mapping[str, Path | bytes], gone: Collection[str]) -> bool:
    """Return True if a branch has the files of a push, and none that it removes."""
    found = {item.rfilename: item.lfs.sha256 if item.lfs else item.blob_id for item in info.siblings or []}
    contents = {path: data if isinstance(data, bytes) else data.read_bytes() for path, data in wanted.items()}
    return found.keys().isdisjoint(gone) and all(
        path in found and _has_digest(content, found[path]) for path, content in contents.items()
    )


def _fetch(reference: HubReference, name: str, revision: str | None, options: HubOptions) -> Path:
    repo_id = reference.repo_id
    # `a/b` may have been meant for a folder.
    is_plain = str(reference) == repo_id and not os.path.isdir(repo_id)
    no_folder = f"; there is no folder {repo_id} either" if is_plain else ""
    try:
        return _download(reference, name, revision, options)
    except LocalEntryNotFoundError as error:
        refused = isinstance(error.__cause__, HfHubHTTPError)
        why = f"the Hub refused: {first_line(error.__cause__)}" if refused else "the Hub was not asked or not reached"
        problem = f"{name} of {reference} is not in the cache, and {why}{no_folder}"
    except EntryNotFoundError:
        at = replace(options, revision=reference.revision or options.revision)
        heads = [str(replace(reference, subfolder=head or None)) for head in heads_on_hub(repo_id, at)]
        listed = f"; heads in it: {', '.join(heads)}" if heads else ""
        problem = f"{reference} is not a head: it has no {name}{listed}"
    except RevisionNotFoundError:
        problem = f"{repo_id} has no revision {revision!r}; give a branch, a tag or a commit"
    except GatedRepoError:
        problem = f"{repo_id} is gated: ask for access on its page, and log in or pass token="
    except RepositoryNotFoundError:
        problem = (
            f"{repo_id} does not exist on the Hub, or is hidden: log in (hf auth login) or pass token={no_folder}"
        )
    except _FAILED as error:
        problem = f"{name} of {reference} could not be fetched: {first_line(error)}"
    raise ProbeError(hide_secrets(problem, options.token))


def _download(reference: HubReference, name: str, revision: str | None, options: HubOptions) -> Path:
    """Download a file, and once more if it is damaged, be it in the cache or on its way."""
    download = partial(
        _api(options.token).hf_hub_download,
        reference.repo_id,
        name,
        subfolder=reference.subfolder,
        revision=revision,
        cache_dir=options.cache_dir,
        local_files_only=options.local_files_only,
    )
    is_local = options.local_files_only or constants.HF_HUB_OFFLINE
    try:
        for force in (options.force_download, True):
            path = Path(download(force_download=force))
            if is_local or _is_intact(path):  # a damaged head is refused when it is read
                return path
    except ValueError as error:  # with force_download the client wraps the HTTP error
        if isinstance(error.__cause__, HfHubHTTPError):
            raise error.__cause__ from None
        raise ProbeError(f"{name} of {reference} could not be fetched: {first_line(error)}") from None
    raise ProbeError(f"{name} of {reference} arrived damaged twice: its digest is not the Hub's")


def _is_intact(path: Path) -> bool:
    """Return False if a file of the cache has another content than the digest says that its blob is named by."""
    digest = path.resolve().name
    return not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", digest) or _has_digest(path.read_bytes(), digest)


def _has_digest(content: bytes, digest: str) -> bool:
    """Return True if the Hub calls a content so: the sha256 of a large file, git's own hash of another."""
    return digest == (hashlib.sha256(content).hexdigest() if len(digest) == 64 else git_hash(content))


@contextmanager
def _push_errors(repo_id: str, token: str | bool | None) -> Iterator[None]:
    try:
        yield
    except ProbeError:
        raise
    except OfflineModeIsEnabled:
        raise ProbeError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it") from None
    except (*_FAILED, RuntimeError, ValueError) as error:
        # RuntimeError wraps a failed upload of a large file; ValueError is about a path or the card's metadata.
        status, error = _status(error), error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
        what = " ".join(str(error).split()) if isinstance(error, ValueError) else first_line(error)
        said = f"the Hub said: {hide_secrets(getattr(error, 'server_message', None) or what, token)}"
        problem = f"the push to {repo_id} failed and nothing was uploaded; {said}"
        if status in _OVERTAKEN:
            problem = f"someone else pushed to {repo_id} in the meantime; nothing was uploaded, push again"
        elif status == 401:
            problem = f"the Hub does not know this token: log in (hf auth login) or pass token=; {said}"
        elif status in (403, 404):
            problem = f"this token may not write to {repo_id}: use one with the role 'write'; {said}"
        raise ProbeError(problem) from None


def _status(error: Exception) -> int | None:
    error = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
    return getattr(getattr(error, "response", None), "status_code", None)


def hide_secrets(text: str, token: str | bool | None = None) -> str:
    """Return a text without the given token and without anything that looks like a token."""
    if isinstance(token, str) and token:
        text = text.replace(token, "***")
    return re.sub(r"(hf|api_org)_[A-Za-z0-9]{8,}", "***", text)
