"""Multi-max pooling: the largest value that any token gives to each of a few learned directions, layer by layer.

In a long prompt, a short harmful passage hardly changes a mean, but it changes a maximum. Kramár et al. (arXiv 2601.11516) read
a single layer with maxima of learned projections, and Kim (arXiv 1408.5882) the windows of a convolution.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from .aggregator import Aggregator, Classifier, State, drop_masked, masked_max, register_probe_type
from .configuration import ProbeConfig
from .low_rank import LowRankAggregator


@register_probe_type("multimax")
class MultiMaxAggregator(LowRankAggregator):
    """m_r = max_i v_r . x_i for each layer's R directions; the layers' maxima stand side by side, each layer's times a weight.

    `options`: `num_maxima` R (default 4) and `num_members` M (default 16). With M > 1 the head is M heads in one, with R
    directions each: each learns from a loss of its own, and their logits are averaged. Parameters, with L+1 layers read and C
    labels: `(L+1) M R (D + C + 1)`, and a few biases. State: the largest value so far of each direction, `M R` numbers.
    """

    training_defaults = LowRankAggregator.training_defaults | {"learning_rate": 3e-3, "dropout": 0.1}
    auto_up_to = math.inf
    is_idempotent = True
    search_space = {"num_maxima": [1, 2, 4, 8], "num_members": [1, 4, 8, 16]}
    options = {
        "num_maxima": (4, "directions of each member, of which each layer gives the maximum"),
        "num_members": (16, "heads in one; each learns from its own loss, and their logits are averaged"),
    }

    def __init__(self, num_slots: int, config: ProbeConfig):
        super().__init__(num_slots, config)
        rank = self.members(config) * _maxima(config)
        self.value = nn.Parameter(torch.randn(num_slots, rank, self.hidden_size) / math.sqrt(self.hidden_size))

    @classmethod
    def members(cls, config: ProbeConfig) -> int:
        return cls.option(config, "num_members")

    @classmethod
    def create_layer_stage(cls, config: ProbeConfig) -> Aggregator:
        return WeightedLayers(config)

    @classmethod
    def create_classifier(cls, config: ProbeConfig) -> Classifier:
        return AveragedClassifier(cls.members(config), len(config.layer_indices), _maxima(config), config.num_labels)

    def projection(self, slots: slice) -> torch.Tensor:
        return self.value[slots]

    def absorb(self, state: State, projected: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> State:
        top = masked_max(projected, mask)  # [S, B, M R]
        return top if state is None else torch.maximum(state, top)

    def result(self, state: State, slots: slice) -> torch.Tensor:
        # A row without a token that counts has -inf. NaN stays: such a row gets no score.
        return state.nan_to_num(nan=math.nan, posinf=math.inf, neginf=0.0)

    def weights(self, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> torch.Tensor:
        """Return the share of the directions that have their largest value at the item."""
        projected = drop_masked(self.project(x, slots), mask)  # [S, B, N, M R]
        best = projected.argmax(dim=2, keepdim=True)
        return torch.zeros_like(projected).scatter_(2, best, 1.0).mean(dim=-1)


class WeightedLayers(Aggregator):
    """Layer stage of `multimax`: a_l = softmax_l(g_l . m_l + b_l), v = [L' a_1 m_1; ...; L' a_L' m_L'], for each member.

    L' is the number of layers read. Weights start equal. The layers stay apart, because each has directions of its own.
    """

    def __init__(self, config: ProbeConfig):
        super().__init__(1, config)
        self.num_members, layers = MultiMaxAggregator.members(config), len(config.layer_indices)
        self.gate = nn.Parameter(torch.zeros(layers, self.num_members, _maxima(config)))
        self.bias = nn.Parameter(torch.zeros(layers, self.num_members))

    def update(self, state: State, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> State:
        return x if state is None else torch.cat([state, x], dim=2)

    def _shares(self, items: torch.Tensor) -> torch.Tensor:
        """Return the softmax over the layers of `[1, B, L', M, R]`: `[1, B, L', M]`."""
        # One operation for all layers and members: a GPU launches three for product, sum and bias.
        by_pair = items[0].permute(1, 2, 0, 3).flatten(0, 1)  # [L' M, B, R]
        scores = torch.baddbmm(
            self.bias.view(-1, 1, 1), by_pair, self.gate.flatten(0, 1).unsqueeze(-1)
        )  # [L' M, B, 1]
        return scores.view(*self.bias.shape, -1).softmax(dim=0).permute(2, 0, 1).unsqueeze(0)

    def result(self, state: State, slots: slice) -> torch.Tensor:
        """Weigh and join the layers: `[S, B, L', M R]` to `[S, B, M L' R]`. `AveragedClassifier` multiplies by L'."""
        items = state.unflatten(-1, (self.num_members, -1))
        weighted = items * self._shares(items).unsqueeze(-1)
        return weighted.transpose(2, 3).flatten(2)

    def weights(self, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> torch.Tensor:
        """Return the softmax, averaged over members."""
        return self._shares(x.unflatten(-1, (self.num_members, -1))).mean(dim=-1)


class AveragedClassifier(Classifier):
    """Average several linear maps, each of a part of the pooled vector, which is multiplied by the number of layers."""

    def __init__(self, num_members: int, num_layers: int, maxima: int, num_labels: int):
        width = num_layers * maxima
        super().__init__(num_members * width, num_labels)
        self.num_members, self.num_layers = num_members, num_layers
        if num_members > 1:  # as nn.Linear would set each member's map alone
            bound = 1.0 / math.sqrt(width)
            nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, pooled, self.weight.t(), alpha=self.num_layers / self.num_members)

    def member_logits(self, pooled: torch.Tensor) -> torch.Tensor | None:
        if self.num_members == 1:
            return None
        parts = pooled.unflatten(-1, (self.num_members, -1))  # [B, M, L' R]
        maps = self.weight.unflatten(-1, (self.num_members, -1))  # [C, M, L' R]
        return torch.einsum("bmf,cmf->mbc", parts, maps) * self.num_layers + self.bias


def _maxima(config: ProbeConfig) -> int:
    return MultiMaxAggregator.option(config, "num_maxima")
