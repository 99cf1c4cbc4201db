"""Pairs, ratios and percentiles, by a clock that only the calls move."""

import pytest

from llama_probe.experiments.benchmark.timing import Timing, spread, time_call, time_pairs


class Machine:
    """Calls that take given seconds each, on a clock of its own. `log` has their order."""

    def __init__(self):
        self.time, self.log = 100.0, []

    def call(self, name, seconds, steps=()):
        seconds = iter(seconds)

        def run(token):
            self.log.append(name)
            self.time += next(seconds)
            for step in steps:
                token()
                self.time += step

        return run

    def clock(self):
        return self.time


@pytest.fixture
def machine():
    return Machine()


@pytest.mark.parametrize(
    "steps, expected", [([], Timing(3.0)), ([1.0], Timing(4.0)), ([1.0, 2.0, 4.0], Timing(10.0, 1.5))]
)
def test_steps_are_those_after_the_first_token(machine, steps, expected):
    assert time_call(machine.call("a", [3.0], steps), machine.clock) == expected


def test_the_order_of_pairs_alternates(machine):
    first, second = machine.call("a", [9.0, 1.0, 2.0, 3.0]), machine.call("b", [9.0, 10.0, 20.0, 30.0])
    timed = time_pairs(first, second, pairs=3, warmup=1, clock=machine.clock)
    assert machine.log == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert timed == [(Timing(a), Timing(10 * a)) for a in (1.0, 2.0, 3.0)], "first comes first, without warm-up"


def test_summaries():
    assert spread([1.0, 5.0, 2.0, 3.0, 4.0]) == {"median": 3.0, "quartiles": [2.0, 4.0], "runs": 5}
