"""Several processes on one run, as `torchrun` starts them: who does what, and how they hand each other what they found.

Work is divided only inside `process_group()`, which the commands and runs that know how enter by themselves. Elsewhere, and
in a process that was started alone, there is one rank, and nothing here does anything.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers.utils import logging

from .errors import ProbeError
from .files import make_folder


T = TypeVar("T")

# A process that dies closes its connections, which the others notice at once. The limits are for machines that vanish: in
# training all do the same at the same time, but elsewhere one may work for long while the others wait.
TIMEOUT, PATIENCE = timedelta(minutes=10), timedelta(days=7)

_GO_ON = "what was finished is kept: give the same command with --resume to go on"

# What the back ends say where the other side is gone.
_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socket closed",
    "remote process exited",
    "timed out waiting",
    "watchdog",
    "connection refused",
)

# For all that is not a step of the training; there is one while the work is divided.
_group: dist.ProcessGroup | None = None


def launched() -> bool:
    """Whether this process is one of several that `torchrun` has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ


@contextmanager
def process_group() -> Iterator[None]:
    """Lets the processes that `torchrun` has started divide the work inside among them; may be entered again inside.

    A group that exists already is used. Else one is made: NCCL (or what the accelerator has) between accelerators, gloo
    between CPUs, and each process gets the accelerator of its local rank.

    Raises:
        ProbeError: another process of the run has ended, so that this one cannot go on.
    """
    global _group
    if _group is not None or not (launched() or (dist.is_available() and dist.is_initialized())):
        yield
        return
    made = not dist.is_initialized()
    try:
        if made:
            _create_group()
        _group = dist.new_group(backend="gloo", timeout=PATIENCE)
        if not is_main():
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        with _told_to_end():
            yield
        if made:
            dist.destroy_process_group()
    except (RuntimeError, OSError) as error:
        if not _lost(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ProbeError(
            f"another process of this run has ended ({reason}), so this one ends too; {_GO_ON}"
        ) from error
    finally:
        _group = None


def rank() -> int:
    """This process among those that divide the work: 0 is the first, and the only one that writes and prints."""
    return 0 if _group is None else dist.get_rank()


def world_size() -> int:
    """Number of processes that divide the work; 1 where it is not divided."""
    return 1 if _group is None else dist.get_world_size()


def is_main() -> bool:
    """Whether this is the rank that writes and prints."""
    return rank() == 0


def barrier() -> None:
    """Waits until all ranks are here."""
    gather(None)


def share(items: Sequence[T]) -> list[T]:
    """The items that are this rank's to do: every `world_size()`-th.

    All ranks get equally many, because a backbone that is sharded over them runs on all or on none; where there are too few
    the first are done twice. Results therefore must be put where they belong, and not be counted: see `merge_rows`.
    """
    world = world_size()
    if world == 1 or not items:
        return list(items)
    rounds = -(-len(items) // world)
    return [items[(number * world + rank()) % len(items)] for number in range(rounds)]


def merge_rows(rows: Sequence[int], values: torch.Tensor) -> torch.Tensor:
    """Fills in what other ranks have found.

    Args:
        rows: which rows of `values` this rank has found.
        values (`[all_rows, ...]`): on the CPU; the same shape on all ranks. The other rows are written.

    Returns:
        `values`.
    """
    if world_size() > 1:
        rows = torch.tensor(sorted(set(rows)), dtype=torch.long)
        for found, part in gather((rows, values[rows])):
            values[found] = part
    return values


def gather(value: T) -> list[T]:
    """The values of all ranks, by rank, on each of them."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value, _group)
    return found


def broadcast(tensor: torch.Tensor, source: int) -> torch.Tensor:
    """Writes the tensor of one rank into those of the others, which have its shape, dtype and kind of device."""
    if world_size() > 1:
        dist.broadcast(tensor, source)
    return tensor


def on_main(function: Callable[[], T]) -> T:
    """Calls a function on the first rank alone, while the others wait; all get what it returns.

    Raises:
        ProbeError: on all ranks, where the function raises one.
    """
    if world_size() == 1:
        return function()
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = function()
        except ProbeError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, 0, _group)
    if box[1] is not None:
        raise ProbeError(box[1])
    return box[0]


def check_shared(folder: Path) -> None:
    """Makes a folder, and makes sure that all ranks see the same one.

    Raises:
        ProbeError: it cannot be made or written, or they do not, as on machines that share no file system.
    """
    name = on_main(lambda: uuid.uuid4().hex)
    mark = folder / f".ranks.{name}"

    def write() -> None:
        make_folder(folder)
        try:
            if world_size() > 1:
                mark.touch()
        except OSError as error:
            raise ProbeError(f"nothing can be written into {folder}: {error.strerror}") from error

    on_main(write)
    seen = gather(world_size() == 1 or mark.exists())
    if is_main():
        mark.unlink(missing_ok=True)
    if not all(seen):
        blind = ", ".join(str(number) for number, sees in enumerate(seen) if not sees)
        raise ProbeError(
            f"{folder} is not the same folder for all processes: what the first one writes there, rank {blind} does not see. "
            "Name a folder on a file system that all machines share"
        )


def _create_group() -> None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    backend = "gloo"
    if accelerator is not None:
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count())
        backend = f"cpu:gloo,{accelerator.type}:{dist.get_default_backend_for_device(accelerator.type)}"
    dist.init_process_group(backend, timeout=TIMEOUT)


@contextmanager
def _told_to_end() -> Iterator[None]:
    """Says why, where `torchrun` ends this process because another one has failed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_) -> None:
        print(
            f"llama-probe: rank {rank()} of {world_size()} was told to end (SIGTERM), as torchrun does where another process of "
            f"the run has failed: see there for the cause; {_GO_ON}",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _lost(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(sign in text for sign in _LOST)
