"""Multi-head self-attention in a reduced dimension, then mean or max (arXiv 2601.13288)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ProbeError
from .aggregator import masked_max, masked_mean, register_probe_type
from .low_rank import LowRankAggregator


@register_probe_type("mha")
class AttentionAggregator(LowRankAggregator):
    """Self-attention over the valid items with `d_inner = D / downcast`, projected back to D, then pooled.

    Query, key and value projections of a slot are one matrix, so that a layer's states are read once. Without biases
    the two stages hold `(L+2) 4 D d_inner` parameters. The mean commutes with the output projection: with
    `pool="mean"` the projection runs on the pooled vector. State: the low-rank projections, `3 d_inner` numbers an item.

    Causal, an item attends to itself and earlier valid ones, so that later items change nothing of what it gave. State:
    keys and values, `2 d_inner` numbers an item, and the running sum or maximum of what the items gave.
    """

    def __init__(self, num_slots, config):
        super().__init__(num_slots, config)
        self.num_heads = config.num_attention_heads
        self.inner_size = config.hidden_size // config.downcast
        self.head_size = self.inner_size // self.num_heads
        self.scale = 1 / math.sqrt(self.head_size)
        self.qkv = nn.Parameter(torch.empty(num_slots, 3 * self.inner_size, config.hidden_size))
        self.out = nn.Parameter(torch.empty(num_slots, config.hidden_size, self.inner_size))
        self.reset_parameters()

    @classmethod
    def check(cls, config):
        super().check(config)
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

    @property
    def rank(self) -> int | None:
        """Causal, an item's part is summed up as it comes, and the maximum does not commute with the output projection."""
        return None if self.causal or self.pool == "max" else 3 * self.inner_size

    def projection(self, slots):
        return self.qkv[slots]

    def map_of(self, slot):
        return self.qkv[slot]

    def _split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`[S, B, N, 3 d_inner]` to query, key and value of shape `[S * B, heads, N, d_inner / heads]` each.

        Where there are many, or in training, zeros fill them up to a multiple of eight dimensions: attention kernels have fast
        paths for these alone.
        """
        slot_count, batch, items, _ = qkv.shape
        qkv = qkv.reshape(slot_count * batch, items, 3, self.num_heads, self.head_size)
        if items >= _MANY or torch.is_grad_enabled():
            qkv = F.pad(qkv, (0, -self.head_size % 8))
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def update(self, state, x, mask, slots):
        return self._update_causal(state, x, mask, slots) if self.causal else super().update(state, x, mask, slots)

    def absorb(self, state, projected, mask):
        chunks = [] if state is None else state
        return [*chunks, (projected, None if mask is None else mask.expand(len(projected), -1, -1))]

    def _update_causal(self, state, x, mask, slots):
        slot_count, batch, items, _ = x.shape
        # Slots beside the heads, [B, S * heads, n, ...]: one mask a row serves them all.
        qkv = self.project(x, slots).view(slot_count, batch, items, 3, self.num_heads, -1)
        query, key, value = qkv.permute(3, 1, 0, 4, 2, 5).flatten(2, 3).unbind(0)
        mask = x.new_ones(batch, items, dtype=torch.bool) if mask is None else mask
        valid = mask
        if state is not None:
            old_key, old_value = (part.transpose(0, 1).flatten(1, 2) for part in state[:2])
            key, value = torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)
            valid = torch.cat([state[2][0], mask], dim=1)  # [B, N]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=_earlier(valid, items)[:, None])
        mixed = mixed.unflatten(1, (slot_count, -1)).permute(1, 0, 3, 2, 4).flatten(3)  # [S, B, n, d_inner]
        weight = mask.to(x.dtype)
        if self.pool == "mean":
            total = torch.matmul(weight[None, :, None, :], mixed).squeeze(2)  # [S, B, d_inner]
            count = weight.sum(dim=1).expand(slot_count, -1)  # [S, B]
            gathered = (total, count) if state is None else (state[3] + total, state[4] + count)
        else:
            top = masked_max(self._project_back(mixed, slots), mask)
            gathered = (top if state is None else torch.maximum(state[3], top),)
        key, value = (part.unflatten(1, (slot_count, -1)).transpose(0, 1) for part in (key, value))
        return key, value, valid.expand(slot_count, -1, -1), *gathered

    def _project_back(self, mixed: torch.Tensor, slots: slice) -> torch.Tensor:
        """`[S, B, N, d_inner]` to `[S, B, N, D]`."""
        return torch.matmul(mixed.flatten(1, 2), self.out[slots].transpose(1, 2)).unflatten(1, mixed.shape[1:3])

    def result(self, state, slots):
        if self.causal:
            if self.pool == "max":
                return state[3]
            total, count = state[3:]
            return self.expand(total / count.clamp_min(1.0).unsqueeze(-1), slots)
        if self.pool == "mean":
            return super().result(state, slots)
        qkv, mask = self._joined(state)
        return masked_max(self._project_back(self._mixed(qkv, mask), slots), mask)

    def pooled(self, state):
        qkv, mask = self._joined(state)
        # For few items the fewest calls are fastest, for many the fewest operations.
        traced = torch.compiler.is_dynamo_compiling()
        many = qkv.shape[2] >= (_MANY_TRACED if traced else _MANY) and qkv.device.type == "cpu"
        if many and not torch.is_grad_enabled():
            mixed_mean = _traced_mixed_mean if traced else _mixed_mean
            return mixed_mean(qkv, mask, self.num_heads, self.hidden_size)
        return masked_mean(self._mixed(qkv, mask), mask)

    def expand(self, pooled, slots):
        return torch.matmul(pooled, self.out[slots].transpose(1, 2))

    def _mixed(self, qkv: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """What each item gathers: `[S, B, N, 3 d_inner]` to `[S, B, N, d_inner]`."""
        slot_count, batch, items, _ = qkv.shape
        query, key, value = self._split(qkv)
        attention_mask = None
        if mask is not None:  # every query of a row sees that row's valid keys
            attention_mask = mask.repeat(slot_count, 1)[:, None, None, :]  # [S * B, 1, 1, N]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=self.scale)
        return mixed[..., : self.head_size].transpose(1, 2).reshape(slot_count, batch, items, self.inner_size)

    def weights(self, x, mask, slots):
        """Attention that each item receives, averaged over heads and over the valid queries."""
        slot_count, batch, items, _ = x.shape
        query, key, _ = self._split(self.project(x, slots))
        scores = torch.matmul(query, key.transpose(-1, -2)) * self.scale  # [S * B, heads, N, N]
        if self.causal:
            seen = _earlier(x.new_ones(batch, items, dtype=torch.bool) if mask is None else mask, items)
            scores = scores.masked_fill(~seen.repeat(slot_count, 1, 1)[:, None], float("-inf"))
        elif mask is not None:
            scores = scores.masked_fill(~mask.repeat(slot_count, 1)[:, None, None, :], float("-inf"))
        received = scores.softmax(dim=-1).mean(dim=1).view(slot_count, batch, items, items)
        return masked_mean(received, mask)

    @staticmethod
    def _joined(state) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All chunks as one: `[S, B, N, 3 d_inner]`, and the mask `[B, N]`, `None` where all items count."""
        if len(state) == 1:
            qkv, mask = state[0]
            return qkv, None if mask is None else mask[0]
        qkv = torch.cat([chunk for chunk, _ in state], dim=2)
        if all(mask is None for _, mask in state):
            return qkv, None
        masks = [part.new_ones(part.shape[1:3], dtype=torch.bool) if mask is None else mask[0] for part, mask in state]
        return qkv, torch.cat(masks, dim=1)


# So many items at least; where `torch.compile` traces, the calls of short prompts cost less.
_MANY, _MANY_TRACED = 48, 256
# Attention scores that are held at once: a megabyte a thread.
_CACHED = 1 << 18


def _mixed_mean(qkv: torch.Tensor, mask: torch.Tensor | None, num_heads: int, hidden_size: int) -> torch.Tensor:
    """The mean over the valid items of what each gathers, on the CPU and not differentiable.

    The mean commutes with the values: it is enough to know how much attention each item receives from all of them.

    Args:
        qkv (`[S, B, N, 3 d_inner]`), mask (`[B, N]`).

    Returns:
        `[S, B, d_inner]`.
    """
    slot_count, batch, items, _ = qkv.shape
    qkv = qkv.transpose(2, 3).unflatten(2, (3, num_heads, -1))
    query, key, value = (part.reshape(-1, part.shape[-2], items) for part in qkv.unbind(2))  # [S * B * heads, ...]
    valid = None
    if mask is not None and not bool(mask.all()):  # where all count it is faster
        valid = mask[None, :, None].expand(slot_count, -1, num_heads, -1).reshape(-1, items)
    # As much memory as the states of one layer, and no more than fits into a core's cache.
    numbers = min(_CACHED * torch.get_num_threads(), batch * items * hidden_size)
    scale = 1 / math.sqrt(query.shape[1])
    received = _received_attention(query.transpose(1, 2), key, valid, scale, numbers)
    mixed = torch.bmm(received.unsqueeze(1), value.transpose(1, 2))  # [S * B * heads, 1, d_inner / heads]
    return mixed.view(slot_count, batch, -1)


# In a graph of `torch.compile` it is one operation, which the compiler does not look into: what it makes of it is slower. The
# name is that of this module, of which a process may have several, from repositories of other versions.
_traced_mixed_mean = torch.library.custom_op(f"{__name__.replace('.', '_')}::mixed_mean", _mixed_mean, mutates_args=())


@_traced_mixed_mean.register_fake
def _(qkv, mask, num_heads, hidden_size):
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[3] // 3)


def _received_attention(
    query: torch.Tensor, key: torch.Tensor, valid: torch.Tensor | None, scale: float, numbers: int
) -> torch.Tensor:
    """How much attention each item receives from the valid ones in the mean: `[P, N]`.

    Args:
        query (`[P, N, d]`), key (`[P, d, N]`).
        valid (`torch.BoolTensor` of shape `[P, N]`, *optional*): the items that count.
        numbers: so many scores are held at once, if it is enough for one query.
    """
    items = query.shape[1]
    if valid is None:
        weight, given = query.new_full((1, 1, 1), 1 / items), 1.0
    else:
        weight = valid.to(query.dtype)
        weight = (weight / weight.sum(dim=1, keepdim=True).clamp_min(1.0)).unsqueeze(1)  # [P, 1, N]
        given = weight.sum(dim=(1, 2))
    query = query * scale
    received = _share_out(query, key, valid, weight, numbers, _exp)
    # Each item hands out as much as it has, unless an exponential was too large or a row of them too small.
    if not bool(((received.sum(dim=1) - given).abs() < 0.25 / items).all()):
        received = _share_out(query, key, valid, weight, numbers, _exp_below_largest)
    return received


def _share_out(query, key, valid, weight, numbers, exponential) -> torch.Tensor:
    """`_received_attention`, of scaled queries that have `weight`, by blocks that stay in the processor's cache.

    The softmax is taken apart: of the three passes over the scores that it makes, one is enough.
    """
    pairs, items, _ = query.shape
    received = query.new_zeros(pairs, 1, items)
    rows = max(1, min(items, numbers // items))
    step = max(1, numbers // (rows * items))
    scratch = query.new_empty(min(step, pairs) * rows * items)
    for first in range(0, pairs, step):
        these = slice(first, first + step)
        for begin in range(0, items, rows):
            part = query[these, begin : begin + rows]
            scores = scratch[: part.shape[0] * part.shape[1] * items].view(*part.shape[:2], items)
            torch.bmm(part, key[these], out=scores)
            counted = None if valid is None else valid[these].unsqueeze(1)
            total = exponential(scores, counted).sum(dim=2).unsqueeze(1)  # [P, 1, rows]
            # Below that they have lost digits: less than all is then handed out, which is noticed.
            total.clamp_min_(torch.finfo(total.dtype).tiny)
            share = (weight if valid is None else weight[these, :, begin : begin + rows]) / total
            received[these].baddbmm_(share, scores)
    return received.squeeze(1)


def _exp(scores: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """In place; 0 where `valid` is false."""
    scores.exp_()
    return scores if valid is None else scores.mul_(valid)


def _exp_below_largest(scores: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """As `_exp`, but for a factor a query that keeps the largest at 1; half as fast."""
    if valid is not None:
        scores.masked_fill_(~valid, torch.finfo(scores.dtype).min)
    scores -= scores.amax(dim=2, keepdim=True)
    return _exp(scores, valid)


def _earlier(valid: torch.Tensor, queries: int) -> torch.Tensor:
    """What each of the last `queries` items may attend to: itself and the valid ones before it. `[B, N]` to `[B, queries, N]`."""
    items = valid.shape[1]
    if queries == 1:
        return F.pad(valid[:, None, :-1], (0, 1), value=True)
    itself = torch.arange(items - queries, items, device=valid.device)[:, None]
    others = torch.arange(items, device=valid.device)
    return (valid[:, None, :] & (others < itself)) | (others == itself)
