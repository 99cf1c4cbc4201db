"""Time and memory of calls. Two calls are timed in turn and compared as ratios: seconds drift with the load of a machine."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


# A timed call gets a function that it calls after each new token.
Token = Callable[[], None]
Timed = Callable[[Token], Any]


class Timing(NamedTuple):
    """Seconds of one call, and of each new token after the first. `None` if there is none."""

    seconds: float
    seconds_a_step: float | None = None


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
    steps = len(marks) - 1
    return Timing(seconds, (marks[-1] - marks[0]) / steps if steps > 0 else None)


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


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Return `median`, `quartiles` (first and third) and `runs` of some numbers."""
    values = list(values)
    low, middle, high = (float(value) for value in np.percentile(values, (25, 50, 75)))
    return {"median": middle, "quartiles": [low, high], "runs": len(values)}


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Return the bytes that a call holds at its peak, above those held at its start.

    On CUDA the allocator counts them. On the CPU all tensors are counted, without a kernel's own scratch memory. Other devices
    give `None`.
    """
    if device.type == "cpu":
        with TensorMemory() as memory:
            call()
        return memory.peak
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - start


class TensorMemory(TorchDispatchMode):
    """Count the bytes of tensors that are made inside the block: alive (`held`), and most at once (`peak`).

    A view shares the memory of its base.
    """

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {id(storage) for storage in _storages((args, kwargs))}
        output = func(*args, **kwargs)
        for storage in _storages(output):
            # An input that is also an output is a view, or was changed in place.
            if id(storage) not in given and id(storage) not in self._alive:
                self._alive.add(id(storage))
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        return output

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.held -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
