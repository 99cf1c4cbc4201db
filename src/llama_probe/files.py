"""Files and folders on disk: atomic writes, new folders, full disks, and versions of packages."""

from __future__ import annotations

import errno
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError

from .errors import ProbeError


DISK_FULL = "there is no room for it; free some space, or name a folder on another disk"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_writable(folder: Path, content: str) -> None:
    """Check, before any work is done, that a folder can be made or written into.

    Args:
        content: what will be written, for the message.

    Raises:
        ProbeError: the folder or one above it is a file, or the user may not write there.
    """
    try:
        there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    except OSError as error:  # for example a name that is too long
        raise ProbeError(f"{str(folder)[:60]!r} cannot be a folder: {error.strerror}") from None
    if there.exists() and not there.is_dir():
        raise ProbeError(f"{there} is a file; name a folder for {content}")
    if there.exists() and not os.access(there, os.W_OK):
        raise ProbeError(f"{there} is not writable; name another folder for {content}, or change its permissions")


def make_folder(folder: Path) -> None:
    """Make a folder and the missing folders above it.

    Raises:
        ProbeError: the system refuses; the message gives its reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProbeError(f"the folder {folder} cannot be made: {error.strerror}") from error


def check_new_folder(folder: Path) -> None:
    """Raise `ProbeError` unless a folder is missing or empty."""
    if (folder.exists() or folder.is_symlink()) and (not folder.is_dir() or any(folder.iterdir())):
        raise ProbeError(f"{folder} exists and is not an empty folder; name another one, or remove it")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a scratch folder whose files are moved into `folder` at the end; nothing is left behind on an error.

    An empty folder that exists is filled, not replaced: it may be a link, a mount, or a working directory.

    Raises:
        ProbeError: `folder` is not empty, or cannot be made.
    """
    check_new_folder(folder)
    make_folder(folder.parent)
    exists = folder.is_dir()
    with tempfile.TemporaryDirectory(dir=folder if exists else folder.parent, prefix=f".{folder.name}.") as scratch:
        written = Path(scratch) / "new"
        written.mkdir()
        yield written
        if not exists:
            written.replace(folder)
            return
        # The config comes last: it is what makes the folder a head or a model.
        for item in sorted(written.iterdir(), key=lambda item: item.name.endswith("config.json")):
            item.replace(folder / item.name)


def write_atomically(writers: dict[Path, Callable[[Path], object]], outdated: Sequence[Path] = ()) -> None:
    """Call each writer with a temporary path, then rename all files; on an error no target changes.

    Args:
        writers: a function that writes a file, by the path of the file.
        outdated: files about the old targets. They are removed before the first rename, so that a kill at any time
            never leaves them beside new targets.

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
            # mkstemp makes private files; these should be as readable as any other file of the user.
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
    """Return True if the error says that the disk, or the user's quota on it, is full."""
    if isinstance(error, SafetensorError):  # it carries the system's error as text only
        return any(f"os error {number}" in str(error) for number in _NO_ROOM)
    return isinstance(error, OSError) and error.errno in _NO_ROOM


def environment() -> dict[str, str]:
    """Return the versions that results depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "llama_probe": package_version(),
    }


def package_version() -> str:
    """Return the version of the installed package, or `"unknown"` if it is not installed."""
    try:
        return version("llama_probe")
    except PackageNotFoundError:
        return "unknown"
