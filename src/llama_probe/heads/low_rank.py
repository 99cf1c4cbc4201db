"""Base of the head types that read an item through a linear map to a few numbers."""

from __future__ import annotations

from abc import abstractmethod

import torch

from .aggregator import Aggregator, State


class LowRankAggregator(Aggregator):
    """An `Aggregator` that keeps a few numbers of an item, not D. It implements `projection` and `absorb` instead of `update`.

    If `projects` is False, items are already projected.
    """

    reads_half = True
    projects = True

    @abstractmethod
    def projection(self, slots: slice) -> torch.Tensor:
        """Return the map of the items, `[S, rank, D]`."""

    @abstractmethod
    def absorb(self, state: State, projected: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> State:
        """Read projected items `[S, B, n, rank]`, as `update` reads items."""

    def project(self, x: torch.Tensor, slots: slice) -> torch.Tensor:
        """Map `[S, B, n, D]`, in any float dtype, to `[S, B, n, rank]` in fp32."""
        if not self.projects:
            return x
        flat = torch.matmul(x.flatten(1, 2), self.projection(slots).to(x.dtype).transpose(1, 2))
        return flat.unflatten(1, x.shape[1:3]).float()

    def update(self, state: State, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> State:
        return self.absorb(state, self.project(x, slots), mask, slots)
