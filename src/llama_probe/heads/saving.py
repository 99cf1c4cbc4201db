"""Write the folder of a head in one step, and read its weights with distrust."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers.utils import logging

from ..errors import ProbeError, first_line
from ..files import (
    JSON,
    Content,
    current_file,
    folder_state,
    make_folder,
    package_version,
    remove_leftovers,
    replace_files,
)
from ..hub.card import has_own_card, renew_card
from ..hub.folder import (
    CARD_NAME,
    CONFIG_NAME,
    HEAD_FILES,
    PLOT_NAMES,
    RECIPE_NAME,
    RESULTS_NAME,
    WEIGHTS_NAME,
    is_head_folder,
    read_results,
    training_results,
)
from .configuration import ProbeConfig


logger = logging.get_logger(__name__)

T = TypeVar("T")

_TRIES = 100
_PAUSE = 0.01  # seconds; the clock of a file system tells two saves apart in less
_MAX_HEADER = 2**20  # bytes; the header of a head has some thousand


def save_head(
    folder: str | os.PathLike[str],
    config: ProbeConfig,
    tensors: Mapping[str, torch.Tensor],
    results: JSON | None = None,
) -> Path:
    """Write config, weights, results and a card into a folder, in one step: a kill leaves the old head or the new head.

    Results are dropped, with a warning, if the weights have changed since they were measured. Results, plots and card
    of another head in the folder are removed. A card that a person wrote or edited is kept.

    Args:
        config: of the head. The saved config also has the digest of the weights and the versions of the packages.
        results: contents of results.json, or None if the head was never evaluated.
    """
    folder = Path(folder)
    make_folder(folder)
    weights = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata={"format": "pt"})
    digest = hashlib.sha256(weights).hexdigest()
    versions = {"llama_probe_version": package_version(), "transformers_version": transformers.__version__}
    saved = config.replace(weights_sha256=digest, **versions)
    contents: dict[str, Content] = {CONFIG_NAME: saved.to_json_string().encode(), WEIGHTS_NAME: weights}
    plots: list[str] = []
    kept = [CARD_NAME]  # old files that stay if there are no new ones
    if results is not None and config.weights_sha256 not in (None, digest):
        logger.warning("the head was trained after its results were measured: they are not saved with it")
        results = None
    elif results is not None:
        contents[RESULTS_NAME] = (json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode()
        if _is_same_training(folder, results):
            plots = [name for name in PLOT_NAMES if current_file(folder, name).is_file()]
            kept.append(RECIPE_NAME)
    kept += plots
    if not has_own_card(folder):
        try:
            contents[CARD_NAME] = str(renew_card(folder, saved.to_dict(), results, plots)).encode()
        except Exception as error:  # a card must not keep a head from being saved
            logger.warning(f"the head is saved, and {folder / CARD_NAME} stays as it was: {first_line(error)}")
    remove_leftovers(folder)
    gone: list[str] = []
    if is_head_folder(folder):  # in another folder, files of these names are the user's
        gone = [name for name in HEAD_FILES if name not in contents and name not in kept]
    replace_files(folder, contents, gone)
    return folder


def _is_same_training(folder: Path, results: JSON) -> bool:
    try:
        return training_results(read_results(folder)) == training_results(results)
    except ProbeError:
        return False


def read_consistently(folder: Path, read: Callable[[], T]) -> T:
    """Call a function that reads a head folder. Call it again if another process saved a head into the folder in the meantime."""
    for _ in range(_TRIES):
        before = folder_state(folder, CONFIG_NAME)
        try:
            content = read()
            if folder_state(folder, CONFIG_NAME) == before:
                return content
        except ProbeError:
            time.sleep(_PAUSE)
            if folder_state(folder, CONFIG_NAME) == before:
                raise
    raise ProbeError(f"{folder} cannot be read: heads are saved into it all the time")


def read_tensors(
    folder: str | os.PathLike[str], config: ProbeConfig, shapes: Mapping[str, torch.Size]
) -> dict[str, torch.Tensor]:
    """Read the weights of a head folder, on the CPU.

    Args:
        shapes: shape of each tensor that the config asks for, by name.
    """
    path = current_file(folder, WEIGHTS_NAME)
    if not os.path.isfile(path):
        raise ProbeError(f"{folder} has no {WEIGHTS_NAME}; only safetensors are read")
    largest = 4 * sum(shape.numel() for shape in shapes.values()) + _MAX_HEADER
    try:
        size = path.stat().st_size
        if not 0 < size <= largest:  # a file of /proc has the size 0, and reading it may never end
            raise OSError(f"it has {size} bytes, and its config allows {largest}")
        content = path.read_bytes()
        header = int.from_bytes(content[:8], "little")
        if header > _MAX_HEADER:
            raise OSError(f"its header has {header} bytes")
        tensors = load(content)
    except (SafetensorError, OSError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise ProbeError(f"{path} is damaged or not a safetensors file: {error}") from None
    missing = sorted(shapes.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - shapes.keys())
    if missing or unexpected:
        raise ProbeError(f"{path} does not fit its config: missing {missing[:4]}, unexpected {unexpected[:4]}")
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name] or tensor.dtype != torch.float32:
            actual = f"{name} has the shape {list(tensor.shape)} and is {tensor.dtype}"
            raise ProbeError(f"{path}: {actual}; its config asks for {list(shapes[name])}, torch.float32")
    if config.weights_sha256 is None:
        logger.warning(f"{path}: its config has no weights_sha256, so a change of the weights would not be noticed")
    elif hashlib.sha256(content).hexdigest() != config.weights_sha256:
        raise ProbeError(f"{path} does not belong to its {CONFIG_NAME} (sha256 differs); use force_download=True")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ProbeError(f"{path}: {name} holds NaN or infinity; train the head with a lower learning rate")
    return tensors
