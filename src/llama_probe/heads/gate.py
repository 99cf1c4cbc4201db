"""Scoring gate: one learned score an item, softmax over the valid ones, weighted sum (arXiv 2601.13288)."""

from __future__ import annotations

import torch
from torch import nn

from .aggregator import Aggregator, register_probe_type


@register_probe_type("gate")
class GateAggregator(Aggregator):
    """s_i = tanh(w . x_i), a = softmax(s), v = sum_i a_i x_i, with one w a slot: `(L+2) D` parameters in both stages.

    tanh keeps every score within [-1, 1], so the softmax needs no maximum taken off: its numerator and denominator are
    plain running sums, and that is the whole state. w starts at zero, so that an untrained gate is mean pooling.
    """

    def __init__(self, num_slots, config):
        super().__init__(num_slots, config)
        self.weight = nn.Parameter(torch.zeros(num_slots, config.hidden_size))

    def _exp_scores(self, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> torch.Tensor:
        slot_count, batch, items, hidden = x.shape
        scores = torch.matmul(x.reshape(slot_count, batch * items, hidden), self.weight[slots].unsqueeze(-1))
        scores = scores.tanh().exp().view(slot_count, batch, items)  # [S, B, N]
        return scores if mask is None else scores * mask.to(scores.dtype)

    def update(self, state, x, mask, slots):
        scores = self._exp_scores(x, mask, slots)  # [S, B, N]
        total = torch.matmul(scores.unsqueeze(2), x).squeeze(2)  # [S, B, D]
        norm = scores.sum(dim=2)  # [S, B]
        return (total, norm) if state is None else (state[0] + total, state[1] + norm)

    def result(self, state, slots):
        total, norm = state
        return total / norm.clamp_min(torch.finfo(norm.dtype).tiny).unsqueeze(-1)

    @classmethod
    def read(cls, stages, state, x, mask, slot):
        scores = cls._read_scores(stages, x, slice(slot, slot + 1))[0].exp_()  # [H, B, n]
        if mask is not None:
            scores.mul_(mask)
        total = torch.matmul(scores.transpose(0, 1), x[0]).transpose(0, 1)  # [H, B, D]
        norm = scores.sum(dim=2)
        return (total, norm) if state is None else (state[0] + total, state[1] + norm)

    @classmethod
    def summarize(cls, stages, state, slot, out):
        out.copy_(stages[0].result(state, slice(slot, slot + 1)))

    @classmethod
    def read_whole(cls, stages, x, mask, slots, out):
        scores = cls._read_scores(stages, x, slots)  # [S, H, B, n]
        if mask is not None:
            scores.masked_fill_(~mask, float("-inf"))
        out.copy_(torch.matmul(scores.softmax(dim=3).transpose(1, 2), x).transpose(1, 2))

    @staticmethod
    def _read_scores(stages, x: torch.Tensor, slots: slice) -> torch.Tensor:
        """`tanh(...)` of each head, `[S, H, B, n]`."""
        weights = [stage.weight[slots].unsqueeze(1) for stage in stages]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights, dim=1)  # [S, H, D]
        scores = torch.bmm(weight, x.flatten(1, 2).transpose(1, 2))
        return scores.tanh_().view(*weight.shape[:2], *x.shape[1:3])

    def weights(self, x, mask, slots):
        """The softmax itself."""
        scores = self._exp_scores(x, mask, slots)
        return scores / scores.sum(dim=2, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
