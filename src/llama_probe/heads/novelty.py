"""Novelty: how unlike a head's training data a prompt is, from the mean states of a few layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ProbeError
from .configuration import ProbeConfig
from .pooling import PoolingAggregator
from .stream import SlotStates, as_slice


FAR = 0.99  # from this novelty on, a prompt counts as unlike the training data
LEVELS = 100  # stored quantiles of the validation rows: 0, 1, ..., 99 %
MIN_ROWS, MAX_ROWS = 40, 2000  # of training and of validation, each, to fit it; more change nothing
# Depths of the layers that are read, as shares of the LM's: early ones tell topics and styles apart, the last ones predict tokens.
_DEPTHS = (0.2, 0.4, 0.6)


def novelty_layers(config: ProbeConfig) -> list[int]:
    """Return the layers of a head whose mean states tell novelty: up to three of those that it reads."""
    config.check_supports_novelty()
    wanted = [depth * config.sizes[1] for depth in _DEPTHS]
    return sorted({min(config.layer_indices, key=lambda layer: abs(layer - depth)) for depth in wanted})


@dataclass
class MeanStates:
    """Sums that the novelty `of` has read of a batch. They are cheap to make; `novelty` computes the rest.

    Attributes:
        total (`[S, batch, hidden_size]`): sum of the normalised states of the tokens that count.
        count (`[S, batch]`): number of these tokens.
    """

    of: Novelty
    total: torch.Tensor
    count: torch.Tensor

    @classmethod
    def joined(cls, batches: Sequence[MeanStates], order: torch.Tensor) -> MeanStates:
        """Return the rows of several batches, in the order of their indices in these."""
        total, count = torch.cat([b.total for b in batches], dim=1), torch.cat([b.count for b in batches], dim=1)
        return cls(batches[0].of, total[:, order], count[:, order])

    @property
    def novelty(self) -> torch.Tensor:
        """`[batch]`, from 0 to 1; see `Novelty`."""
        return self.of(self.total, self.count)


class Novelty(nn.Module):
    """The distance of a prompt's mean states from those of a head's training rows.

    The distance is that of Mahalanobis, with the covariance of probabilistic PCA (Tipping and Bishop, 1999): a few directions and
    one variance for all others. The mean of many tokens is closer to the centre than that of few, so the distance is
    divided by what validation rows of that length have. Novelty is the share of validation rows with a smaller distance:
    0.99 is their 99th percentile. Beyond it the distances are extrapolated with an exponential tail, up to 1.

    Args:
        config: config of a head, with `novelty` set: `layers`, which the head reads, and `rank`, the number of directions.

    Attributes:
        center (`[S * hidden_size]`): mean of the training rows' mean states.
        directions (`[rank, S * hidden_size]`): unit vectors along which these vary most.
        variances (`[rank + 1]`): variance along each of them, and along any other.
        length (`[2]`): a and b of the log distance to be expected of n tokens, a + b log n.
        quantiles (`[100]`): quantiles 0, 1, ..., 99 % of the log distance, less the expected one, over validation rows.
    """

    def __init__(self, config: ProbeConfig):
        super().__init__()
        if config.novelty is None:
            raise ProbeError("novelty=None must be the layers and the rank of a Novelty")
        self.settings = config.novelty
        layers, rank = self.settings["layers"], self.settings["rank"]
        self.slots = [config.layer_indices.index(layer) for layer in layers]
        self._means = PoolingAggregator(len(layers), config.replace(pool="mean"))
        width = len(layers) * config.sizes[0]
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("directions", torch.zeros(rank, width))
        self.register_buffer("variances", torch.zeros(rank + 1))
        self.register_buffer("length", torch.zeros(2))
        self.register_buffer("quantiles", torch.zeros(LEVELS))

    def update(self, states: SlotStates, slots: slice, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Read further tokens of a group of the head's layers into `states`; see `Aggregator.update`."""
        places = [slot - slots.start for slot in self.slots if slots.start <= slot < slots.stop]
        if not places:
            return
        first = sum(slot < slots.start for slot in self.slots)
        mean_slots = slice(first, first + len(places))
        total, count = self._means.update(states.pop(mean_slots), x[as_slice(places)].float(), mask, mean_slots)
        states.put(mean_slots, (total, count))

    def excess(self, total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Return the log distance `[batch]`, less what its number of tokens leads to."""
        x = self._means.result((total, count), slice(None)).transpose(0, 1).flatten(1) - self.center
        along = x @ self.directions.T  # [B, rank]
        other = (x - along @ self.directions).square().sum(dim=1)
        squared = (along.square() / self.variances[:-1]).sum(dim=1) + other / self.variances[-1]
        distance = squared.clamp_min(1e-12).log() / 2
        return distance - self.length[0] - self.length[1] * count[0].clamp_min(1).log()

    def forward(self, total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Return novelty `[batch]`; NaN for a row without a token that counts. See `MeanStates` for the arguments."""
        with torch.no_grad():
            excess, levels = self.excess(total, count), self.quantiles
            upper = torch.searchsorted(levels, excess).clamp(1, LEVELS - 1)
            low, high = levels[upper - 1], levels[upper]
            share = ((excess - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
            inside = (upper - 1 + share) / LEVELS
            scale = (levels[99] - levels[90]).clamp_min(1e-6) / math.log(10)  # of an exponential tail
            tail = 1 - 0.01 * torch.exp(-(excess - levels[99]) / scale)
            novelty = torch.where(excess > levels[99], tail, inside)
            return novelty.masked_fill(count[0] == 0, float("nan"))

    @classmethod
    def fit(
        cls,
        config: ProbeConfig,
        train: tuple[torch.Tensor, torch.Tensor],
        validation: tuple[torch.Tensor, torch.Tensor],
    ) -> Novelty:
        """Fit the description of training rows, and calibrate it on validation rows: total and count of `MeanStates`."""
        novelty = cls(config)
        x = novelty._means.result(train, slice(None)).transpose(0, 1).flatten(1).double()  # [rows, S * D]
        center = x.mean(dim=0)
        x = x - center
        rows, width = x.shape
        values, vectors = torch.linalg.eigh(x @ x.T / (rows - 1))
        rank = len(novelty.directions)
        axes = x.T @ vectors.flip(1)[:, :rank]  # [S * D, rank]
        directions = (axes / axes.norm(dim=0).clamp_min(1e-12)).T
        whole = x.square().sum() / (rows - 1)
        values = values.flip(0)[:rank]
        rest = (whole - values.sum()) / (width - rank)
        variances = torch.cat([values, rest[None]]).clamp_min(1e-6 * whole / width)
        novelty.center.copy_(center)
        novelty.directions.copy_(directions)
        novelty.variances.copy_(variances)
        distance = novelty.excess(*validation).double()  # the length is 0 so far
        tokens = validation[1][0].double().clamp_min(1).log()
        spread = (tokens - tokens.mean()).square().sum()
        slope = ((tokens - tokens.mean()) * distance).sum() / spread.clamp_min(1e-12)
        slope = slope.clamp(-0.5, 0)  # noise of tokens that are independent, and none
        novelty.length.copy_(torch.stack([(distance - slope * tokens).mean(), slope]))
        levels = torch.arange(LEVELS, dtype=torch.float64) / LEVELS
        novelty.quantiles.copy_(torch.quantile(novelty.excess(*validation).double(), levels))
        return novelty


def abstain_levels(
    abstain_at: float | Mapping[str, float] | None, configs: Mapping[str, ProbeConfig]
) -> dict[str, float]:
    """Return the novelty, by head, above which a row gets no label: one level for all heads, or those of a dict."""
    if abstain_at is None:
        return {}
    levels = dict(abstain_at) if isinstance(abstain_at, Mapping) else dict.fromkeys(configs, abstain_at)
    for name, level in levels.items():
        if name not in configs:
            raise ProbeError(f"abstain_at: no active head {name!r}; active: {', '.join(configs)}")
        if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 <= level <= 1:
            raise ProbeError(f"abstain_at={level!r} must be a number from 0 to 1")
        if configs[name].novelty is None:
            hint = "fit it with llama-probe calibrate --probe FOLDER --novelty-data ROWS"
            raise ProbeError(f"abstain_at={level}: head {name!r} has no novelty; {hint}")
    return levels
