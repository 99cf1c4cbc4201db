"""Direct pooling: mean or max over the valid items, per dimension. No parameters (arXiv 2601.13288)."""

from __future__ import annotations

import torch

from .aggregator import Aggregator, State, drop_masked, masked_max, register_probe_type


@register_probe_type("pooling")
class PoolingAggregator(Aggregator):
    """Mean or maximum of the valid items. State: a running sum with its count, or a running maximum."""

    training_defaults = Aggregator.training_defaults | {"learning_rate": 1e-2, "dropout": 0.1, "layer_dropout": 0.0}
    auto_up_to = 128
    search_space = {"learning_rate": (1e-4, 3e-2), "pool": ["mean", "max"]}

    def update(self, state: State, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> State:
        if self.pool == "max":
            top = masked_max(x, mask)  # [S, B, D]
            return top if state is None else torch.maximum(state, top)
        if mask is None:
            total, count = x.sum(dim=2), x.new_full(x.shape[:2], float(x.shape[2]))
        else:
            weight = mask.to(x.dtype)
            total = torch.matmul(weight[None, :, None, :], x).squeeze(2)  # [S, B, D]
            count = weight.sum(dim=1).expand(len(x), -1)  # [S, B]
        return (total, count) if state is None else (state[0] + total, state[1] + count)

    def result(self, state: State, slots: slice) -> torch.Tensor:
        if self.pool == "max":
            return state
        total, count = state
        return total / count.clamp_min(1.0).unsqueeze(-1)

    def weights(self, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> torch.Tensor:
        """Return equal weights (mean), or the share of dimensions in which the item is the maximum (max)."""
        slot_count, batch, items, _ = x.shape
        if self.pool == "mean":
            valid = x.new_ones(batch, items) if mask is None else mask.to(x.dtype)
            return (valid / valid.sum(dim=1, keepdim=True).clamp_min(1.0)).expand(slot_count, batch, items)
        winners = drop_masked(x, mask).argmax(dim=2)  # [S, B, D]
        ones = torch.ones_like(winners, dtype=x.dtype)
        return x.new_zeros(slot_count, batch, items).scatter_add_(2, winners, ones) / x.shape[-1]
