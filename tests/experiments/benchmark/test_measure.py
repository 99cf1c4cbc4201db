"""Memory of calls whose cost is known."""

import pytest
import torch

from llama_probe.experiments.benchmark.measure import TensorMemory, peak_memory


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
    assert peak_memory(lambda: pytest.fail("not run"), torch.device("meta")) is None


def test_views_and_changes_in_place_are_no_memory():
    outside = torch.ones(1000)
    with TensorMemory() as memory:
        outside.view(10, 100)[2:].add_(1)
        assert memory.peak == 0
        made = torch.ones(100)
        part = made[:3]
        del made
        assert memory.held == 400, "a view keeps its base alive"
        del part
        assert memory.held == 0 and memory.peak == 400
