"""Kinds that read an item through a linear map to a few numbers, and give a linear map of what they make of these."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .aggregator import Aggregator


class LowRankAggregator(Aggregator):
    """An `Aggregator` in three parts: `projection`, a linear map of each item to `rank` numbers; `absorb` and `pooled`, which
    know only these, and need no parameters; and `expand`, a linear map of the pooled numbers to the summary.

    The middle part is the same for all slots and for all heads of one shape, so that a serving LM's layers, and heads, can
    wait for each other and go through it together: what waits is `rank` numbers a token.

    Attributes:
        rank: of the instance; `None` where it cannot be taken apart in this way.
    """

    @abstractmethod
    def projection(self, slots: slice) -> torch.Tensor:
        """The map of the items, `[S, rank, D]`."""

    @abstractmethod
    def absorb(self, state: Any, projected: torch.Tensor, mask: torch.Tensor | None) -> Any:
        """As `update`, of projected items: `[S, B, n, rank]`, for any slots."""

    @abstractmethod
    def pooled(self, state: Any) -> torch.Tensor:
        """What `expand` needs of everything taken in so far: `[S, B, ...]`."""

    @abstractmethod
    def expand(self, pooled: torch.Tensor, slots: slice) -> torch.Tensor:
        """The summaries `[S, B, D]`, or of any other width that the kind's layer stage takes."""

    def map_of(self, slot: int) -> torch.Tensor:
        """The map of one slot, `[rank, D]`."""
        return self.projection(slice(slot, slot + 1))[0]

    def mapper(self, slot: int) -> Callable[..., torch.Tensor]:
        """What maps items `[n, D]` to `[n, rank]`, in fp32 and without gradients, into the tensor given as `out=`."""
        return partial(torch.mm, mat2=self.map_of(slot).t())

    def project(self, x: torch.Tensor, slots: slice) -> torch.Tensor:
        """`[S, B, n, D]`, in any float dtype, to `[S, B, n, rank]` in fp32."""
        flat = torch.matmul(x.flatten(1, 2), self.projection(slots).to(x.dtype).transpose(1, 2))
        return flat.unflatten(1, x.shape[1:3]).float()

    def update(self, state, x, mask, slots):
        return self.absorb(state, self.project(x, slots), mask)

    def result(self, state, slots):
        return self.expand(self.pooled(state), slots)
