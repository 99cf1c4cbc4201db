"""Push a head folder to the Hub, and pull one into a folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from huggingface_hub import CommitInfo
from transformers.utils import logging

from ..errors import ProbeError
from ..files import current_file, new_folder
from .card import head_metadata, is_hub_id, read_card, write_card
from .folder import (
    CARD_NAME,
    CONFIG_NAME,
    HEAD_FILES,
    PROBES_FOLDER,
    RESULTS_NAME,
    read_config_values,
    read_json,
)
from .resolve import default_name
from .transport import HubOptions, HubReference, commit_files, download_head, full_repo_id


logger = logging.get_logger(__name__)


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    subfolder: str | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    tags: str | Sequence[str] | None = None,
    license: str | None = None,
    **kwargs,
) -> CommitInfo:
    """Upload a head folder in one commit: config, weights and card, with the results and plots that it holds.

    The uploaded card names the repository. A card that a person edited is uploaded as it is, with `tags` and `license`.
    The folder does not change. The weights are not checked: load the head first if it comes from someone else.

    Args:
        subfolder: folder in the repository, so that it can hold several heads. Defaults to the root.
        license: SPDX id for the head: the stricter licence of the backbone and the data. Without this, and without a licence
            in the results, a warning is logged.
        token, revision, commit_message, kwargs: see `commit_files`; kwargs are `private` and `create_pr`.
    """
    subfolder = (subfolder or "").rstrip("/") or None  # a load takes "", "a" and "a/" as well
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        _copy_head(Path(folder), copy)
        repo_id = full_repo_id(repo_id, token)
        reference = HubReference(repo_id, None if (revision or "").startswith("refs/") else revision, subfolder)
        if HubReference.parse(str(reference)) != reference:
            raise ProbeError(f"{str(reference)!r} must be user/repo@revision:subfolder, without spaces or a : in them")
        base_model = read_config_values(folder).get("base_model_name_or_path")
        if base_model is not None and not is_hub_id(base_model):
            logger.warning(f"{reference} names the backbone {base_model!r}: put its Hub id into {CONFIG_NAME}")
            hide_local_path(copy)
        tags = [tags] if isinstance(tags, str) else tags or []
        write_card(copy, str(reference))
        card = read_card(copy)
        if tags or license is not None:
            card.data.license = license or card.data.license
            card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags])) or None
            card.save(copy / CARD_NAME)
        if card.data.license is None:
            logger.warning(f"{reference} gives no license: pass license=, the stricter of backbone and data")
        paths = {reference.path(name): copy / name for name in HEAD_FILES}
        files: dict[str, Path | bytes] = {path: file for path, file in paths.items() if file.is_file()}
        # Beside a model, the page of the repository is the model's.
        if subfolder is not None and subfolder.split("/")[0] != PROBES_FOLDER:
            metadata = head_metadata(base_model, tags=["llama_probe", "probe"])
            text = f"Probe heads for {metadata.base_model or 'a causal LM'}, one a folder. Each has its own card."
            files[CARD_NAME] = f"---\n{metadata.to_yaml()}\n---\n\n{text}\n".encode()
        return commit_files(
            repo_id,
            files,
            is_stale=paths.__contains__,
            only_if_missing=[CARD_NAME] if subfolder else [],
            token=token,
            revision=revision,
            commit_message=commit_message or f"Upload {os.path.basename(os.path.abspath(folder))} with llama_probe",
            **kwargs,
        )


def pull_head(
    source: str,
    folder: str | os.PathLike | None = None,
    options: HubOptions = HubOptions(),
    check: Callable[[Path], object] = read_config_values,
) -> Path:
    """Copy a head from the Hub into a folder, and return the folder.

    Args:
        source: `user/repo`, with `@revision` and `:subfolder` if needed.
        folder: a missing or empty folder. Defaults to the head's name.
        check: called with the fetched folder before anything is copied; raises if the head is damaged.
    """
    reference = HubReference.parse(source)
    if reference is None:
        raise ProbeError(f"{source!r} is not a Hub id: write user/repo, with @revision and :subfolder if needed")
    target = Path(folder) if folder is not None else Path(default_name(source))
    cached = download_head(reference, options)
    check(cached)
    with new_folder(target) as copy:
        _copy_head(cached, copy)
    return target


def check_links(folder: Path, files: Iterable[str]) -> None:
    """Raise `ProbeError` if a path or a symbolic link leads out of its folder.

    A link in a stranger's folder could name any file of the user, which would then be read or uploaded. Links from a snapshot in
    the Hub's cache into the `blobs` of its repository, or of the whole cache, are allowed.
    """
    home = folder.resolve()
    allowed = [home]
    for place in home.parents:
        if place.name == "snapshots" and "--" in place.parent.name:
            allowed += [parent / "blobs" for parent in place.parents[:2]]
    for file in files:
        target = current_file(folder, file).resolve()
        if not any(target.is_relative_to(place) for place in allowed):
            raise ProbeError(f"{folder / file} leads out of the folder, to {target}; copy the file")


def hide_local_path(folder: Path) -> None:
    """Replace the local path of the backbone by its last part, in the files of a head that others will see."""
    path = read_config_values(folder)["base_model_name_or_path"]
    if not isinstance(path, str) or is_hub_id(path):
        return
    name = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    in_commands = "/".join(Path(path).parts[-2:]) or path  # see `short_path`
    for file in (folder / CONFIG_NAME, folder / RESULTS_NAME):
        if file.is_file():
            text = json.dumps(read_json(file), indent=2, ensure_ascii=False)
            for place in (path, in_commands):
                text = text.replace(_in_json(place), _in_json(name))
            file.write_text(f"{text}\n", encoding="utf-8")


def _in_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _copy_head(source: Path, target: Path) -> None:
    check_links(source, HEAD_FILES)
    for file in HEAD_FILES:
        path = current_file(source, file)
        if path.is_file():
            shutil.copyfile(path, target / file)
