"""Files and folders on disk: atomic writes, new folders, full disks, and versions of packages."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import ProbeError


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# A save puts its complete files into this folder first.
PENDING = ".new-files"
# In this folder, this end of a name marks a file that the save removes.
_GONE = ".gone"
_TEMPORARY = ".tmp"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# A JSON object: the contents of results.json, a report, fields of a config. The function that makes one says what it holds.
JSON = dict[str, Any]
# What a file is to hold: a text in UTF-8, bytes, or a function that writes the file.
Content = str | bytes | Callable[[Path], object]


def check_writable(folder: Path, content: str) -> None:
    """Check, before any work is done, that a folder can be made or written into."""
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:  # for example a name that is too long
        raise ProbeError(f"{str(folder)[:60]!r} cannot be a folder: {error.strerror}") from None
    if not there.is_dir():
        raise ProbeError(f"{there} is a file; name a folder for {content}")
    if not os.access(there, os.W_OK):
        raise ProbeError(f"{there} is not writable; name another folder for {content}, or change its permissions")


def make_folder(folder: Path) -> None:
    """Make a folder and the missing folders above it. Raise `ProbeError` with the system's reason if it refuses."""
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
    """Make a scratch folder whose files move into a missing or empty `folder` at the end. After an error nothing remains.

    An empty folder is filled, not replaced, because it may be a link, a mount, or a working directory.
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
        # The config comes last: with it the folder becomes a head or a model.
        for item in sorted(written.iterdir(), key=lambda item: item.name.endswith("config.json")):
            item.replace(folder / item.name)


def write_atomically(path: Path, content: Content) -> None:
    """Write a file under a temporary name, then rename it; on an error it does not change."""
    finish_interrupted_save(path.parent)  # else a file that a killed save has left would replace the new one later
    with _staged(path.parent, {path.name: content}) as stage, _named_errors(path):
        (stage / path.name).replace(path)


def replace_files(folder: Path, contents: dict[str, Content], gone: Iterable[str] = ()) -> None:
    """Write and remove files of a folder in one step: a kill leaves all old ones or all new ones.

    The new files are written into a scratch folder. The rename of this folder to `PENDING` is the step. Then each file is moved
    to its place. `current_file` finds a file before and after its move, and `finish_interrupted_save` moves what a kill has left.

    Raises:
        ProbeError: a file cannot be written. No file has changed then.
    """
    with _staged(folder, contents, gone) as stage:
        for _ in range(100):
            finish_interrupted_save(folder)
            try:
                stage.rename(folder / PENDING)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process saves into the folder
                    raise ProbeError(f"{folder} cannot be written: {error.strerror}") from error
        else:
            raise ProbeError(f"{folder} cannot be written: others save into it all the time")
    finish_interrupted_save(folder)


def current_file(folder: str | os.PathLike, name: str) -> Path:
    """Return the path at which a file that `replace_files` writes is now. The file need not exist."""
    pending = Path(folder) / PENDING
    is_pending = os.path.lexists(pending / name) or os.path.lexists(pending / f"{name}{_GONE}")
    return pending / name if is_pending and not pending.is_symlink() else Path(folder) / name


def folder_state(folder: str | os.PathLike, name: str) -> tuple:
    """Return a value that changes whenever `replace_files` replaces a file, or moves any file of the folder to its place."""
    identity = None
    pending: list[str] = []
    for path in (current_file(folder, name), Path(folder) / name):
        with suppress(OSError):  # there is no such file, or it has just moved to its place
            status = os.stat(path)
            identity = status.st_ino, status.st_mtime_ns, status.st_size
            break
    # This is listed last, because a save that begins in between could move its files unnoticed.
    with suppress(OSError):
        pending = sorted(os.listdir(Path(folder) / PENDING))
    return identity, pending


def finish_interrupted_save(folder: str | os.PathLike) -> None:
    """Move the files that a killed `replace_files` has left in `PENDING` to their places."""
    folder = Path(folder)
    pending = folder / PENDING
    if not pending.is_dir() or pending.is_symlink():
        return
    with _named_errors(folder), suppress(FileNotFoundError):  # another process finishes the save, and was faster
        for name in sorted(os.listdir(pending)):
            with suppress(FileNotFoundError):  # another process finishes the save, too
                if name.endswith(_GONE):
                    (folder / name.removesuffix(_GONE)).unlink(missing_ok=True)
                    (pending / name).unlink()
                else:
                    (pending / name).replace(folder / name)
        with suppress(OSError):
            pending.rmdir()


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that killed processes have left in a folder."""
    for path in folder.glob(f"{PENDING}.*{_TEMPORARY}"):
        if (handle := lock(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(handle)


@contextmanager
def _staged(folder: Path, contents: dict[str, Content], gone: Iterable[str] = ()) -> Iterator[Path]:
    """Write files into a temporary folder inside `folder`, and remove it at the end.

    The temporary folder is locked until its process ends, so that `remove_leftovers` of another process leaves it alone.
    """
    for name in (*contents, *gone):
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            raise ProbeError(f"{folder / name} is a folder where a file is to be written; remove or rename it")
    handle = None
    while handle is None:
        stage = folder / f"{PENDING}.{uuid.uuid4().hex}{_TEMPORARY}"
        with _named_errors(folder):
            stage.mkdir()
        handle = lock(stage)
        if handle is not None and not stage.exists():  # taken for a leftover before it was locked
            os.close(handle)
            handle = None
    try:
        for name, content in contents.items():
            with _named_errors(folder / name):
                if callable(content):
                    content(stage / name)
                else:
                    (stage / name).write_bytes(content.encode() if isinstance(content, str) else content)
        for name in gone:
            with _named_errors(folder / name):
                (stage / f"{name}{_GONE}").touch()
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        os.close(handle)


def lock(path: Path) -> int | None:
    """Return a handle that holds the lock of a file or folder; None if another process holds it, or it is not there.

    Where nothing can be locked, the handle holds no lock.
    """
    if fcntl is None:  # Windows, which renames no open files
        return os.open(os.devnull, os.O_RDONLY)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError:
        return os.open(os.devnull, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # the file system has no locks
        pass
    return handle


@contextmanager
def _named_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        # A SafetensorError has the number of the system's error in its text alone.
        if any(number == getattr(error, "errno", None) or f"os error {number}" in str(error) for number in _NO_ROOM):
            reason = "there is no room for it; free some space, or name a folder on another disk"
        raise ProbeError(f"{target} cannot be written: {reason}") from error


def environment() -> dict[str, str]:
    """Return the versions that results depend on."""
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {"python": platform.python_version(), **versions, "llama_probe": package_version()}


def package_version() -> str:
    """Return the version of the installed package, or `"unknown"` if it is not installed."""
    try:
        return version("llama_probe")
    except PackageNotFoundError:
        return "unknown"


def short_path(path: str) -> str:
    """Return the last two parts of a path that exists, because the first parts differ between machines; else the text itself.

    A configuration and a split behind a folder, `FOLDER::test`, are kept.
    """
    place = path if os.path.exists(path) else path.partition(":")[0]
    if not os.path.exists(place):
        return path
    short = "/".join(Path(place).parts[-2:]) or place
    return short + path[len(place) :]
