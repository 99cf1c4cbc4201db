"""A head folder on disk: config, weights and measured results, written atomically and read with distrust."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers.utils import logging

from .errors import ProbeError
from .heads.configuration import ProbeConfig
from .heads.match import check_backbone
from .heads.probe import ProbeModel


logger = logging.get_logger(__name__)

CONFIG_NAME = "probe_config.json"
WEIGHTS_NAME = "probe_model.safetensors"
RESULTS_NAME = "results.json"
CARD_NAME = "README.md"
PLOT_NAMES = ("calibration.png", "layer_weights.png")

# All that a head folder, and so a head on the Hub, consists of. The first two make the head, the rest tells of it.
HEAD_FILES = (CONFIG_NAME, WEIGHTS_NAME, RESULTS_NAME, CARD_NAME, *PLOT_NAMES)

DISK_FULL = "there is no room for it. Make some, or name a folder on another disk"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

MAX_JSON_BYTES = 4 * 2**20


def is_head_folder(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a head."""
    return (Path(folder) / CONFIG_NAME).is_file()


def check_output(folder: str | os.PathLike) -> None:
    """Makes sure that a head can be written into a folder without the loss of anything but a head.

    Raises:
        ProbeError: it or what it lies in is a file, or it holds a card or results that belong to no head.
    """
    folder = Path(folder)
    check_writable(folder, "the head")
    if not is_head_folder(folder) and (taken := [name for name in HEAD_FILES if (folder / name).exists()]):
        raise ProbeError(
            f"{folder} holds a {taken[0]} that belongs to no head, and would be lost: name another folder"
        )


def check_writable(folder: Path, content: str) -> None:
    """Makes sure, before any work is done, that something can be written into a folder, which need not be there yet.

    Args:
        content: that is to be written, for the message.

    Raises:
        ProbeError: it or what it lies in is a file, or is closed to the user.
    """
    try:
        there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    except OSError as error:  # such as a name that is too long
        raise ProbeError(f"{str(folder)[:60]!r} cannot be a folder: {error.strerror}") from None
    if there.exists() and not there.is_dir():
        raise ProbeError(f"{there} is a file; name a folder for {content}")
    if there.exists() and not os.access(there, os.W_OK):
        raise ProbeError(f"nothing can be written into {there}: name another folder, or change its permissions")


def make_folder(folder: Path) -> None:
    """Makes a folder, and those that it lies in, where they are missing.

    Raises:
        ProbeError: it cannot be made, with the system's reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProbeError(f"the folder {folder} cannot be made: {error.strerror}") from error


def check_new_folder(folder: Path) -> None:
    """Raises `ProbeError` where a folder is neither new nor empty."""
    if (folder.exists() or folder.is_symlink()) and (not folder.is_dir() or any(folder.iterdir())):
        raise ProbeError(f"{folder} exists and is not an empty folder: give another one, or remove it")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write in, whose files lie in `folder` at the end of the block; nothing is left behind where that raises.

    An empty folder that is there is filled, and not exchanged: it may be a link, a mount, or where somebody is working.

    Raises:
        ProbeError: `folder` is neither new nor empty, or cannot be made.
    """
    check_new_folder(folder)
    make_folder(folder.parent)
    there = folder.is_dir()
    with tempfile.TemporaryDirectory(dir=folder if there else folder.parent, prefix=f".{folder.name}.") as scratch:
        written = Path(scratch) / "new"
        written.mkdir()
        yield written
        if not there:
            written.replace(folder)
            return
        # What makes it a head or a model comes last.
        for item in sorted(written.iterdir(), key=lambda item: item.name.endswith("config.json")):
            item.replace(folder / item.name)


def save_head(probe: ProbeModel, folder: str | os.PathLike) -> Path:
    """Writes a head, and nothing of its backbone, into a folder: config, weights, and its results where it has some.

    All files are written under temporary names and then renamed, so that a reader never sees half of one. Results are
    left out, with a warning, where the weights are no longer those that they were measured on. Results and plots that
    another head left in the folder are removed: they would pass for this one's.

    Returns:
        The folder.

    Raises:
        ProbeError: `folder` cannot be made or written into; see `check_writable`.
    """
    folder = Path(folder)
    check_writable(folder, "the head")
    make_folder(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in probe.state_dict().items()}
    weights = save(tensors, metadata={"format": "pt"})
    digest = hashlib.sha256(weights).hexdigest()
    config = probe.config.replace(
        weights_sha256=digest, llama_probe_version=package_version(), transformers_version=transformers.__version__
    )
    # The config first: where a kill leaves one without the other, it is what tells that the folder is a head's, and whose.
    writers: dict[Path, Callable[[Path], object]] = {
        folder / CONFIG_NAME: lambda path: path.write_text(config.to_json_string(), encoding="utf-8"),
        folder / WEIGHTS_NAME: lambda path: path.write_bytes(weights),
    }
    measured = folder / RESULTS_NAME
    outdated = [folder / name for name in (RESULTS_NAME, *PLOT_NAMES)]
    if probe.results is not None:
        if probe.config.weights_sha256 in (None, digest):
            text = json.dumps(probe.results, indent=2, ensure_ascii=False) + "\n"
            writers[measured] = lambda path: path.write_text(text, encoding="utf-8")
            same = measured.is_file() and measured.read_bytes() == text.encode()
            outdated = [] if same else outdated
        else:
            logger.warning("the head has been trained on since its results were measured: they are not saved with it")
    write_atomically(writers, outdated if is_head_folder(folder) else ())
    return folder


def save_config(config: ProbeConfig, folder: str | os.PathLike) -> None:
    """Writes a config, and no weights, into a folder.

    Raises:
        ProbeError: as for `check_output`.
    """
    check_output(folder)
    make_folder(folder)
    write_atomically(
        {Path(folder) / CONFIG_NAME: lambda path: path.write_text(config.to_json_string(), encoding="utf-8")}
    )


def read_config(folder: str | os.PathLike) -> ProbeConfig:
    """Reads and checks the config of a head folder; keys of other versions are left out with a warning.

    Raises:
        ProbeError: the file is missing, too large, no JSON object, or holds a value that is not allowed.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        found = sorted(item.name for item in Path(folder).iterdir()) if Path(folder).is_dir() else []
        hint = ". A Trainer writes weights alone: probe.save_pretrained(...) makes a head of them"
        raise ProbeError(
            f"{folder} is not a head folder: it has no {CONFIG_NAME} (found: {', '.join(found[:8]) or 'nothing'})"
            + (hint if "training_args.bin" in found else "")
        )
    try:
        config, unknown = ProbeConfig.from_dict(_read_json(path))
    except ProbeError as error:
        raise error if str(path) in str(error) else ProbeError(f"{path}: {error}") from None
    if unknown:
        logger.warning(
            f"{path}: unknown keys are left out (written by another version?): {', '.join(map(repr, unknown[:8]))}"
        )
    return config


def read_results(folder: str | os.PathLike) -> dict[str, Any] | None:
    """What was measured of the head in a folder; `None` where nothing was.

    Raises:
        ProbeError: the file is too large or no JSON object.
    """
    path = Path(folder) / RESULTS_NAME
    if not path.is_file():
        return None
    results = _read_json(path)
    if not isinstance(results, dict):
        raise ProbeError(f"{path} must be a JSON object, not {type(results).__name__}")
    return results


def chosen_run(results: dict[str, Any]) -> dict[str, Any]:
    """What results hold of the head that was kept, beside those of other seeds.

    Raises:
        ProbeError: nothing.
    """
    try:
        return next(run for run in results["runs"] if run["seed"] == results["chosen_seed"])
    except (LookupError, TypeError, StopIteration) as error:
        raise ProbeError(
            f"the {RESULTS_NAME} of this head is nothing that this version can read: it has no run of a chosen seed. Remove the "
            "file; the head runs without"
        ) from error


def read_head(folder: str | os.PathLike, backbone: torch.nn.Module | None = None) -> ProbeModel:
    """Reads a head folder into a `ProbeModel` on the CPU, in eval mode.

    The names, shapes and dtypes that the safetensors header declares are compared with those that the config asks for
    before any tensor is read, and the file's digest with the one that was stamped into the config.

    Raises:
        ProbeError: a file is missing or damaged, a tensor is missing, unexpected, of a wrong shape or dtype, or holds
            something other than finite numbers, or the weights are those of another head.
    """
    config = read_config(folder)
    if config.hidden_size is None or config.num_hidden_layers is None:
        raise ProbeError(
            f"{Path(folder) / CONFIG_NAME} lacks hidden_size or num_hidden_layers: the head cannot be rebuilt"
        )
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise ProbeError(f"{folder} has no {WEIGHTS_NAME}; only safetensors are read")
    try:
        with torch.device("meta"):
            skeleton = ProbeModel(config)
        expected = {name: list(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise ProbeError(f"{Path(folder) / CONFIG_NAME} describes a head that cannot be built: {error}") from None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            _check_header(path, file, expected)
            _check_digest(path, config)
            tensors = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, ProbeError):
            raise
        raise ProbeError(f"{path} is damaged or not a safetensors file: {error}") from None
    if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ProbeError(
            f"{path}: {wrong[0]} holds values that are no finite numbers, and every score of the head would be none: get "
            "another head, or train it anew with a lower learning rate"
        )
    probe = ProbeModel(config)
    probe.load_state_dict(tensors, strict=True)
    probe.results = read_results(folder)
    if backbone is not None:
        check_backbone(Path(folder).name, config, backbone)
        probe.set_backbone(backbone)
    return probe.eval()


def _read_json(path: Path) -> Any:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ProbeError(f"{path} is larger than {MAX_JSON_BYTES} bytes and is not read")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ProbeError(f"{path} is not valid JSON: {error}") from None


def _check_digest(path: Path, config: ProbeConfig) -> None:
    if config.weights_sha256 is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != config.weights_sha256:
        raise ProbeError(
            f"{path} does not belong to the {CONFIG_NAME} beside it: its sha256 is {found[:12]}..., the config was saved "
            f"with {config.weights_sha256[:12]}... Fetch or save the head again"
        )


def _check_header(path: Path, file, expected: dict[str, list[int]]) -> None:
    found = set(file.keys())
    missing, unexpected = sorted(set(expected) - found), sorted(found - set(expected))
    if missing or unexpected:
        raise ProbeError(
            f"{path} does not hold the tensors that its config asks for: "
            f"missing {missing[:4] or 'none'}, unexpected {unexpected[:4] or 'none'}"
        )
    for name, shape in expected.items():
        declared = file.get_slice(name)
        if list(declared.get_shape()) != shape:
            raise ProbeError(f"{path}: {name} has the shape {declared.get_shape()}, its config asks for {shape}")
        if declared.get_dtype() != "F32":
            raise ProbeError(f"{path}: {name} is {declared.get_dtype()}; heads are stored as F32")


def write_atomically(writers: dict[Path, Callable[[Path], object]], outdated: Sequence[Path] = ()) -> None:
    """Calls each writer with a temporary path beside its target, then renames all; on an error no target changes.

    Args:
        outdated: files that tell of what the targets held, and are removed before the first is renamed: whatever stops the
            process, they do not stand beside the new ones.

    Raises:
        ProbeError: the disk is full.
    """
    written: list[tuple[Path, Path]] = []
    try:
        for target, write in writers.items():
            handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
            os.close(handle)
            written.append((Path(name), target))
            try:
                write(Path(name))
            except (OSError, SafetensorError) as error:
                if not is_disk_full(error):
                    raise
                raise ProbeError(f"{target} cannot be written: {DISK_FULL}") from error
            # mkstemp makes files for the owner alone; a head folder is as readable as any other file of the user.
            mask = os.umask(0)
            os.umask(mask)
            Path(name).chmod(0o666 & ~mask)
        for path in outdated:
            path.unlink(missing_ok=True)
        for temporary, target in written:
            temporary.replace(target)
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)


def is_disk_full(error: Exception) -> bool:
    """Whether it says that there is no room for a file: on its disk, or within what the user may have of it."""
    if isinstance(error, SafetensorError):  # which has the system's words alone
        return any(f"os error {number}" in str(error) for number in _NO_ROOM)
    return isinstance(error, OSError) and error.errno in _NO_ROOM


def environment() -> dict[str, str]:
    """Versions that results depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "llama_probe": package_version(),
    }


def package_version() -> str:
    """Version of the installed package; `"unknown"` where it is used without being installed."""
    try:
        return version("llama_probe")
    except PackageNotFoundError:
        return "unknown"
