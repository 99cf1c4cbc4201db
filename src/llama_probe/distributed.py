"""Divide the work of one run among the processes that `torchrun` starts, and keep a folder to one run at a time.

In a single process, and before `meet`, there is one rank, and no function waits.
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

# One rank may work for hours while the other ranks wait. They notice at once when a process dies, which closes its connections; only
# a machine that vanishes is noticed so late.
_TIMEOUT = timedelta(days=1)

_is_alone = False


def launched() -> bool:
    """Return True if this process is one of several that `torchrun` has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ


def meet() -> None:
    """Make a group of the processes that `torchrun` has started, which divide the work from now on.

    gloo connects CPUs, and NCCL, or another back end of the accelerator, connects accelerators. Each process gets the accelerator
    of its local rank. Only the main process logs.
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
    """Let this process work as if it were the only process."""
    global _is_alone
    before = _is_alone
    _is_alone = True
    try:
        yield
    finally:
        _is_alone = before


def _is_divided() -> bool:
    return not _is_alone and launched() and dist.is_initialized()


def rank() -> int:
    """Return the number of this process. Only the main process, number 0, writes and prints."""
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
    """Return every `world_size()`-th item, beginning with the number of this rank.

    All ranks get equally many items, because a backbone that is sharded over the ranks must run on all ranks. If the items cannot be
    divided, two ranks get the same item. `merge_rows` puts the results in their places.
    """
    return [items[(first + rank()) % len(items)] for first in range(0, len(items), world_size())]


def merge_rows(rows: Sequence[int], values: torch.Tensor) -> torch.Tensor:
    """Write the rows that the other ranks have computed into `values`, and return `values`.

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
    """Return the values of all ranks, in the order of the ranks, on each rank."""
    if world_size() == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def on_main(function: Callable[[], T]) -> T:
    """Call a function on the main rank while the other ranks wait. Return its result on all ranks.

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
    """Make a folder, and check that all ranks see the same folder."""
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
    """Keep a folder to one run at a time. Make a missing folder, and remove the new folder again if nothing was written.

    In a process group the main rank claims the folder for all ranks. The claim ends with the process, however the process ends.
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
