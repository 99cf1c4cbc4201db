"""Files and folders that one process at a time may have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .distributed import on_main
from .errors import ProbeError
from .files import make_folder


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def lock(file: BinaryIO | int) -> bool:
    """Locks a file or a folder until it is closed or its process ends, however that ends; false where that cannot be.

    Raises:
        BlockingIOError: another has it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system that knows no locks
        return False
    return True


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keeps a folder to one run at a time: one that begins there anew removes what another would go on with.

    It is made where it is missing, and goes again where nothing was written. In a process group the first rank has it for all.

    Raises:
        ProbeError: another run has it, or it cannot be made.
    """
    held: list[int] = []
    new = not folder.exists()
    on_main(lambda: held.extend(_claim(folder)))
    try:
        yield
    finally:
        for handle in held:
            os.close(handle)
            if new and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _claim(folder: Path) -> list[int]:
    make_folder(folder)
    if fcntl is None:
        return []
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle)
    except BlockingIOError:
        os.close(handle)
        raise ProbeError(f"another run is at work in {folder}: wait for its end, or name another folder") from None
    return [handle]
