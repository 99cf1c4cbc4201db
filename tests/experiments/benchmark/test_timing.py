"""Pairs, ratios and percentiles, by a clock that only the calls move."""

import pytest
import torch

from llama_probe.experiments.benchmark.timing import Timing, Watch, latency, spread, time_call, time_pairs


class Machine:
    """Calls that take given seconds each, on a clock of its own. `log` has their order."""

    def __init__(self):
        self.time, self.log = 100.0, []
        self.watch = Watch(torch.device("cpu"), lambda: self.time)

    def call(self, name, seconds, steps=()):
        seconds = iter(seconds)

        def run(token):
            self.log.append(name)
            self.time += next(seconds)
            for step in steps:
                token()
                self.time += step

        return run


@pytest.fixture
def machine():
    return Machine()


@pytest.mark.parametrize(
    "steps, expected", [([], Timing(3.0)), ([1.0], Timing(4.0)), ([1.0, 2.0, 4.0], Timing(10.0, 1.5))]
)
def test_steps_are_those_after_the_first_token(machine, steps, expected):
    assert time_call(machine.call("a", [3.0], steps), machine.watch) == expected


def test_the_order_of_pairs_alternates(machine):
    first, second = machine.call("a", [9.0, 1.0, 2.0, 3.0]), machine.call("b", [9.0, 10.0, 20.0, 30.0])
    timed = time_pairs(first, second, pairs=3, warmup=1, watch=machine.watch)
    assert machine.log == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert timed == [(Timing(a), Timing(10 * a)) for a in (1.0, 2.0, 3.0)], "first comes first, without warm-up"


def test_a_drift_hits_both(machine):
    """On a machine that gets slower call by call, two equal calls are equal in the median."""
    call = machine.call("a", (1.1**i for i in range(100)))
    ratios = [b.seconds / a.seconds for a, b in time_pairs(call, call, 8, 0, machine.watch)]
    assert spread(ratios)["median"] == pytest.approx(1.0, abs=0.01) and max(ratios) > 1.09


def test_summaries():
    assert spread([1.0, 5.0, 2.0, 3.0, 4.0]) == {"median": 3.0, "quartiles": [2.0, 4.0], "runs": 5}
    assert latency(i / 100 for i in range(101)) == {"median": 500.0, "p95": 950.0}, "milliseconds"
