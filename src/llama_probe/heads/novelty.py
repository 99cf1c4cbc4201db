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


FAR = 0.99  # a prompt with at least this novelty counts as unlike the training data
LEVELS = 100  # stored quantiles of the validation rows: 0, 1, ..., 99 %
# Training rows, and validation rows, that a fit needs, and that it uses at most.
MIN_ROWS = 40
MAX_ROWS = 2000
# Depths of the layers that are read, as shares of the LM's depth. Early layers tell topics and styles apart; the last ones predict
# tokens.
_DEPTHS = (0.2, 0.4, 0.6)


def novelty_layers(config: ProbeConfig) -> list[int]:
    """Return up to three layers, of those that a head reads, for its novelty."""
    config.check_supports_novelty()
    wanted = [depth * config.sizes[1] for depth in _DEPTHS]
    return sorted({min(config.layer_indices, key=lambda layer: abs(layer - depth)) for depth in wanted})


@dataclass
class MeanStates:
    """The sums of states from which a `Novelty` computes the novelty of a batch, when it is asked for.

    Attributes:
        of: the `Novelty`.
        total (`[S, batch, hidden_size]`): sum of the normalised states of the tokens that count.
        count (`[S, batch]`): number of these tokens.
    """

    of: Novelty
    total: torch.Tensor
    count: torch.Tensor

    @classmethod
    def joined(cls, batches: Sequence[MeanStates], order: torch.Tensor) -> MeanStates:
        """Join batches, and return their rows in a new order: row i is row `order[i]` of the joined batches."""
        total = torch.cat([batch.total for batch in batches], dim=1)
        count = torch.cat([batch.count for batch in batches], dim=1)
        return cls(batches[0].of, total[:, order], count[:, order])

    @property
    def novelty(self) -> torch.Tensor:
        """`[batch]`, from 0 to 1; see `Novelty`."""
        return self.of(self.total, self.count)


class Novelty(nn.Module):
    """The distance of a prompt's mean states from those of a head's training rows.

    The distance is the Mahalanobis distance, with the covariance of probabilistic PCA (Tipping and Bishop, 1999): a few directions
    and one variance for all other directions. The mean of many tokens is closer to the centre than the mean of few tokens, so the
    distance is divided by the distance that validation rows of the same length have. Novelty is the share of validation rows
    with a smaller distance: 0.99 is the 99th percentile. Beyond it an exponential tail leads up to 1.

    Args:
        config: config of a head, with `novelty` set: the layers, and `rank`, the number of directions.

    Attributes:
        center (`[S * hidden_size]`): mean of the training rows' mean states.
        directions (`[rank, S * hidden_size]`): unit vectors along which the mean states vary most.
        variances (`[rank + 1]`): variance along each direction, and along any other direction.
        length (`[2]`): a and b of the expected log distance of n tokens, a + b log n.
        quantiles (`[100]`): quantiles 0, 1, ..., 99 % of `excess` over validation rows.
    """

    def __init__(self, config: ProbeConfig):
        super().__init__()
        if config.novelty is None:
            raise ProbeError("novelty=None must be the layers and the rank of a Novelty")
        self.settings = config.novelty
        layers = self.settings["layers"]
        rank = self.settings["rank"]
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
        """Return the log distance `[batch]`, minus the expected log distance for its number of tokens."""
        x = self._means.result((total, count), slice(None)).transpose(0, 1).flatten(1) - self.center
        along = x @ self.directions.T  # [B, rank]
        other = (x - along @ self.directions).square().sum(dim=1)
        squared = (along.square() / self.variances[:-1]).sum(dim=1) + other / self.variances[-1]
        distance = squared.clamp_min(1e-12).log() / 2
        return distance - self.length[0] - self.length[1] * count[0].clamp_min(1).log()

    def forward(self, total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Return novelty `[batch]`; NaN for a row without a token that counts. See `MeanStates` for the arguments."""
        with torch.no_grad():
            excess = self.excess(total, count)
            levels = self.quantiles
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
        """Fit a `Novelty` to training rows, and calibrate it on validation rows. Both are total and count of `MeanStates`."""
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
        distance = novelty.excess(*validation).double()  # the whole distance, because `length` is still 0
        tokens = validation[1][0].double().clamp_min(1).log()
        spread = (tokens - tokens.mean()).square().sum()
        slope = ((tokens - tokens.mean()) * distance).sum() / spread.clamp_min(1e-12)
        slope = slope.clamp(-0.5, 0)  # from independent tokens to tokens that are all alike
        novelty.length.copy_(torch.stack([(distance - slope * tokens).mean(), slope]))
        levels = torch.arange(LEVELS, dtype=torch.float64) / LEVELS
        novelty.quantiles.copy_(torch.quantile(novelty.excess(*validation).double(), levels))
        return novelty


def abstain_levels(
    abstain_at: float | Mapping[str, float] | None, configs: Mapping[str, ProbeConfig]
) -> dict[str, float]:
    """Return, by head, the novelty above which a row gets no label: one level for all heads, or the levels of a dict."""
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
