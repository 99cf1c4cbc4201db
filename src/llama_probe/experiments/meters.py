"""Time, memory and operations of calls."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from time import perf_counter

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..files import JSON


# A timed call gets a function that it calls after each new token.
Timed = Callable[[Callable[[], None]], object]
# Seconds of a call, and of each new token after the first, or None.
Timing = tuple[float, float | None]
# Operations that touch no data, beside views.
_METADATA = {getattr(torch.ops.aten, n) for n in ("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty")}


def time_call(call: Timed, device: torch.device) -> Timing:
    """Run a call once and time it. The clock is read after the device has finished its work."""

    def read_clock() -> float:
        if device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(device)
        return perf_counter()

    marks: list[float] = []
    start = read_clock()
    call(lambda: marks.append(read_clock()))
    seconds = read_clock() - start
    return seconds, (marks[-1] - marks[0]) / (len(marks) - 1) if len(marks) > 1 else None


def time_pairs(
    first: Timed, second: Timed, pairs: int, warmup: int, device: torch.device
) -> list[tuple[Timing, Timing]]:
    """Time two calls in turn, after untimed pairs. The order alternates from pair to pair, so that a drift hits both."""
    timed = []
    for pair in range(-warmup, pairs):
        swap = pair > 0 and pair % 2
        timings = [time_call(call, device) for call in ((second, first) if swap else (first, second))]
        timed.append(tuple(reversed(timings) if swap else timings))
    return timed[warmup:]


def spread(values: Iterable[float]) -> JSON:
    """Return `median`, `quartiles` (first and third) and `runs` of some numbers."""
    values = list(values)
    low, middle, high = map(float, np.percentile(values, (25, 50, 75)))
    return {"median": middle, "quartiles": [low, high], "runs": len(values)}


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Return the bytes that a call holds at its peak, above those held at its start.

    On CUDA the allocator counts them. Elsewhere all tensors are counted, without a kernel's own scratch memory.
    """
    if device.type != "cuda":
        with Meter() as meter:
            call()
        return meter.peak
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - start


class Meter(TorchDispatchMode):
    """Count operations and the bytes of new tensors inside the block.

    Attributes:
        operations: dispatched, without views and allocations. On a GPU each is a kernel launch.
        held, peak: bytes of tensors that are alive, and most at once. A view shares the memory of its base.
    """

    def __init__(self):
        super().__init__()
        self.operations = self.held = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if getattr(func, "is_view", False):  # its storage is an input's
            return output
        self.operations += getattr(func, "overloadpacket", func) not in _METADATA
        inputs = {id(storage) for storage in _storages((args, kwargs or {}))}
        for storage in _storages(output):
            # An input that is also an output was changed in place.
            if id(storage) not in inputs and id(storage) not in self._alive:
                self._alive.add(id(storage))
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        return output

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.held -= size


def _storages(value: object) -> list[torch.UntypedStorage]:
    """Return the storages of what an operation takes or gives. A walk by torch's own trees takes longer than the operation."""
    if isinstance(value, torch.Tensor):
        return [value.untyped_storage()]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [storage for item in items for storage in _storages(item)]
