"""Memory and floating-point operations of calls whose cost is known."""

import pytest
import torch
import torch.nn.functional as F

from llama_probe.experiments.benchmark.footprint import TensorMemory, flops, peak_memory


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


def test_flops_of_products():
    a, b, c = torch.ones(2, 3), torch.ones(3, 5), torch.ones(3)
    assert flops(lambda: a @ b) == 2 * 2 * 3 * 5
    assert flops(lambda: a @ c) == 2 * 2 * 3, "a matrix with a vector"
    assert flops(lambda: F.linear(a, b.T, torch.ones(5))) == 2 * 2 * 3 * 5
    assert flops(lambda: torch.ones(4, 2, 3) @ b) == 4 * 2 * 2 * 3 * 5
    assert flops(lambda: a.exp().sum()) == 0


@pytest.mark.parametrize("heads", [4, 2])
def test_flops_of_attention(heads):
    query, key = torch.ones(2, 4, 7, 8), torch.ones(2, heads, 9, 8)
    found = flops(lambda: F.scaled_dot_product_attention(query, key, key, enable_gqa=True))
    assert found == 2 * (2 * 4 * 7 * 9 * 8) * 2, "scores and mixture"
