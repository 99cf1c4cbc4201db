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
        x = x[0]  # [B, n, D]
        scores = torch.matmul(x, cls._columns(stages, slot)).tanh_().exp_()  # [B, n, H]
        if mask is not None:
            scores.mul_(mask.unsqueeze(2))
        scores = scores.transpose(1, 2)
        total, norm = torch.bmm(scores, x).transpose(0, 1), scores.sum(dim=2).t()  # [H, B, D], [H, B]
        return (total, norm) if state is None else (state[0] + total, state[1] + norm)

    @classmethod
    def summarize(cls, stages, state, slot, out):
        out.copy_(stages[0].result(state, slice(slot, slot + 1)))

    @classmethod
    def whole_reader(cls, stages, mask, slot, out):
        columns, out = cls._columns(stages, slot), out.transpose(0, 1)  # [D, H], [B, H, D]
        off = None if mask is None else ~mask.unsqueeze(2)

        def read(x: torch.Tensor) -> None:
            scores = torch.matmul(x, columns).tanh_()  # [B, N, H]
            if off is not None:
                scores.masked_fill_(off, float("-inf"))
            torch.bmm(scores.softmax(dim=1).transpose(1, 2), x, out=out)

        return read

    @staticmethod
    def _columns(stages, slot: int) -> torch.Tensor:
        """The weights of each head, `[D, H]`."""
        weights = [stage.weight[slot] for stage in stages]
        return weights[0].unsqueeze(1) if len(weights) == 1 else torch.stack(weights, dim=1)

    def weights(self, x, mask, slots):
        """The softmax itself."""
        scores = self._exp_scores(x, mask, slots)
        return scores / scores.sum(dim=2, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
