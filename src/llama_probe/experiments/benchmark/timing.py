"""Times of two calls in turn, and what they say: ratios rather than seconds, which drift with a machine's load."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


# A call that is timed gets a function that it calls after each new token.
Timed = Callable[[Callable[[], None]], Any]


class Watch:
    """Seconds, read when the device has done all that it was given.

    Args:
        device: where the work is done. clock: seconds since any point in time.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self._wait = device.type not in ("cpu", "meta")
        self._device = device
        self._clock = clock

    def now(self) -> float:
        """Seconds."""
        if self._wait:
            torch.accelerator.synchronize(self._device)
        return self._clock()


@dataclass(frozen=True)
class Timing:
    """Of one call: `seconds` in all, and `seconds_a_step` for each new token after the first, `None` where there is none."""

    seconds: float
    seconds_a_step: float | None = None


def time_call(call: Timed, watch: Watch) -> Timing:
    """Runs a call once."""
    marks: list[float] = []
    start = watch.now()
    call(lambda: marks.append(watch.now()))
    seconds = watch.now() - start
    steps = len(marks) - 1
    return Timing(seconds, (marks[-1] - marks[0]) / steps if steps > 0 else None)


def time_pairs(first: Timed, second: Timed, pairs: int, warmup: int, watch: Watch) -> list[tuple[Timing, Timing]]:
    """Runs two calls in turn. Which of the two comes first alternates pair by pair, so that a drift hits both.

    Args:
        pairs: pairs that are timed. warmup: pairs before them that are not.

    Returns:
        The timings of first and second, a tuple a pair.
    """
    for _ in range(warmup):
        time_call(first, watch), time_call(second, watch)
    timed = []
    for pair in range(pairs):
        if pair % 2:
            later = time_call(second, watch)
            timed.append((time_call(first, watch), later))
        else:
            timed.append((time_call(first, watch), time_call(second, watch)))
    return timed


def spread(values: Iterable[float]) -> dict[str, Any]:
    """`median`, `quartiles` (first and third) and `runs` of some numbers."""
    values = list(values)
    low, middle, high = (float(value) for value in np.percentile(values, (25, 50, 75)))
    return {"median": middle, "quartiles": [low, high], "runs": len(values)}


def latency(seconds: Iterable[float]) -> dict[str, float]:
    """`median` and `p95` of some seconds, in milliseconds; the 95th percentile between the two values next to it."""
    middle, late = (1000 * float(value) for value in np.percentile(list(seconds), (50, 95)))
    return {"median": middle, "p95": late}
