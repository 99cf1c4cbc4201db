"""Memory and operations against what is known beforehand."""

import pytest
import torch
import torch.nn.functional as F

from llama_probe.experiments.benchmark.footprint import TensorMemory, operations, peak_memory


CPU = torch.device("cpu")


class TestMemory:
    def test_of_known_allocations(self):
        def call():
            first = torch.empty(1000)  # 4,000 bytes
            second = torch.ones(500)  # 6,000
            del first  # 2,000
            third = torch.zeros(300, dtype=torch.float64)  # 4,400
            return second, third

        assert peak_memory(call, CPU) == 6000

    def test_views_and_changes_in_place_are_no_memory(self):
        outside = torch.ones(1000)
        with TensorMemory() as memory:
            outside.view(10, 100)[2:].add_(1)
            assert memory.peak == 0
            made = torch.ones(100)
            part = made[:3]
            del made
            assert memory.held == 400, "a view keeps the whole alive"
            del part
            assert memory.held == 0 and memory.peak == 400

    def test_lists_of_tensors(self):
        assert peak_memory(lambda: torch.cat([torch.ones(10), torch.ones(10)]).chunk(2), CPU) == 160

    def test_is_unknown_on_other_devices(self):
        assert peak_memory(lambda: pytest.fail("not run"), torch.device("meta")) is None


class TestOperations:
    def test_of_products(self):
        a, b, c = torch.ones(2, 3), torch.ones(3, 5), torch.ones(3)
        assert operations(lambda: a @ b) == 2 * 2 * 3 * 5
        assert operations(lambda: a @ c) == 2 * 2 * 3, "a matrix with a vector"
        assert operations(lambda: F.linear(a, b.T, torch.ones(5))) == 2 * 2 * 3 * 5
        assert operations(lambda: torch.ones(4, 2, 3) @ b) == 4 * 2 * 2 * 3 * 5
        assert operations(lambda: a.exp().sum()) == 0

    @pytest.mark.parametrize("heads", [4, 2])
    def test_of_attention(self, heads):
        query, key = torch.ones(2, 4, 7, 8), torch.ones(2, heads, 9, 8)
        found = operations(lambda: F.scaled_dot_product_attention(query, key, key, enable_gqa=True))
        assert found == 2 * (2 * 4 * 7 * 9 * 8) * 2, "scores and mixture"
