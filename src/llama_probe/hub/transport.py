"""The Hub: what names a head there, how its files are fetched, and how files are uploaded, in one commit."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
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
from huggingface_hub.utils import validate_repo_id
from transformers.utils.hub import extract_commit_hash

from ..errors import ProbeError
from ..files import CONFIG_NAME, HEAD_FILES, WEIGHTS_NAME, package_version


_FAILED = (HTTPError, OSError)  # an HTTPError where the Hub cannot be reached, both where it refuses
_OFFLINE_PUSH = "HF_HUB_OFFLINE is set: nothing can be pushed; unset it"
_REFERENCE = re.compile(r"(?P<repo_id>[\w.-]+/[\w.-]+)(@(?P<revision>[^:\s]+))?(:(?P<subfolder>[^:\s]+))?")


@dataclass(frozen=True)
class HubReference:
    """A head on the Hub, written `user/repo`, `user/repo@revision`, `user/repo:subfolder` or `user/repo@revision:subfolder`.

    Raises:
        ProbeError: the repository's name is not allowed, or the subfolder is not inside it.
    """

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
        """The reference that a text is, or `None` where it does not look like one."""
        match = _REFERENCE.fullmatch(text)
        if match is None or text.startswith((".", "/")):
            return None
        return cls(**match.groupdict())

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo_id}{revision}" + (f":{self.subfolder}" if self.subfolder else "")


@dataclass(frozen=True)
class HubOptions:
    """How files are fetched; the names and defaults are those of `from_pretrained` in transformers.

    Attributes:
        revision: branch, tag or commit of heads whose reference names none. Never that of the backbone.
        token: `None` for the one that is logged in, `False` for none.
        cache_dir: in place of `HF_HOME`'s.
        local_files_only: do not ask the Hub. `HF_HUB_OFFLINE=1` does the same for all.
        force_download: fetch again what is cached.
        only_config: of a head fetch its config, and leave its weights and what tells of it.
    """

    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)  # tracebacks and logs show what calls were given
    cache_dir: str | os.PathLike | None = None
    local_files_only: bool = False
    force_download: bool = False
    only_config: bool = False

    @classmethod
    def beside(cls, kwargs: dict[str, Any], revision: str | None = None) -> HubOptions:
        """The options for heads that are loaded beside a backbone: all of its keyword arguments but its revision."""
        names = ("token", "cache_dir", "local_files_only", "force_download")
        return cls(revision, **{name: kwargs[name] for name in names if kwargs.get(name) is not None})


def check_subfolder(subfolder: str | None) -> None:
    """Raises `ProbeError` where a subfolder is not a plain relative path inside its repository."""
    if subfolder is None:
        return
    path = PurePosixPath(subfolder)
    plain = "\\" not in subfolder and ":" not in subfolder and str(path) == subfolder
    if not plain or path.is_absolute() or not path.parts or ".." in path.parts:
        raise ProbeError(
            f"subfolder={subfolder!r} must be a relative path inside the repository, like 'toxicchat-mha'"
        )


def download_head(reference: HubReference, options: HubOptions = HubOptions()) -> Path:
    """Fetches the files of a head into the Hub's cache.

    All files are of one commit. With everything cached this asks the Hub once, where `revision` is a branch or a tag,
    and not at all where it is a commit.

    Returns:
        The folder with the files.

    Raises:
        ProbeError: the repository, revision or head does not exist, is not to be read with this token, or is not
            cached while the Hub is out of reach; or a file arrived damaged.
    """
    config = _fetch(reference, CONFIG_NAME, reference.revision or options.revision, options)
    if options.only_config:
        return config.parent
    commit = extract_commit_hash(str(config), None)
    _fetch(reference, WEIGHTS_NAME, commit, options)
    for name in HEAD_FILES:
        if name not in (CONFIG_NAME, WEIGHTS_NAME):
            _fetch_optional(reference, name, commit, options)
    return config.parent


def without_waiting(reference: HubReference, options: HubOptions = HubOptions()) -> HubOptions:
    """The options to look for a head that may not exist: with `local_files_only` where the Hub cannot be reached.

    It is asked once. The client repeats each request for half a minute before it gives a connection up, which is right for a
    head that somebody has pushed, and too long for a word that is a slip of the pen more often than not.
    """
    revision = reference.revision or options.revision
    path = f"{reference.subfolder}/{CONFIG_NAME}" if reference.subfolder else CONFIG_NAME
    cached = try_to_load_from_cache(reference.repo_id, path, cache_dir=options.cache_dir, revision=revision)
    if options.local_files_only or isinstance(cached, str):  # which the client gives back without a connection
        return options
    try:
        HfApi(token=options.token).file_exists(reference.repo_id, path, revision=revision)
    except HfHubHTTPError:  # it has answered
        return options
    except _FAILED:
        return replace(options, local_files_only=True)
    return options


def list_heads(repo_id: str, options: HubOptions = HubOptions()) -> list[str]:
    """Subfolders of a repository that hold a head, `""` for its root. Empty where the repository cannot be read.

    Left out are those whose names cannot be written behind a repository's, such as `a:b`.
    """
    if options.local_files_only:
        return []
    try:
        files = HfApi(token=options.token).list_repo_files(repo_id, revision=options.revision)
    except (*_FAILED, OfflineModeIsEnabled):
        return []
    paths = {PurePosixPath(file) for file in files}
    folders = [path.parent for path in paths if path.name == CONFIG_NAME and path.parent / WEIGHTS_NAME in paths]
    return sorted("" if str(folder) == "." else str(folder) for folder in folders if _can_be_asked_for(folder))


def _can_be_asked_for(folder: PurePosixPath) -> bool:
    try:
        check_subfolder(str(folder) if folder.parts else None)
    except ProbeError:
        return False
    return re.search(r"\s", str(folder)) is None


def full_repo_id(repo_id: str, token: str | bool | None = None) -> str:
    """`repo_id` with the own user's name before it where it has none, for which the Hub is asked.

    Raises:
        ProbeError: it is not allowed, or the Hub does not know the token.
    """
    try:
        validate_repo_id(repo_id)
        return repo_id if "/" in repo_id else HfApi(token=token).get_full_repo_name(repo_id)
    except HFValidationError as error:
        raise ProbeError(f"repo_id={repo_id!r} is not allowed: {error}") from None
    except OfflineModeIsEnabled:
        raise ProbeError(_OFFLINE_PUSH) from None
    except _FAILED as error:
        raise ProbeError(_push_refused(repo_id, error, token)) from None


def check_links(folder: Path, files: Iterable[str]) -> None:
    """Raises `ProbeError` where a symbolic link among the files of a folder leads out of it: somebody else's folder could so
    have any file of the user's uploaded. Folders in the Hub's cache are of links into `blobs` beside them, and go."""
    home = folder.resolve()
    allowed = [home]
    allowed += [p.parent / "blobs" for p in home.parents if p.name == "snapshots" and "--" in p.parent.name]
    for file in files:
        target = (folder / file).resolve()
        if not any(target.is_relative_to(place) for place in allowed):
            raise ProbeError(
                f"{folder / file} is a symbolic link out of the folder, to {target}, and what lies elsewhere is not pushed: put "
                "a copy in its place, or remove it"
            )


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
    """Uploads files in one commit, creating repository and branch where they are missing.

    A push that fails at any point leaves the branch where it was. So does one that changes nothing. Where somebody else
    pushed in the meantime, it is refused rather than merged.

    Args:
        repo_id: `user/name`, or a name for the own user.
        files: contents by path in the repository.
        stale: whether a path that the repository has beside them is to be deleted, as a rest of an earlier version.
        private, token, revision, create_pr, commit_message: as in `PreTrainedModel.push_to_hub`.
        only_if_missing: paths of `files` that do not replace what is there.

    Raises:
        ProbeError: the Hub refused, with its reason.
    """
    repo_id = full_repo_id(repo_id, token)
    api = HfApi(token=token, library_name="llama_probe", library_version=package_version())
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
        there = {item.rfilename for item in info.siblings or []}
        wanted = {path: data for path, data in files.items() if path not in only_if_missing or path not in there}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path, data) for path, data in wanted.items()
        ]
        operations += [CommitOperationDelete(path) for path in sorted(there - set(files)) if stale(path)]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=info.sha,
        )
    except OfflineModeIsEnabled:
        raise ProbeError(_OFFLINE_PUSH) from None
    except (*_FAILED, RuntimeError, ValueError) as error:
        # A RuntimeError wraps what went wrong with a large file, a ValueError says what a path or a card may not hold.
        raise ProbeError(_push_refused(repo_id, error, token)) from None


def _fetch(reference: HubReference, name: str, revision: str | None, options: HubOptions) -> Path:
    try:
        return _download(reference, name, revision, options)
    except LocalEntryNotFoundError:
        where = "is not in the cache" + (f" at {revision}" if revision else "")
        raise ProbeError(
            f"{name} of {reference} {where}, and the Hub was not asked or not reached (local_files_only, HF_HUB_OFFLINE, "
            f"or no connection): fetch it once with a connection{_no_folder(reference)}"
        ) from None
    except EntryNotFoundError:
        raise ProbeError(_not_a_head(reference, name, options)) from None
    except RevisionNotFoundError:
        raise ProbeError(
            f"{reference.repo_id} has no revision {revision!r}: give a branch, a tag or a commit"
        ) from None
    except GatedRepoError:
        raise ProbeError(
            f"{reference.repo_id} is gated: ask for access on its page, and log in (hf auth login) or pass token="
        ) from None
    except RepositoryNotFoundError:
        raise ProbeError(
            f"{reference.repo_id} does not exist on the Hub, or is private and this token may not read it: check the "
            f"name, and log in (hf auth login) or pass token={_no_folder(reference)}"
        ) from None
    except _FAILED as error:
        reason = hide_secrets(_first_line(error), options.token)
        raise ProbeError(f"{name} of {reference} could not be fetched: {reason}") from None


def _no_folder(reference: HubReference) -> str:
    """The end of a message where `a/b`, a Hub id as well, may have been meant for a folder."""
    plain = reference.revision is None and reference.subfolder is None
    return f"; there is no folder {reference} either" if plain and not Path(reference.repo_id).is_dir() else ""


def _fetch_optional(reference: HubReference, name: str, commit: str | None, options: HubOptions) -> Path | None:
    path = f"{reference.subfolder}/{name}" if reference.subfolder else name
    if not options.force_download:
        cached = try_to_load_from_cache(reference.repo_id, path, cache_dir=options.cache_dir, revision=commit)
        if cached is not None:  # a path, or a mark that the commit has no such file
            return Path(cached) if isinstance(cached, str) else None
    try:
        return _download(reference, name, commit, options)
    except (EntryNotFoundError, *_FAILED):  # what only tells of a head must not keep it from running
        return None


def _download(reference: HubReference, name: str, revision: str | None, options: HubOptions) -> Path:
    try:
        path = hf_hub_download(
            reference.repo_id,
            name,
            subfolder=reference.subfolder,
            revision=revision,
            token=options.token,
            cache_dir=options.cache_dir,
            local_files_only=options.local_files_only,
            force_download=options.force_download,
            library_name="llama_probe",
            library_version=package_version(),
        )
    except ValueError as error:  # with force_download the client wraps what went wrong
        if isinstance(error.__cause__, HfHubHTTPError):
            raise error.__cause__ from None
        raise ProbeError(f"{name} of {reference} could not be fetched: {_first_line(error)}") from None
    return Path(path)


def _not_a_head(reference: HubReference, name: str, options: HubOptions) -> str:
    revision = reference.revision or options.revision
    heads = list_heads(
        reference.repo_id, HubOptions(revision, options.token, local_files_only=options.local_files_only)
    )
    inside = [f"{HubReference(reference.repo_id, reference.revision, head or None)}" for head in heads]
    hint = f"; heads in it: {', '.join(inside)}" if inside else ""
    return f"{reference} is not a head: it has no {name}{hint}"


def _push_refused(repo_id: str, error: Exception, token: str | bool | None) -> str:
    error = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    what = " ".join(str(error).split()) if isinstance(error, ValueError) else _first_line(error)
    said = hide_secrets(getattr(error, "server_message", None) or what, token)
    if status == 412 or status == 409:
        return (
            f"somebody else pushed to {repo_id} in the meantime, and nothing of this push was kept: look at what changed, "
            "then push again"
        )
    if status == 401:
        return f"the Hub does not know this token: log in (hf auth login) or pass token=; it said: {said}"
    if status in (403, 404):
        return f"this token may not write to {repo_id}: use one with the role 'write' for it; the Hub said: {said}"
    return f"the push to {repo_id} failed and nothing of it was kept: {said}"


def hide_secrets(text: str, token: str | bool | None = None) -> str:
    """A text without the given token and without anything that looks like one."""
    if isinstance(token, str) and token:
        text = text.replace(token, "***")
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "***", text)


def _first_line(error: Exception) -> str:
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
