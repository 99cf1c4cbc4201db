"""Divides the work of one run among the processes that `torchrun` starts, and keeps a folder to one run at a time.

Work is divided only inside `process_group()`. Elsewhere, and in a single process, there is one rank, and the functions return
at once.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from transformers.utils import logging

from .errors import ProbeError
from .files import check_writable, lock, make_folder


T = TypeVar("T")

# For machines that vanish: a process that dies closes its connections, which the others notice at once. One rank may work for
# long while the others wait.
_TIMEOUT = timedelta(days=1)

_RESUME = "what was finished is kept: give the same command with --resume to go on"

# Parts of the back ends' messages when the connection to another process is lost.
_LOST = re.compile(
    "connection (closed by peer|reset by peer|refused)|broken pipe|socket closed|remote process exited|timed out waiting"
    "|watchdog",
    re.IGNORECASE,
)

_is_divided = False
_until_exit = ExitStack()


def launched() -> bool:
    """Return True if this process is one of several that `torchrun` has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ


@contextmanager
def process_group() -> Iterator[None]:
    """Let the processes that `torchrun` has started divide the work inside; may be nested.

    An existing group is used. Else accelerate makes one, with gloo between CPUs and the accelerator's back end (NCCL) between
    accelerators, and gives each process the accelerator of its local rank.
    """
    global _is_divided
    if _is_divided or not (launched() or (dist.is_available() and dist.is_initialized())):
        yield
        return
    is_own = not dist.is_initialized()
    try:
        _set_up()
        _is_divided = True
        if not is_main():
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        with _explained_sigterm():
            yield
        if is_own:
            dist.destroy_process_group()
    except (RuntimeError, OSError) as error:
        text = str(error).strip()
        if not isinstance(error, dist.DistError) and not _LOST.search(text):
            raise
        raise ProbeError(f"another process of this run has ended ({text.splitlines()[0]}); {_RESUME}") from error
    finally:
        _is_divided = False


@contextmanager
def undivided() -> Iterator[None]:
    """Let this process work inside as if it were the only one."""
    global _is_divided
    before, _is_divided = _is_divided, False
    try:
        yield
    finally:
        _is_divided = before


def divide_until_exit() -> None:
    """Enter `process_group` until the program ends, for objects whose methods divide the work."""
    _until_exit.enter_context(process_group())


def rank() -> int:
    """Return the number of this process: 0 is the main one, the only one that writes and prints."""
    return dist.get_rank() if _is_divided else 0


def world_size() -> int:
    """Return the number of processes that divide the work, 1 if it is not divided."""
    return dist.get_world_size() if _is_divided else 1


def is_main() -> bool:
    """Return True on the rank that writes and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait until all ranks are here."""
    gather(None)


def share(items: Sequence[T]) -> list[T]:
    """Return every `world_size()`-th item, those of this rank.

    All ranks get equally many, because a backbone that is sharded over them must run on all: some items are done twice if
    they do not divide evenly. `merge_rows` puts results in their places.
    """
    return [items[(first + rank()) % len(items)] for first in range(0, len(items), world_size())]


def merge_rows(rows: Sequence[int], values: torch.Tensor) -> torch.Tensor:
    """Write the rows that the other ranks have computed into `values`, and return it.

    Args:
        rows: indices of the rows that this rank has computed.
        values (`[all_rows, ...]`): on the CPU, with the same shape on all ranks.
    """
    if world_size() > 1:
        rows = torch.tensor(sorted(set(rows)), dtype=torch.long)
        for places, part in gather((rows, values[rows])):
            values[places] = part
    return values


def gather(value: T) -> list[T]:
    """Return the values of all ranks, by rank, on each of them."""
    if world_size() == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def on_main(function: Callable[[], T]) -> T:
    """Call a function on the main rank while the others wait, and return its result on all.

    Raises:
        ProbeError: on all ranks, if the function raises one.
    """
    if world_size() == 1:
        return function()
    from accelerate.utils import broadcast_object_list

    result: T | ProbeError | None = None
    if is_main():
        try:
            result = function()
        except ProbeError as error:
            result = error
    (result,) = broadcast_object_list([result])
    if isinstance(result, ProbeError):
        raise result
    return result


def check_shared(folder: Path) -> None:
    """Make a folder, and check that all ranks see the same one."""
    on_main(lambda: make_folder(folder))
    on_main(lambda: check_writable(folder, "what all processes write"))
    if world_size() == 1:
        return
    mark = folder / Path(on_main(lambda: tempfile.mkdtemp(prefix=".ranks.", dir=folder))).name
    blind = [number for number, sees in enumerate(gather(mark.exists())) if not sees]
    if is_main():
        mark.rmdir()
    if blind:
        raise ProbeError(f"{folder} must be on a file system that all machines share; ranks {blind} do not see it")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep a folder to one run at a time. It is made if missing, and removed again if nothing was written.

    In a process group the main rank claims it for all. The claim ends with the process, however that ends.
    """
    is_new = not folder.exists()
    held: list[int] = []

    def claim() -> None:
        make_folder(folder)
        if (handle := lock(folder.resolve())) is None:
            raise ProbeError(f"another run is at work in {folder}: wait for its end, or name another folder")
        held.append(handle)

    on_main(claim)
    try:
        yield
    finally:
        for handle in held:
            os.close(handle)
            if is_new and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _set_up() -> None:
    """Let accelerate see the process group, which is made if there is none."""
    from accelerate import PartialState

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    backend = "gloo"
    if accelerator is not None:
        backend = f"cpu:gloo,{accelerator.type}:{dist.get_default_backend_for_device(accelerator.type)}"
    PartialState._reset_state()  # it may be that of a single process, or of an earlier group
    PartialState(cpu=accelerator is None, backend=backend, timeout=_TIMEOUT)


@contextmanager
def _explained_sigterm() -> Iterator[None]:
    """Print why this process ends when `torchrun` sends SIGTERM because another one has failed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_) -> None:
        text = f"rank {rank()} of {world_size()} got SIGTERM, as torchrun sends it if another process has failed; {_RESUME}"
        print(f"llama-probe: {text}", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
