"""Multi-head self-attention in a reduced dimension, then mean or max (arXiv 2601.13288)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ProbeError
from .aggregator import State, masked_max, masked_mean, register_probe_type
from .configuration import ProbeConfig
from .low_rank import LowRankAggregator
from .mean_attention import mean_attention, suits
from .pooling import PoolingAggregator


@register_probe_type("mha")
class AttentionAggregator(LowRankAggregator):
    """Self-attention over the valid items with `d_inner = D / downcast`, projected back to D, then pooled.

    Query, key and value projections of a slot are one matrix, so that a layer's states are read once. Without biases
    the two stages hold `(L+2) 4 D d_inner` parameters. The mean commutes with the output projection: with
    `pool="mean"` the projection runs on the pooled vector. State: the low-rank projections, `3 d_inner` numbers an item.

    Causal, an item attends to itself and earlier valid ones, so that later items change nothing of what it gave. State:
    keys and values, `2 d_inner` numbers an item, and the running sum or maximum of what the items gave.
    """

    search_space = {
        "pool": ["mean", "max"],
        "downcast": [4, 8, 16, 32, 64],
        "num_attention_heads": [1, 2, 3, 4, 8, 16],
    }

    def __init__(self, num_slots: int, config: ProbeConfig):
        super().__init__(num_slots, config)
        self.num_heads = config.num_attention_heads
        self.inner_size = self.hidden_size // config.downcast
        self.head_size = self.inner_size // self.num_heads
        self.scale = 1 / math.sqrt(self.head_size)
        self.qkv = nn.Parameter(torch.empty(num_slots, 3 * self.inner_size, self.hidden_size))
        self.out = nn.Parameter(torch.empty(num_slots, self.hidden_size, self.inner_size))
        self.pooling = PoolingAggregator(num_slots, config)  # of what the items gave, if causal
        # Xavier bounds of each D -> d_inner projection by itself; stacking them must not change their scale.
        bound = math.sqrt(6.0 / (self.hidden_size + self.inner_size))
        nn.init.uniform_(self.qkv, -bound, bound)
        # With queries of zero every item attends to all alike: a head starts as mean pooling and learns where to look.
        nn.init.zeros_(self.qkv[:, : self.inner_size])
        nn.init.uniform_(self.out, -bound, bound)

    @classmethod
    def check(cls, config: ProbeConfig) -> None:
        super().check(config)
        if config.hidden_size is None:
            return
        inner, rest = divmod(config.hidden_size, config.downcast)
        if rest:
            raise ProbeError(f"downcast={config.downcast} must divide hidden_size={config.hidden_size}")
        if inner % config.num_attention_heads:
            heads = f"num_attention_heads={config.num_attention_heads}"
            raise ProbeError(f"{heads} must divide hidden_size / downcast = {inner}")

    def projection(self, slots: slice) -> torch.Tensor:
        return self.qkv[slots]

    def _split(self, qkv: torch.Tensor, padding: int = 0) -> tuple[torch.Tensor, ...]:
        """Split `[S, B, N, 3 d_inner]` into query, key and value, `[S * B, heads, N, d_inner / heads + padding]` each."""
        slot_count, batch, items, _ = qkv.shape
        qkv = qkv.reshape(slot_count * batch, items, 3, self.num_heads, self.head_size).permute(2, 0, 3, 1, 4)
        if padding:  # the padded copy is contiguous, so that nothing copies its parts
            qkv = F.pad(qkv, (0, padding))
        return qkv.unbind(0)

    def absorb(self, state: State, projected: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> State:
        if self.causal:
            return self._absorb_causal(state, projected, mask, slots)
        mask = None if mask is None else mask.expand(len(projected), -1, -1)  # [S, B, n]
        if state is None:
            return projected, mask
        qkv, valid = state
        if mask is not None or valid is not None:
            parts = ((qkv, valid), (projected, mask))
            masks = (x.new_ones(x.shape[:3], dtype=torch.bool) if part is None else part for x, part in parts)
            mask = torch.cat(tuple(masks), dim=2)
        return torch.cat([qkv, projected], dim=2), mask

    def _absorb_causal(self, state: State, projected: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> State:
        slot_count, batch, items, _ = projected.shape
        # Slots beside the heads, [B, S * heads, n, ...]: one mask a row serves them all.
        qkv = projected.view(slot_count, batch, items, 3, self.num_heads, -1)
        query, key, value = qkv.permute(3, 1, 0, 4, 2, 5).flatten(2, 3).unbind(0)
        is_whole = mask is None and state is None  # needs no mask [B, N, N]
        mask = projected.new_ones(batch, items, dtype=torch.bool) if mask is None else mask
        valid = mask
        if state is not None:
            old_key, old_value = (part.transpose(0, 1).flatten(1, 2) for part in state[:2])
            key, value = torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)
            valid = torch.cat([state[2][0], mask], dim=1)  # [B, N]
        earlier = None if is_whole else _earlier(valid, items)[:, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=earlier, is_causal=is_whole)
        mixed = mixed.unflatten(1, (slot_count, -1)).permute(1, 0, 3, 2, 4).flatten(3)  # [S, B, n, d_inner]
        given = mixed if self.pool == "mean" else self._project_back(mixed, slots)
        pooled = self.pooling.update(None if state is None else state[3], given, mask, slots)
        key, value = (part.unflatten(1, (slot_count, -1)).transpose(0, 1) for part in (key, value))
        return key, value, valid.expand(slot_count, -1, -1), pooled

    def _project_back(self, mixed: torch.Tensor, slots: slice) -> torch.Tensor:
        """Project `[S, B, N, d_inner]` to `[S, B, N, D]`."""
        return torch.matmul(mixed.flatten(1, 2), self.out[slots].transpose(1, 2)).unflatten(1, mixed.shape[1:3])

    def result(self, state: State, slots: slice) -> torch.Tensor:
        if self.causal:
            pooled = self.pooling.result(state[3], slots)
            if self.pool == "max":
                return pooled
        else:
            qkv, mask = state[0], None if state[1] is None else state[1][0]
            if self.pool == "max":
                mixed = self._attend(qkv, mask).transpose(1, 2).reshape(*qkv.shape[:3], -1)  # [S, B, N, d_inner]
                return masked_max(self._project_back(mixed, slots), mask)
            pooled = self._mixed_mean(qkv, mask)
        return torch.matmul(pooled, self.out[slots].transpose(1, 2))  # [S, B, D]

    def _mixed_mean(self, qkv: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Average what the items gather: `[S, B, N, 3 d_inner]` to `[S, B, d_inner]`."""
        slots, batch = qkv.shape[:2]
        query, key, value = self._split(qkv)
        if suits(query):
            valid = None if mask is None else mask.repeat(slots, 1)  # [S * B, N]
            return mean_attention(query, key, value, valid, self.scale).view(slots, batch, -1)
        mixed = self._attend(qkv, mask).unflatten(0, (slots, batch))  # [S, B, heads, N, d_inner / heads]
        if mask is None:
            return mixed.mean(dim=3).flatten(2)
        weight = mask / mask.sum(dim=1, keepdim=True).clamp_min(1)  # [B, N]
        return torch.matmul(weight[:, None, None], mixed).flatten(2)

    def _attend(self, qkv: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return what each item gathers: `[S, B, N, 3 d_inner]` to `[S * B, heads, N, d_inner / heads]`."""
        # An accelerator's kernels, and those with gradients, have fast paths for multiples of eight dimensions alone.
        fast = torch.is_grad_enabled() or qkv.device.type != "cpu"
        query, key, value = self._split(qkv, padding=-self.head_size % 8 if fast else 0)
        attention_mask = None
        if mask is not None:  # every query of a row sees that row's valid keys
            attention_mask = mask.repeat(len(qkv), 1)[:, None, None, :]  # [S * B, 1, 1, N]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=self.scale)
        return mixed[..., : self.head_size]

    def weights(self, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> torch.Tensor:
        """Return the attention that each item receives, averaged over heads and over the valid queries."""
        slot_count, batch, items, _ = x.shape
        query, key, _ = self._split(self.project(x, slots))
        scores = torch.matmul(query, key.transpose(-1, -2)) * self.scale  # [S * B, heads, N, N]
        valid = x.new_ones(batch, items, dtype=torch.bool) if mask is None else mask
        seen = _earlier(valid, items) if self.causal else valid[:, None]  # [B, N or 1, N]
        scores = scores.masked_fill(~seen.repeat(slot_count, 1, 1)[:, None], float("-inf"))
        received = scores.softmax(dim=-1).mean(dim=1).view(slot_count, batch, items, items)
        return masked_mean(received, mask)


def _earlier(valid: torch.Tensor, queries: int) -> torch.Tensor:
    """Mark what each of the last `queries` items may attend to, itself and valid earlier ones: `[B, N]` to `[B, queries, N]`."""
    items = valid.shape[1]
    if queries == 1:
        return F.pad(valid[:, None, :-1], (0, 1), value=True)
    itself = torch.arange(items - queries, items, device=valid.device)[:, None]
    others = torch.arange(items, device=valid.device)
    return (valid[:, None, :] & (others < itself)) | (others == itself)
