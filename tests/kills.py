"""Kill a function in a child process, before each of its file operations or after a while; and fill the disk."""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path


OPERATIONS = {
    *("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.link", "os.symlink"),
}
_KILLED = 77


def each_kill(
    action: Callable[[], object], folder: Path, prepare: Callable[[], object], numbers: Iterable[int] | None = None
) -> Iterator[int]:
    """Yield the number of the operation that an action was killed at, for each of its operations on a folder.

    Args:
        prepare: called before each kill; makes the folder as the action finds it.
        numbers: operations to be killed at, ascending, in place of all.
    """
    for number in count() if numbers is None else numbers:
        prepare()
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
        if status == 0:  # it has fewer operations
            assert number, "the action has no operation on the folder"
            return
        assert status == _KILLED, f"the child failed with the status {status}"
        yield number
    raise AssertionError("the action has more operations than numbers")


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
    numbers = count()

    def hook(event: str, arguments: tuple) -> None:
        is_path = event in OPERATIONS and isinstance(arguments[0], (str, os.PathLike))
        if is_path and str(arguments[0]).startswith(folder) and next(numbers) == number:
            os._exit(_KILLED)

    sys.addaudithook(hook)
