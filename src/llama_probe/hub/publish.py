"""From a head to a repository on the Hub: files, plots and card, checked before anything is sent."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, ModelCard
from transformers.utils import logging

from ..errors import ProbeError
from ..evaluation.plots import write_plots
from ..files import (
    CARD_NAME,
    CONFIG_NAME,
    HEAD_FILES,
    check_new_folder,
    check_writable,
    new_folder,
    read_config,
    read_head,
    save_head,
)
from ..heads.probe import ProbeModel
from .card import create_card, has_own_words, write_card, written_with
from .card_sections import on_the_hub
from .resolve import default_name
from .transport import (
    HubOptions,
    HubReference,
    check_links,
    check_subfolder,
    commit_files,
    download_head,
    full_repo_id,
)


logger = logging.get_logger(__name__)


def push_head(
    probe: ProbeModel,
    repo_id: str,
    *,
    name: str | None = None,
    subfolder: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    tags: str | Sequence[str] | None = None,
    license: str | None = None,
) -> CommitInfo:
    """Uploads a head in one commit: config, weights, a card, and results and plots where it has been measured.

    Args:
        repo_id: `user/name`; created where it does not exist.
        name: of the head, for the commit message.
        subfolder: where to put it in the repository, so that one holds several; the root where left out.
        private, token, revision, create_pr, commit_message: as in `PreTrainedModel.push_to_hub`.
        tags: further tags for the card.
        license: of the head: the stricter of the backbone's and the data's. Warned of where neither this nor the
            results say it.

    Raises:
        ProbeError: the Hub refused, with its reason. Nothing of the push is then kept.
    """
    check_subfolder(subfolder)
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_head(probe, Path(scratch) / (name or "head"))
        create_card(folder)  # results that give no card give no plots either
        write_plots(folder)
        message = commit_message or f"Upload {name or subfolder or 'probe head'} with llama_probe"
        return _push(folder, repo_id, subfolder, private, token, revision, create_pr, message, tags, license)


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
    """Uploads a head folder as it is; the arguments are those of `push_head`.

    A card that was edited by hand is kept; one that was generated is written anew, with the repository's name in it.

    Raises:
        ProbeError: the folder is not a sound head, or has links to files elsewhere, or the Hub refused.
    """
    check_subfolder(subfolder)
    source = Path(folder)
    check_links(source, HEAD_FILES)
    read_head(source)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / source.resolve().name
        copy.mkdir()
        for file in HEAD_FILES:
            if (source / file).is_file():
                shutil.copy(source / file, copy / file)
        message = commit_message or f"Upload {source.resolve().name} with llama_probe"
        return _push(copy, repo_id, subfolder, private, token, revision, create_pr, message, tags, license)


def pull_head(source: str, folder: str | os.PathLike | None = None, options: HubOptions = HubOptions()) -> Path:  # noqa: B008 - frozen
    """Copies a head from the Hub into a folder of one's own.

    Args:
        source: `user/repo`, with `@revision` and `:subfolder` where wanted.
        folder: must not exist, or be empty; a folder of the head's name where left out.
        options: for the Hub.

    Returns:
        The folder.

    Raises:
        ProbeError: the head cannot be fetched or is damaged, or the folder holds something or cannot be made.
    """
    reference = HubReference.parse(source)
    if reference is None:
        raise ProbeError(f"{source!r} is no Hub id: write user/repo, with @revision and :subfolder where wanted")
    target = Path(folder) if folder is not None else Path(default_name(source))
    check_writable(target, "the head")
    check_new_folder(target)
    cached = download_head(reference, options)
    read_head(cached)
    with new_folder(target) as copy:
        for file in HEAD_FILES:
            if (cached / file).is_file():
                shutil.copyfile(cached / file, copy / file)
    return target


def _push(folder, repo_id, subfolder, private, token, revision, create_pr, message, tags, license) -> CommitInfo:
    repo_id = full_repo_id(repo_id, token)
    branch = None if revision is None or revision.startswith("refs/") else revision
    reference = HubReference(repo_id, branch, subfolder)
    source = str(reference)
    if HubReference.parse(source) != reference:
        raise ProbeError(
            f"{source!r} could not be asked for: give a subfolder and a revision without spaces, and no : in a revision"
        )
    base_model = read_config(folder).base_model_name_or_path
    if base_model is not None and not on_the_hub(base_model):
        logger.warning(
            f"the config and card of {source} name the backbone {base_model!r}, which nobody finds elsewhere: put its Hub id into "
            f"base_model_name_or_path of {CONFIG_NAME}"
        )
    _finish_card(folder, source, tags, license)
    prefix = f"{subfolder}/" if subfolder else ""
    files: dict[str, Path | bytes] = {
        f"{prefix}{name}": folder / name for name in HEAD_FILES if (folder / name).is_file()
    }
    if subfolder is not None:
        files[CARD_NAME] = _root_card(base_model).encode()
    return commit_files(
        repo_id,
        files,
        lambda path: path in {f"{prefix}{name}" for name in HEAD_FILES},
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
        only_if_missing=[CARD_NAME] if subfolder else [],
    )


def _finish_card(folder: Path, source: str, tags: str | Sequence[str] | None, license: str | None) -> None:
    path = folder / CARD_NAME
    tags = [tags] if isinstance(tags, str) else tags or []
    if not has_own_words(folder):
        given = written_with(folder) or {"license": None, "tags": []}
        write_card(folder, source=source, license=license or given["license"], tags=[*given["tags"], *tags])
    elif tags or license is not None:  # a card with words of the user's own
        card = _read_card(path)
        card.data.license = license or card.data.license
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags])) or None
        path.write_text(str(card), encoding="utf-8")
    if _read_card(path).data.license is None:
        logger.warning(
            f"the card of {source} states no licence: pass license=, the stricter of the backbone's and the data's"
        )


def _read_card(path: Path) -> ModelCard:
    try:
        return ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except Exception as error:  # whatever its author has written between the dashes
        raise ProbeError(
            f"{path.name} cannot be read as a card: {' '.join(str(error).split())}. Mend it - text in UTF-8, with YAML of the "
            "form 'key: value' between two lines of --- at its top - or remove it, and one is generated"
        ) from None


def _root_card(base_model: str | None) -> str:
    metadata = f"base_model: {base_model}\nbase_model_relation: adapter\n" if on_the_hub(base_model) else ""
    return (
        f"---\n{metadata}library_name: llama_probe\npipeline_tag: text-classification\ntags:\n- llama_probe\n- probe\n---\n\n"
        f"Probe heads for {base_model if on_the_hub(base_model) else 'a causal LM'}, one a folder. Each has its own card."
    )
