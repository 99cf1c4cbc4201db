"""Attentive pooling: a few learned queries a slot, each summarising the items through values of low rank.

What multi-head attention over the prompt becomes when the queries do not come from the items but are learned: no item
attends to another, so the cost is linear in the items and the state does not grow with them.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ..errors import ProbeError
from .aggregator import State, register_probe_type
from .configuration import ProbeConfig
from .low_rank import LowRankAggregator


@register_probe_type("attentive")
class AttentivePoolingAggregator(LowRankAggregator):
    """a_k = softmax(x q_k / sqrt(D)), z_k = sum_i a_ki V_k x_i, v = U [z_1; ...; z_K].

    `options`: `num_queries` K (default 4), and `value_rank` R (default 8), the rows of all V_k together, a multiple of
    K. Both stages hold `(L+2) (K + 2 R) D` parameters. Queries start at zero: an untrained head is mean pooling through
    a low-rank map. State: the running maximum, denominator and numerator of each softmax, `2 K + R` numbers.
    """

    training_defaults = LowRankAggregator.training_defaults | {"learning_rate": 1e-2}
    search_space = {"num_queries": [1, 2, 4, 8], "value_rank": [1, 2, 4, 8, 16, 32]}
    options = {
        "num_queries": (4, "queries, each with a softmax of its own over the items"),
        "value_rank": (8, "numbers kept of each item, over all queries; a multiple of num_queries"),
    }

    def __init__(self, num_slots: int, config: ProbeConfig):
        super().__init__(num_slots, config)
        self.num_queries, self.value_rank = self.option(config, "num_queries"), self.option(config, "value_rank")
        self.query = nn.Parameter(torch.zeros(num_slots, self.num_queries, self.hidden_size))
        self.value = nn.Parameter(torch.empty(num_slots, self.value_rank, self.hidden_size))
        self.out = nn.Parameter(torch.empty(num_slots, self.hidden_size, self.value_rank))
        bound = math.sqrt(6.0 / (self.hidden_size + self.value_rank))
        nn.init.uniform_(self.value, -bound, bound)
        nn.init.uniform_(self.out, -bound, bound)

    @classmethod
    def check(cls, config: ProbeConfig) -> None:
        super().check(config)
        queries, rank = cls.option(config, "num_queries"), cls.option(config, "value_rank")
        if rank % queries:
            raise ProbeError(f"options: num_queries={queries} must divide value_rank={rank}")

    def projection(self, slots: slice) -> torch.Tensor:
        return torch.cat([self.query[slots] / math.sqrt(self.hidden_size), self.value[slots]], dim=1)

    def _split(self, projected: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores `[S, B, K, n]`, lowest off the mask, and values `[S, B, K, n, R / K]`."""
        scores, values = projected.split([self.num_queries, self.value_rank], dim=-1)
        scores = scores.transpose(2, 3)
        if mask is not None:
            scores = scores.masked_fill(~mask[None, :, None, :], torch.finfo(scores.dtype).min)
        return scores, values.unflatten(-1, (self.num_queries, -1)).transpose(2, 3)

    def absorb(self, state: State, projected: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> State:
        scores, values = self._split(projected, mask)
        top = scores.detach().amax(dim=-1)  # [S, B, K]
        if state is not None:
            top = torch.maximum(top, state[0])
        weights = (scores - top.unsqueeze(-1)).exp()
        if mask is not None:  # a chunk may hold nothing that counts for a row
            weights = weights * mask[None, :, None, :]
        norm = weights.sum(dim=-1)  # [S, B, K]
        total = torch.matmul(weights.unsqueeze(-2), values).squeeze(-2)  # [S, B, K, R / K]
        if state is not None:
            shrink = (state[0] - top).exp()
            norm = norm + state[1] * shrink
            total = total + state[2] * shrink.unsqueeze(-1)
        return top, norm, total

    def result(self, state: State, slots: slice) -> torch.Tensor:
        _, norm, total = state
        pooled = (total / norm.clamp_min(torch.finfo(norm.dtype).tiny).unsqueeze(-1)).flatten(2)  # [S, B, R]
        return torch.matmul(pooled, self.out[slots].transpose(1, 2))

    def weights(self, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> torch.Tensor:
        """Return the softmax of each query, averaged over queries."""
        scores, _ = self._split(self.project(x, slots), mask)
        return scores.softmax(dim=-1).mean(dim=2)
