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
from ..files import check_new_folder, check_writable, current_file, new_folder
from .card import has_own_card, is_hub_id, read_card, write_card
from .folder import CARD_NAME, CONFIG_NAME, HEAD_FILES, RESULTS_NAME, read_config_values
from .resolve import default_name
from .transport import HubOptions, HubReference, commit_files, download_head, full_repo_id


logger = logging.get_logger(__name__)


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    subfolder: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    tags: str | Sequence[str] | None = None,
    license: str | None = None,
) -> CommitInfo:
    """Upload a head folder in one commit: config, weights and card, with the results and plots that it holds.

    The uploaded card names the repository. A card that a person edited is uploaded as it is, with `tags` and `license`.
    The folder is not changed. Its weights are not read: load it first if it comes from someone else.

    Args:
        folder: a head folder.
        repo_id: `user/name`; created if it does not exist.
        subfolder: folder in the repository, so that it can hold several heads. Defaults to the root.
        private, token, revision, create_pr, commit_message: as in `PreTrainedModel.push_to_hub`.
        tags: further tags for the card.
        license: SPDX id for the head: the stricter one of the backbone's and the data's. A warning is logged if
            neither this nor the results give one.

    Raises:
        ProbeError: the folder is not a head, its card cannot be made, a file is a link out of the folder, or the Hub
            refused. Nothing is uploaded then.
    """
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / folder.resolve().name
        copy.mkdir()
        _copy_head(folder, copy)
        repo_id = full_repo_id(repo_id, token)
        reference = HubReference(repo_id, None if (revision or "").startswith("refs/") else revision, subfolder)
        if HubReference.parse(str(reference)) != reference:
            raise ProbeError(f"{str(reference)!r}: no spaces in subfolder and revision, no : in revision are allowed")
        base_model = read_config_values(copy).get("base_model_name_or_path")
        if base_model is not None and not is_hub_id(base_model):
            logger.warning(
                f"the card of {reference} names the backbone {base_model!r}: put its Hub id into {CONFIG_NAME}"
            )
            hide_local_path(copy)
        _finish_card(copy, str(reference), [tags] if isinstance(tags, str) else tags or [], license)
        names = {name: reference.path(name) for name in HEAD_FILES}
        files: dict[str, Path | bytes] = {path: copy / name for name, path in names.items() if (copy / name).is_file()}
        if subfolder is not None:
            files[CARD_NAME] = _root_card(base_model).encode()
        return commit_files(
            repo_id,
            files,
            lambda path: path in names.values(),
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or f"Upload {folder.resolve().name} with llama_probe",
            only_if_missing=[CARD_NAME] if subfolder else [],
        )


def pull_head(
    source: str,
    folder: str | os.PathLike | None = None,
    options: HubOptions = HubOptions(),  # noqa: B008 - frozen
    check: Callable[[Path], object] = read_config_values,
) -> Path:
    """Copy a head from the Hub into a folder.

    Args:
        source: `user/repo`, with `@revision` and `:subfolder` if needed.
        folder: a missing or empty folder. Defaults to the head's name.
        options: for the Hub.
        check: called with the fetched folder before anything is copied; raises if the head is damaged.

    Returns:
        The folder.

    Raises:
        ProbeError: the head cannot be fetched or is damaged, or the folder is not empty or cannot be made.
    """
    reference = HubReference.parse(source)
    if reference is None:
        raise ProbeError(f"{source!r} is not a Hub id: write user/repo, with @revision and :subfolder if needed")
    target = Path(folder) if folder is not None else Path(default_name(source))
    check_writable(target, "the head")
    check_new_folder(target)
    cached = download_head(reference, options)
    check(cached)
    with new_folder(target) as copy:
        _copy_head(cached, copy)
    return target


def check_links(folder: Path, files: Iterable[str]) -> None:
    """Raise `ProbeError` if a file is a symbolic link out of its folder.

    A link in a stranger's folder could have any of the user's files uploaded. Links from a snapshot in the Hub's cache
    into its `blobs` are allowed.
    """
    home = folder.resolve()
    allowed = [home]
    allowed += [p.parent / "blobs" for p in home.parents if p.name == "snapshots" and "--" in p.parent.name]
    for file in files:
        target = current_file(folder, file).resolve()
        if not any(target.is_relative_to(place) for place in allowed):
            raise ProbeError(f"{folder / file} is a symbolic link out of the folder, to {target}; copy the file")


def hide_local_path(folder: Path) -> None:
    """Replace the path of the backbone on this machine by its last part, in the files of a head that others will see."""
    config = read_config_values(folder)
    path = config["base_model_name_or_path"]
    if not isinstance(path, str) or is_hub_id(path):
        return
    name = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    text = json.dumps(config | {"base_model_name_or_path": name}, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    results = folder / RESULTS_NAME
    if results.is_file():
        old, new = (json.dumps(word, ensure_ascii=False)[1:-1] for word in (path, name))
        results.write_text(results.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def _copy_head(source: Path, target: Path) -> None:
    """Copy the files of a head, none of which may be a link out of its folder."""
    check_links(source, HEAD_FILES)
    for file in HEAD_FILES:
        if os.path.isfile(path := current_file(source, file)):
            shutil.copyfile(path, target / file)


def _finish_card(folder: Path, source: str, tags: Sequence[str], license: str | None) -> None:
    if not has_own_card(folder):
        write_card(folder, source, license, tags)
    card = read_card(folder)
    if tags or license is not None:
        card.data.license = license or card.data.license
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags])) or None
        card.save(folder / CARD_NAME)
    if card.data.license is None:
        logger.warning(f"the card of {source} gives no license: pass license=, the stricter of backbone and data")


def _root_card(base_model: str | None) -> str:
    metadata = f"base_model: {base_model}\nbase_model_relation: adapter\n" if is_hub_id(base_model) else ""
    return (
        f"---\n{metadata}library_name: llama_probe\npipeline_tag: text-classification\ntags:\n- llama_probe\n- probe\n---\n\n"
        f"Probe heads for {base_model if is_hub_id(base_model) else 'a causal LM'}, one a folder. Each has its own card."
    )
