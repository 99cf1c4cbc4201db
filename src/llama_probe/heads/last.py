"""The last item alone: with one layer, the last-token linear probe of its state. No parameters."""

from __future__ import annotations

import torch

from .aggregator import Aggregator, State, last_valid, register_probe_type


@register_probe_type("last")
class LastItemAggregator(Aggregator):
    """The last valid item: of the tokens, and then of the layers. State: that item, so far.

    No other layer matters: `layers=[k]` is a linear probe of state k, and `"all"` one of the final state.
    """

    training_defaults = Aggregator.training_defaults | {"learning_rate": 1e-2, "dropout": 0.1, "layer_dropout": 0.0}
    reads = "last"

    def update(self, state: State, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> State:
        if mask is None:
            return x[:, :, -1].clone()  # a view would keep the states of all tokens in memory
        rows = torch.arange(x.shape[1], device=x.device)
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)  # [B]; the last column if no item counts
        newest = x[:, rows, last]  # [S, B, D]
        if state is None:  # a later chunk replaces the item of a row in which no item counts
            return newest
        return torch.where(mask.any(dim=1)[None, :, None], newest, state)

    def result(self, state: State, slots: slice) -> torch.Tensor:
        return state

    def weights(self, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> torch.Tensor:
        """Return 1 for the last valid item, 0 for all others."""
        slot_count, batch, items, _ = x.shape
        valid = x.new_ones(batch, items, dtype=torch.bool) if mask is None else mask
        return last_valid(valid).to(x.dtype).expand(slot_count, batch, items)
