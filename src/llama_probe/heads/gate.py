"""Scoring gate: one learned score an item, softmax over the valid ones, weighted sum (arXiv 2601.13288)."""

from __future__ import annotations

import torch
from torch import nn

from .aggregator import Aggregator, State, register_probe_type
from .configuration import ProbeConfig


@register_probe_type("gate")
class GateAggregator(Aggregator):
    """s_i = tanh(w . x_i), a = softmax(s), v = sum_i a_i x_i, with one w a slot: `(L+2) D` parameters in both stages.

    tanh keeps every score within [-1, 1], so the softmax needs no maximum subtracted: its numerator and denominator are
    running sums, and these are the whole state. w starts at zero: an untrained gate is mean pooling.
    """

    training_defaults = Aggregator.training_defaults | {"learning_rate": 1e-2, "dropout": 0.1, "layer_dropout": 0.0}
    auto_up_to = 512
    search_space = {"learning_rate": (1e-4, 3e-2)}
    reads_half = True

    def __init__(self, num_slots: int, config: ProbeConfig):
        super().__init__(num_slots, config)
        self.weight = nn.Parameter(torch.zeros(num_slots, self.hidden_size))

    def _shares(self, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> torch.Tensor:
        """Return exp(s_i), 0 off the mask: `[S, B, N]`, fp32."""
        weight = self.weight[slots, None, :, None].to(x.dtype)  # [S, 1, D, 1]
        shares = torch.matmul(x, weight).squeeze(-1).float().tanh().exp()  # [S, B, N]
        return shares if mask is None else shares * mask

    def update(self, state: State, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> State:
        shares = self._shares(x, mask, slots)
        if x.dtype == torch.float16:  # the sum of a long prompt would pass its range
            total = torch.matmul((shares / 256).half().unsqueeze(2), x).squeeze(2).float() * 256  # [S, B, D]
        else:
            total = torch.matmul(shares.to(x.dtype).unsqueeze(2), x).squeeze(2).float()
        norm = shares.sum(dim=2)  # [S, B]
        return (total, norm) if state is None else (state[0] + total, state[1] + norm)

    def result(self, state: State, slots: slice) -> torch.Tensor:
        total, norm = state
        return total / norm.clamp_min(torch.finfo(norm.dtype).tiny).unsqueeze(-1)

    def weights(self, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> torch.Tensor:
        shares = self._shares(x, mask, slots)
        return shares / shares.sum(dim=2, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)
