"""Kill a function in a child process, before each of its file operations or after a while; and fill the disk."""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


OPERATIONS = {
    *("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.link", "os.symlink"),
}
_KILLED = 77


def killed_at(action: Callable[[], object], folder: Path, number: int) -> bool:
    """Run an action in a child that ends before its `number`-th operation on a path in a folder.

    Returns:
        False if it came to its end: it has fewer operations.
    """
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(120)
            _end_before(number, str(folder))
            action()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, _KILLED), f"the child failed with the status {status}"
    return status == _KILLED


def each_kill(
    action: Callable[[], object], folder: Path, prepare: Callable[[], object], numbers: Iterator[int] | None = None
) -> Iterator[int]:
    """Yield the number of the operation that an action was killed at, for each of its operations on a folder.

    Args:
        prepare: called before each kill; makes the folder as the action finds it.
        numbers: operations to be killed at, ascending, in place of all.
    """
    number = -1
    while True:
        number = number + 1 if numbers is None else next(numbers)
        prepare()
        if not killed_at(action, folder, number):
            break
        yield number
    assert number, "the action has no operation on the folder"


def kill_after(seconds: float, action: Callable[[], object]) -> None:
    """Run an action in a child that is killed after some seconds, if it has not come to its end."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Leave room for `size` bytes in each file that is written in the block."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _end_before(number: int, folder: str) -> None:
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in OPERATIONS and isinstance(arguments[0], (str, os.PathLike)):
            if not str(arguments[0]).startswith(folder):
                return
            if count == number:
                os._exit(_KILLED)
            count += 1

    sys.addaudithook(hook)
