"""Divides the work of one run among the processes that `torchrun` starts, and keeps a folder to one run at a time.

In a single process, and before the others are met, there is one rank, and the functions return at once.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from transformers.utils import logging

from .errors import ProbeError
from .files import lock, make_folder


T = TypeVar("T")

# For machines that vanish: a process that dies closes its connections, which the others notice at once. One rank may work for
# long while the others wait.
_TIMEOUT = timedelta(days=1)

_is_alone = False


def launched() -> bool:
    """Return True if this process is one of several that `torchrun` has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ


def meet() -> None:
    """Let the processes that `torchrun` has started make a group, and divide the work from now on.

    gloo connects CPUs, and the accelerator's back end (NCCL) accelerators. Each process gets the accelerator of its local rank, and
    only the main one logs.
    """
    if not launched():
        return
    from accelerate import PartialState

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    backend = "gloo"
    if accelerator is not None:
        backend = f"cpu:gloo,{accelerator.type}:{dist.get_default_backend_for_device(accelerator.type)}"
    PartialState(cpu=accelerator is None, backend=backend, timeout=_TIMEOUT)
    if not is_main():
        logging.set_verbosity_error()
        logging.disable_progress_bar()


@contextmanager
def undivided() -> Iterator[None]:
    """Let this process work inside as if it were the only one."""
    global _is_alone
    before, _is_alone = _is_alone, True
    try:
        yield
    finally:
        _is_alone = before


def _is_divided() -> bool:
    return not _is_alone and launched() and dist.is_initialized()


def rank() -> int:
    """Return the number of this process: 0 is the main one, the only one that writes and prints."""
    return dist.get_rank() if _is_divided() else 0


def world_size() -> int:
    """Return the number of processes that divide the work, 1 if it is not divided."""
    return dist.get_world_size() if _is_divided() else 1


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
    result: T | ProbeError | None = None
    if is_main():
        try:
            result = function()
        except ProbeError as error:
            result = error
    result = gather(result)[0]
    if isinstance(result, ProbeError):
        raise result
    return result


def check_shared(folder: Path) -> None:
    """Make a folder, and check that all ranks see the same one."""
    on_main(lambda: make_folder(folder))
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
