"""Times of two calls in turn, compared as ratios: seconds drift with the load of a machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch


# A timed call gets a function that it calls after each new token.
Timed = Callable[[Callable[[], None]], Any]


class Timing(NamedTuple):
    """Seconds of one call, and of each new token after the first. `None` if there is none."""

    seconds: float
    seconds_a_step: float | None = None


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return a clock in seconds that is read after the device has finished its work."""

    def read() -> float:
        if device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    return read


def time_call(call: Timed, clock: Callable[[], float]) -> Timing:
    """Run a call once and time it."""
    marks: list[float] = []
    start = clock()
    call(lambda: marks.append(clock()))
    seconds = clock() - start
    steps = len(marks) - 1
    return Timing(seconds, (marks[-1] - marks[0]) / steps if steps > 0 else None)


def time_pairs(
    first: Timed, second: Timed, pairs: int, warmup: int, clock: Callable[[], float]
) -> list[tuple[Timing, Timing]]:
    """Time two calls in turn, after untimed pairs. The order alternates from pair to pair, so that a drift hits both."""
    timed = []
    for pair in range(-warmup, pairs):
        swap = pair > 0 and pair % 2
        timings = [time_call(call, clock) for call in ((second, first) if swap else (first, second))]
        timed.append(tuple(reversed(timings) if swap else timings))
    return timed[warmup:]


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Return `median`, `quartiles` (first and third) and `runs` of some numbers."""
    values = list(values)
    low, middle, high = (float(value) for value in np.percentile(values, (25, 50, 75)))
    return {"median": middle, "quartiles": [low, high], "runs": len(values)}
