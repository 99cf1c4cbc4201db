"""Time and memory of calls whose cost is known."""

import itertools

import pytest
import torch

from llama_probe.experiments import meters
from llama_probe.experiments.meters import Meter, peak_memory, time_pairs


CPU = torch.device("cpu")


def test_memory_of_known_allocations():
    def call():
        first = torch.empty(1000)  # 4,000 bytes
        second = torch.ones(500)  # 6,000
        del first  # 2,000
        third = torch.zeros(300, dtype=torch.float64)  # 4,400
        return second, third

    assert peak_memory(call, CPU) == 6000
    assert peak_memory(lambda: torch.cat([torch.ones(10), torch.ones(10)]).chunk(2), CPU) == 160


def test_views_and_changes_in_place_are_no_memory():
    outside = torch.ones(1000)
    with Meter() as meter:
        outside.view(10, 100)[2:].add_(1)
        assert meter.peak == 0
        made = torch.ones(100)
        part = made[:3]
        del made
        assert meter.held == 400, "a view keeps its base alive"
        del part
        assert meter.held == 0 and meter.peak == 400


def test_views_and_allocations_are_no_operations():
    a = torch.ones(4, 6)
    with Meter() as meter:
        a.t().reshape(-1)[:3].view(3, 1).unsqueeze(0)  # the reshape copies
        torch.empty(3).detach()
        (a @ a.t() + 1).sum()
    assert meter.operations == 1 + 3


@pytest.mark.parametrize("tokens, a_step", [(0, None), (1, None), (3, 1.0)])
def test_the_order_of_pairs_alternates(tokens, a_step, monkeypatch):
    ticks, log = itertools.count(), []
    monkeypatch.setattr(meters, "perf_counter", lambda: float(next(ticks)))

    def called(name):
        return lambda on_token: [log.append(name), *(on_token() for _ in range(tokens))]

    timed = time_pairs(called("a"), called("b"), 3, 1, CPU)
    assert log == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert timed == [((1.0 + tokens, a_step), (1.0 + tokens, a_step))] * 3
