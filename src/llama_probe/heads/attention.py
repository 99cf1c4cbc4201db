"""Multi-head self-attention in a reduced dimension, then mean or max (arXiv 2601.13288)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ProbeError
from .aggregator import Aggregator, masked_max, masked_mean, register_probe_type


@register_probe_type("mha")
class AttentionAggregator(Aggregator):
    """Self-attention over the valid items with `d_inner = D / downcast`, projected back to D, then pooled.

    Query, key and value projections of a slot are one matrix, so that a layer's states are read once. Without biases
    the two stages hold `(L+2) 4 D d_inner` parameters. The mean commutes with the output projection: with
    `pool="mean"` the projection runs on the pooled vector. State: the low-rank projections, `3 d_inner` numbers an item.
    """

    def __init__(self, num_slots, config):
        super().__init__(num_slots, config)
        self.num_heads = config.num_attention_heads
        self.inner_size = config.hidden_size // config.downcast
        self.qkv = nn.Parameter(torch.empty(num_slots, 3 * self.inner_size, config.hidden_size))
        self.out = nn.Parameter(torch.empty(num_slots, config.hidden_size, self.inner_size))
        self.reset_parameters()

    @classmethod
    def check(cls, config):
        if config.hidden_size is None:
            return
        if config.hidden_size % config.downcast:
            raise ProbeError(f"downcast={config.downcast} must divide hidden_size={config.hidden_size}")
        inner = config.hidden_size // config.downcast
        if inner % config.num_attention_heads:
            raise ProbeError(
                f"num_attention_heads={config.num_attention_heads} must divide hidden_size / downcast = {inner}"
            )

    def reset_parameters(self) -> None:
        # Xavier bounds of each D -> d_inner projection by itself; stacking them must not change their scale.
        bound = math.sqrt(6.0 / (self.hidden_size + self.inner_size))
        nn.init.uniform_(self.qkv, -bound, bound)
        # With queries of zero every item attends to all alike: a head starts as mean pooling and learns where to look.
        nn.init.zeros_(self.qkv[:, : self.inner_size])
        nn.init.uniform_(self.out, -bound, bound)

    def _project(self, x: torch.Tensor, slots: slice) -> torch.Tensor:
        slot_count, batch, items, hidden = x.shape
        flat = torch.matmul(x.reshape(slot_count, batch * items, hidden), self.qkv[slots].transpose(1, 2))
        return flat.view(slot_count, batch, items, 3 * self.inner_size)

    def _split(self, qkv: torch.Tensor) -> torch.Tensor:
        """`[S, B, N, 3 d_inner]` to query, key and value of shape `[S * B, heads, N, d_inner / heads]` each."""
        slot_count, batch, items, _ = qkv.shape
        qkv = qkv.view(slot_count * batch, items, 3, self.num_heads, -1)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def update(self, state, x, mask, slots):
        chunks = [] if state is None else state
        return [*chunks, (self._project(x, slots), mask)]

    def result(self, state, slots):
        qkv = (
            torch.cat([chunk for chunk, _ in state], dim=2) if len(state) > 1 else state[0][0]
        )  # [S, B, N, 3 d_inner]
        slot_count, batch, items, _ = qkv.shape
        mask = self._joined_mask(state)
        query, key, value = self._split(qkv)
        attention_mask = None
        if mask is not None:  # every query of a row sees that row's valid keys
            attention_mask = mask.repeat(slot_count, 1)[:, None, None, :]  # [S * B, 1, 1, N]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        mixed = mixed.transpose(1, 2).reshape(slot_count, batch, items, self.inner_size)
        out = self.out[slots].transpose(1, 2)  # [S, d_inner, D]
        if self.pool == "mean":
            return torch.matmul(masked_mean(mixed, mask), out)  # [S, B, D]
        return masked_max(torch.matmul(mixed.flatten(1, 2), out).unflatten(1, (batch, items)), mask)

    def weights(self, x, mask, slots):
        """Attention that each item receives, averaged over heads and over the valid queries."""
        slot_count, batch, items, _ = x.shape
        query, key, _ = self._split(self._project(x, slots))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])  # [S * B, heads, N, N]
        if mask is not None:
            scores = scores.masked_fill(~mask.repeat(slot_count, 1)[:, None, None, :], float("-inf"))
        received = scores.softmax(dim=-1).mean(dim=1).view(slot_count, batch, items, items)
        return masked_mean(received, mask)

    @staticmethod
    def _joined_mask(state) -> torch.Tensor | None:
        if all(mask is None for _, mask in state):
            return None
        masks = [qkv.new_ones(qkv.shape[1:3], dtype=torch.bool) if mask is None else mask for qkv, mask in state]
        return torch.cat(masks, dim=1)
