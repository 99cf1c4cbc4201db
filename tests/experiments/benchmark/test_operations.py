"""Counts of dispatched operations."""

import torch

from llama_probe.experiments.benchmark.operations import OperationCounter


def test_views_and_allocations_are_not_counted():
    a = torch.ones(4, 6)
    with OperationCounter() as counter:
        a.t().reshape(-1)[:3].view(3, 1).unsqueeze(0)  # the reshape copies
        torch.empty(3).detach()
        assert counter.operations == 1
        (a @ a.t() + 1).sum()
    assert counter.operations == 4
