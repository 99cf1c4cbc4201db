"""The mean over queries of an attention's results, in blocks that stay in a processor's cache."""

from __future__ import annotations

import torch


# Items below which the fewest calls are fastest.
_LEAST_ITEMS = 48
# Attention scores held at once: a megabyte a thread.
_SCORES = 1 << 18
# exp() of a score within +-_SAFE, and a sum of such exponentials, fits into fp32.
_SAFE = 60.0


def suits(query: torch.Tensor) -> bool:
    """Return True if `mean_attention` is faster than `scaled_dot_product_attention` for queries `[P, heads, N, d]`."""
    on_cpu = query.device.type == "cpu"
    return on_cpu and query.shape[-2] >= _LEAST_ITEMS and not torch.is_grad_enabled()


def mean_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, valid: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Average the results of `scaled_dot_product_attention` over the valid queries: `[P, heads, d]`. Not differentiable.

    The mean commutes with the product with the values: how much attention each item receives is enough.

    Args:
        query, key, value (`[P, heads, N, d]`, fp32).
        valid (`torch.BoolTensor` of shape `[P, N]`, *optional*): the items that count, as queries and as keys.
    """
    pairs, heads, items, size = query.shape
    query, key, value = ((part.reshape(-1, items, size)) for part in (query * scale, key, value))  # [P heads, N, d]
    weight = query.new_full((1, items), 1 / items)
    if valid is not None:
        valid = valid.repeat_interleave(heads, dim=0)  # [P heads, N]
        weight = valid / valid.sum(dim=1, keepdim=True).clamp_min(1)
    # |q . k| <= |q| |k|: if all scores are this small, no maximum needs to be subtracted.
    safe = float(query.norm(dim=-1).amax() * key.norm(dim=-1).amax()) < _SAFE
    received = query.new_zeros(len(query), 1, items)
    numbers = _SCORES * torch.get_num_threads()
    rows = max(1, min(items, numbers // items))
    step = max(1, numbers // (rows * items))
    scratch = query.new_empty(min(step, len(query)) * rows * items)
    for first in range(0, len(query), step):
        these = slice(first, first + step)
        keys = key[these].transpose(1, 2)  # [block, d, N]
        for begin in range(0, items, rows):
            part = query[these, begin : begin + rows]
            scores = scratch[: part.shape[0] * part.shape[1] * items].view(*part.shape[:2], items)
            torch.bmm(part, keys, out=scores)
            if valid is not None:
                scores.masked_fill_(~valid[these, None], float("-inf"))
            if not safe:
                # A row without a valid key would give NaN; clamped, it hands out nothing.
                scores -= scores.amax(dim=2, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
            total = scores.exp_().sum(dim=2).unsqueeze(1)  # [block, 1, rows]
            share = weight[these if valid is not None else slice(None), begin : begin + rows].unsqueeze(1)
            received[these].baddbmm_(share / total.clamp_min(torch.finfo(total.dtype).tiny), scores)
    return torch.bmm(received, value).view(pairs, heads, size)
