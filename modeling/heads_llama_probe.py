"""Head types, and the tokens that they read: modules of the package, without their imports.

Written by `make runtime`. SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from .configuration_llama_probe import TURN_SCOPES, ProbeConfig, ProbeError, get_probe_type, register_probe_type
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from torch import nn
from transformers.utils import logging
from typing import Any, ClassVar, TypedDict
import math
import numpy as np
import torch
import torch.nn.functional as F


"""The base class of all head types, and operations on hidden states and on the states that head types keep.

Dimension letters used in all files of this folder:
    S  slots: L+1 layers in the token stage, 1 in the layer stage
    B  batch, N  items to summarise (tokens, or layers), D  hidden size
"""

# The state of a head type after some items: a tensor `[S, B, ...]`, `None`, or a tuple or list of states.
State = Any


class Classifier(nn.Module):
    """The linear map from a head's pooled vector `[B, D]` to its logits `[B, num_labels]`.

    It is no `nn.Linear`: methods that adapt or quantise all linear layers of an LM then leave its heads alone.
    """

    def __init__(self, in_features: int, num_labels: int):
        super().__init__()
        linear = nn.Linear(in_features, num_labels)
        self.weight, self.bias = linear.weight, linear.bias

    def member_logits(self, pooled: torch.Tensor) -> torch.Tensor | None:
        """Return the logits of each member, `[members, B, num_labels]`, for a head that averages several; else `None`."""
        return None

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """`[B, D]` to `[B, num_labels]`."""
        return F.linear(pooled, self.weight, self.bias)


class Aggregator(nn.Module, ABC):
    """Summarise N items into one vector, for several slots side by side.

    The same head type serves both stages, unless `create_layer_stage` says otherwise: the token stage has one slot a layer, with
    its parameters stacked in tensors of shape `[slots, ...]`; the layer stage has a single slot.

    A head type implements `update` and `result`, and `weights` if plots are to show how much each item counted.
    Training calls `update` once with all slots and tokens, serving with groups of layers and chunks of tokens.

    `join_slots`, `take_slots`, `repeat_rows` and `select_rows` handle any `State`. `update` returns a new state and leaves the
    old one unchanged: several prompts may continue from it.

    Args:
        num_slots (`int`): number of independent summaries.
        config (`ProbeConfig`): with `hidden_size` set.

    Attributes:
        reads: `"all"`, or `"last"` if only the last token that counts and the last layer matter. Other states are then
            neither captured nor cached.
        normalize: default of `ProbeConfig.normalize`.
        training_defaults: fields of `ProbeTrainingArguments` and of `ProbeConfig`, if the user leaves them out.
        auto_up_to: `probe_type="auto"` takes this type for at most so many training rows; of several types it takes the one with
            the smallest value. 0: never.
        search_space: further hyper-parameters of a search, by field or option: a tuple (low, high) is a range, a list has
            choices. Combinations that `check` refuses are skipped.
        options: names of `ProbeConfig.options`, each with its default and a help text.
        reads_half: if True, `update` takes states in the LM's half precision if there are many of them. Else it gets fp32.
        is_idempotent: if True, an item that is read twice counts once, as in a maximum. Filling of short windows then needs no mask.
        causal: of an instance; if True, an item may only depend on itself and earlier items.
    """

    reads: ClassVar[str] = "all"
    normalize: ClassVar[str] = "layernorm"
    training_defaults: ClassVar[dict[str, float]] = {
        "learning_rate": 1e-3,
        "label_smoothing_factor": 0.05,
        "dropout": 0.2,
        "layer_dropout": 0.1,
    }
    auto_up_to: ClassVar[float] = 0
    search_space: ClassVar[dict[str, tuple[float, float] | list[float | str]]] = {}
    options: ClassVar[dict[str, tuple[float | None, str]]] = {}
    reads_half: ClassVar[bool] = False
    is_idempotent: ClassVar[bool] = False
    causal: bool = False

    def __init__(self, num_slots: int, config: ProbeConfig):
        super().__init__()
        self.num_slots = num_slots
        self.hidden_size, _ = config.sizes
        self.pool = config.pool

    @classmethod
    def check(cls, config: ProbeConfig) -> None:
        """Raise `ProbeError` if the head type does not support `config`. An option with an int as default must be an int."""
        if unknown := sorted(set(config.options) - set(cls.options)):
            raise ProbeError(f"options has {unknown}; probe_type={config.probe_type!r} knows {sorted(cls.options)}")
        for name, (default, _) in cls.options.items():
            value = cls.option(config, name)
            if isinstance(default, int) and not (type(value) is int and 1 <= value <= 4096):
                raise ProbeError(f"options[{name!r}]={value!r} must be a whole number from 1 to 4096")

    @classmethod
    def option(cls, config: ProbeConfig, name: str) -> Any:
        return config.options.get(name, cls.options[name][0])

    @classmethod
    def members(cls, config: ProbeConfig) -> int:
        """Return the number of heads, trained apart, that a head of `config` averages."""
        return 1

    @classmethod
    def create_classifier(cls, config: ProbeConfig) -> Classifier:
        """Build the map from the layer stage's result (`[B, D]` in most head types) to the logits."""
        return Classifier(config.sizes[0], config.num_labels)

    @classmethod
    def create_layer_stage(cls, config: ProbeConfig) -> Aggregator:
        """Build the aggregator, with a single slot, that summarises the layers' summaries."""
        return cls(1, config)

    @abstractmethod
    def update(self, state: State, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> State:
        """Read further items, and return the new state.

        Args:
            state: result of an earlier `update` of the same slots, or `None` at the start.
            x (`torch.FloatTensor` of shape `[S, B, n, D]`): the next n items of the slots in `slots`.
            mask (`torch.BoolTensor` of shape `[B, n]`, *optional*): the items that count; `None` if all do.
            slots (`slice`): the slots that `x` belongs to.
        """

    def project(self, x: torch.Tensor, slots: slice) -> torch.Tensor:
        """Return items `[S, B, n, D]` in the form that `absorb` reads. This is done once for items that several states read."""
        return x

    def absorb(self, state: State, projected: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> State:
        """Read items from `project`. `update` does both steps."""
        return self.update(state, projected, mask, slots)

    @abstractmethod
    def result(self, state: State, slots: slice) -> torch.Tensor:
        """Return the summary of all items read so far: `[S, B, D]`, or another width if the layer stage takes it."""

    def weights(self, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> torch.Tensor | None:
        """Return how much each item counted: `[S, B, N]`, at least 0, 0 off the mask, summing to 1 over N.

        `None` if the head type has no such weights: plots then leave the head out.
        """
        return None

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Summarise `[S, B, N, D]` of all slots with an optional `[B, N]` mask: `[S, B, D]`."""
        return self.result(self.update(None, x, mask, slice(None)), slice(None))


def join_slots(states: Sequence[State]) -> State:
    """Join the states of consecutive slots."""
    if len(states) == 1:
        return states[0]
    if isinstance(states[0], (tuple, list)):
        return type(states[0])(join_slots(parts) for parts in zip(*states, strict=True))
    return None if states[0] is None else torch.cat(list(states))


def join_rows(states: Sequence[State]) -> State:
    """Join the states of some slots for further rows. Where they hold items of several numbers, items that do not count are added."""
    if len(states) == 1:
        return states[0]
    if isinstance(states[0], (tuple, list)):
        return type(states[0])(join_rows(parts) for parts in zip(*states, strict=True))
    if states[0] is None:
        return None
    sizes = [max(sizes) for sizes in zip(*(part.shape[2:] for part in states), strict=True)]
    padded = []
    for part in states:
        missing = [size - own for size, own in zip(sizes, part.shape[2:], strict=True)]
        padded.append(
            F.pad(part, [width for size in reversed(missing) for width in (0, size)]) if any(missing) else part
        )
    return torch.cat(padded, dim=1)


def take_slots(state: State, slots: slice) -> State:
    """Return the state of some slots. It shares memory with `state`."""
    return map_state(state, lambda tensor: tensor[slots])


def map_state(state: State, change: Callable[[torch.Tensor], torch.Tensor]) -> State:
    """Return a state with each of its tensors changed."""
    if isinstance(state, (tuple, list)):
        return type(state)(map_state(part, change) for part in state)
    return None if state is None else change(state)


def repeat_rows(state: State, repeats: int) -> State:
    """Repeat each row of a state `repeats` times, as `torch.repeat_interleave` does."""
    return state if repeats == 1 else map_state(state, lambda tensor: tensor.repeat_interleave(repeats, dim=1))


def select_rows(state: State, rows: torch.Tensor) -> State:
    """Return the state of the rows in `rows`, `[new_rows]`, on any device."""
    return map_state(state, lambda tensor: tensor.index_select(1, rows.to(tensor.device)))


def normalize(x: torch.Tensor, by: str | None) -> torch.Tensor:
    """Return hidden states `[..., D]`, normalised over the last dimension: `"layernorm"`, `"rms"` or `"none"`.

    In half precision the result is rounded; mean and variance are computed in fp32.
    """
    if by == "layernorm":
        return torch.layer_norm(x, x.shape[-1:], eps=1e-5)
    return torch.rms_norm(x, x.shape[-1:], eps=1e-6) if by == "rms" else x


def last_valid(mask: torch.Tensor) -> torch.Tensor:
    """Mark the last true entry of each row of a `[B, N]` mask. Rows without one stay false."""
    return mask & (mask.int().cumsum(dim=1) == mask.sum(dim=1, keepdim=True))


def masked_mean(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Average `[S, B, N, D]` over the items where the `[B, N]` mask is true: `[S, B, D]`."""
    if mask is None:
        return x.mean(dim=2)
    weight = mask.to(x.dtype)
    weight = weight / weight.sum(dim=1, keepdim=True).clamp_min(1.0)  # [B, N]
    return torch.matmul(weight[None, :, None, :], x).squeeze(2)


def masked_max(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Take the maximum per dimension of `[S, B, N, D]` over the items where the mask is true: `[S, B, D]`."""
    return drop_masked(x, mask).amax(dim=2)


def drop_masked(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Put -inf into `[S, B, N, D]` where the `[B, N]` mask is false."""
    return x if mask is None else x.masked_fill(~mask[None, :, :, None], float("-inf"))


"""Base of the head types that read an item through a linear map to a few numbers."""

class LowRankAggregator(Aggregator):
    """An `Aggregator` that keeps a few numbers of an item, not D. It implements `projection` and `absorb` instead of `update`.

    If `projects` is False, items are already projected.
    """

    reads_half = True
    projects = True

    @abstractmethod
    def projection(self, slots: slice) -> torch.Tensor:
        """Return the map of the items, `[S, rank, D]`."""

    @abstractmethod
    def absorb(self, state: State, projected: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> State:
        """Read projected items `[S, B, n, rank]`, as `update` reads items."""

    def project(self, x: torch.Tensor, slots: slice) -> torch.Tensor:
        """Map `[S, B, n, D]`, in any float dtype, to `[S, B, n, rank]` in fp32."""
        if not self.projects:
            return x
        flat = torch.matmul(x.flatten(1, 2), self.projection(slots).to(x.dtype).transpose(1, 2))
        return flat.unflatten(1, x.shape[1:3]).float()

    def update(self, state: State, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> State:
        return self.absorb(state, self.project(x, slots), mask, slots)


"""Direct pooling: mean or max over the valid items, per dimension. No parameters (arXiv 2601.13288)."""

@register_probe_type("pooling")
class PoolingAggregator(Aggregator):
    """Mean or maximum of the valid items. State: a running sum with its count, or a running maximum."""

    training_defaults = Aggregator.training_defaults | {"learning_rate": 1e-2, "dropout": 0.1, "layer_dropout": 0.0}
    auto_up_to = 128
    search_space = {"learning_rate": (1e-4, 3e-2), "pool": ["mean", "max"]}

    def update(self, state: State, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> State:
        if self.pool == "max":
            top = masked_max(x, mask)  # [S, B, D]
            return top if state is None else torch.maximum(state, top)
        if mask is None:
            total, count = x.sum(dim=2), x.new_full(x.shape[:2], float(x.shape[2]))
        else:
            weight = mask.to(x.dtype)
            total = torch.matmul(weight[None, :, None, :], x).squeeze(2)  # [S, B, D]
            count = weight.sum(dim=1).expand(len(x), -1)  # [S, B]
        return (total, count) if state is None else (state[0] + total, state[1] + count)

    def result(self, state: State, slots: slice) -> torch.Tensor:
        if self.pool == "max":
            return state
        total, count = state
        return total / count.clamp_min(1.0).unsqueeze(-1)

    def weights(self, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> torch.Tensor:
        """Return equal weights (mean), or the share of dimensions in which the item is the maximum (max)."""
        slot_count, batch, items, _ = x.shape
        if self.pool == "mean":
            valid = x.new_ones(batch, items) if mask is None else mask.to(x.dtype)
            return (valid / valid.sum(dim=1, keepdim=True).clamp_min(1.0)).expand(slot_count, batch, items)
        winners = drop_masked(x, mask).argmax(dim=2)  # [S, B, D]
        ones = torch.ones_like(winners, dtype=x.dtype)
        return x.new_zeros(slot_count, batch, items).scatter_add_(2, winners, ones) / x.shape[-1]


"""Scoring gate: one learned score an item, softmax over the valid ones, weighted sum (arXiv 2601.13288)."""

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


"""The last item alone: with one layer, the last-token linear probe of its state. No parameters."""

@register_probe_type("last")
class LastItemAggregator(Aggregator):
    """The last valid item: of the tokens, and then of the layers. State: that item, so far.

    No other layer matters: `layers=[k]` is a linear probe of state k, and `"all"` one of the final state.
    """

    training_defaults = Aggregator.training_defaults | {"learning_rate": 1e-2, "dropout": 0.1, "layer_dropout": 0.0}
    reads = "last"

    def update(self, state: State, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> State:
        if mask is None:
            return x[:, :, -1].clone()  # a view would keep the states of all tokens in memory
        rows = torch.arange(x.shape[1], device=x.device)
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)  # [B]; the last column if no item counts
        newest = x[:, rows, last]  # [S, B, D]
        if state is None:  # a later chunk replaces the item of a row in which no item counts
            return newest
        return torch.where(mask.any(dim=1)[None, :, None], newest, state)

    def result(self, state: State, slots: slice) -> torch.Tensor:
        return state

    def weights(self, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> torch.Tensor:
        """Return 1 for the last valid item, 0 for all others."""
        slot_count, batch, items, _ = x.shape
        valid = x.new_ones(batch, items, dtype=torch.bool) if mask is None else mask
        return last_valid(valid).to(x.dtype).expand(slot_count, batch, items)


"""Multi-max pooling: the largest value that any token gives to each of a few learned directions, layer by layer.

In a long prompt, a short harmful passage hardly changes a mean, but it changes a maximum. Kramár et al. (arXiv 2601.11516) read
a single layer with maxima of learned projections, and Kim (arXiv 1408.5882) the windows of a convolution.
"""

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


"""The mean over queries of an attention's results, in blocks that stay in a processor's cache."""

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


"""Multi-head self-attention in a reduced dimension, then mean or max (arXiv 2601.13288)."""

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


"""Turns of a chat, found in token ids by the markers that the chat template writes before them."""

logger = logging.get_logger(__name__)


class TurnMarker(TypedDict):
    """The opening of a turn: token ids, and the number of tokens behind them that may merge with the text."""

    ids: list[int]
    skip: int


# Results of tools and documents come from outside, as a user's text does.
TURN_ROLES = ("user", "tool", "document", "assistant", "system")


def turn_mask(scope: str, markers: Mapping[str, TurnMarker], input_ids: torch.Tensor, known: int = 0) -> torch.Tensor:
    """Return the tokens of the turns that a scope names: `[batch, tokens]` bool, on the device of the ids.

    A turn begins behind its opening marker and ends where the next turn begins: a user's turn holds the markers that close it
    and open the reply. All text behind the last named turn counts too, because its writer may have forged the markers in it. If
    the beginning of a prompt was cut away, the text before its first reply is a user's. A prompt without any marker is no chat:
    all of it counts, and a warning is logged once.

    Args:
        known: number of first tokens that the LM has seen. A reply that begins within them is the LM's, even if no turn follows.
    """
    # On the host: on a GPU the same lines are 25 kernel launches.
    ids = input_ids.cpu().numpy()
    begins = {role: turn_begins(marker, ids) for role, marker in markers.items()}  # [B, T + 1] each
    # A marker without a token behind it opens no turn, except for a reply: it is the generation prompt.
    followed = np.pad(ids, ((0, 0), (0, 1)), constant_values=-1) >= 0
    begins = {role: places if role == "assistant" else places & followed for role, places in begins.items()}
    if "tool" in markers:
        begins["user"] = begins["user"] & ~_tools_as_users(markers, begins["tool"])
    marked = np.any(list(begins.values()), axis=(0, 2))[:, None]  # [B, 1]
    if not marked.all():
        logger.warning_once(
            "A prompt holds no marker of a turn (raw text, or another chat template): a head that looks for turns reads all of "
            "it, and its scores may be less reliable."
        )
    # A prompt that continues may still get markers.
    whole = ~marked if known < input_ids.shape[1] else marked & False
    mask = (_mask(scope, begins, known) | whole)[:, :-1]
    return torch.from_numpy(mask).to(input_ids.device)


def _mask(scope: str, begins: dict[str, np.ndarray], known: int) -> np.ndarray:
    """Return `turn_mask` for the places where turns begin, `[batch, tokens + 1]`."""
    user, reply = begins["user"], begins["assistant"]
    tool, document, system = (begins.get(role, user & False) for role in ("tool", "document", "system"))
    position = (user | True).cumsum(1)  # from 1; below, 0 is "before the first such turn"
    in_reply, in_system, in_tool = (_running_max(place * position) for place in (reply, system, tool))
    if scope == "tool":  # a reply follows a tool's result: a user's marker before it is forged
        user = user & (in_reply >= in_tool)
    in_user, in_outside = _running_max(user * position), _running_max((tool | document) * position)
    # A system turn behind a user's may be forged.
    in_input = _running_max((user | tool | document | (system & (in_user > 0))) * position)
    is_cut = _running_max(((in_reply > 0) & (in_input + in_system == 0)) * 1)[:, -1:] > 0
    if scope == "turns":
        return is_cut | (in_input + in_reply + in_system > 0)
    if scope in ("user", "tool"):
        replies = (in_reply > in_input) & ((position < in_input[:, -1:]) | (in_reply <= known + 1))
        wanted = is_cut | (in_input > 0) if scope == "user" else in_outside > in_user
        return wanted & ~replies
    last = in_user[:, -1:]
    before = _running_max(reply * position * (position < last))[:, -1:]  # the last reply before the last user's turn
    return (in_user > before) | (is_cut & (last == 0))


def turn_begins(marker: TurnMarker, ids: np.ndarray) -> np.ndarray:
    """Return where a turn begins behind a marker: `[batch, tokens + 1]` bool. The last place is behind all tokens."""
    size, width = len(marker["ids"]), len(marker["ids"]) + marker["skip"]
    padded = np.pad(ids, ((0, 0), (width, 0)), constant_values=-1)  # -1 is no token
    windows = np.lib.stride_tricks.sliding_window_view(padded, width, axis=1)  # [B, T + 1, width]
    opening = np.array(marker["ids"])
    opened = (windows[:, :, :size] == opening).all(2)
    return opened & (windows[:, :, size:] >= 0).all(2) if marker["skip"] else opened


def _tools_as_users(markers: Mapping[str, TurnMarker], tool: np.ndarray) -> np.ndarray:
    """Return where a user's marker is the beginning of a tool's."""
    user = markers["user"]
    longer = len(markers["tool"]["ids"]) - len(user["ids"]) - user["skip"]
    if longer < 0 or markers["tool"]["ids"][: len(user["ids"])] != user["ids"]:
        return tool & False
    return np.roll(tool, -longer, 1)


def _running_max(values: np.ndarray) -> np.ndarray:
    return np.maximum.accumulate(values, axis=1)


"""The tokens of a prompt that a head reads."""

logger = logging.get_logger(__name__)


def token_mask(
    config: ProbeConfig,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    partial_prompt: bool = False,
    seen: int = 0,
) -> torch.Tensor:
    """Return which tokens count for a head: `[batch, tokens]` bool.

    For `"last_user"`, `"user"`, `"turns"` and `"tool"`, `config.turn_markers` find the turns; see `turn_mask`. In a chat without
    such a turn no token counts. Without `turn_markers`, `"tool"` raises, and the other three scopes are `"content"`.

    With `"content"` and `"all"` the constant prefix (`config.prefix_ids`) does not count in a row that begins with it. A row that
    begins otherwise (with another system prompt, or without the template) is read whole, and a warning is logged once.

    Args:
        input_ids (`torch.LongTensor` of shape `[batch, tokens]`, *optional*).
        attention_mask (`torch.Tensor` of shape `[batch, tokens]`, *optional*): 0 for padding, on either side.
        partial_prompt: the prompts may continue. In a row that ends within the constant prefix no token counts yet.
        seen: number of leading tokens that heads have read in an earlier call.
    """
    if config.token_scope == "response":
        raise ProbeError("token_scope='response' needs probe_mask=[batch, tokens], true for the tokens of the reply")
    markers = config.turn_markers if config.token_scope in (*TURN_SCOPES, "tool") else None
    if config.token_scope == "tool" and not {"tool", "document"} & set(markers or ()):
        raise ProbeError(
            "token_scope='tool': the chat template marks no tool results; pass probe_mask=[batch, tokens]"
        )
    is_whole = config.token_scope == "prompt" or not (markers or config.prefix_ids)
    if is_whole and attention_mask is not None:
        return attention_mask.bool()
    if input_ids is None:
        raise ProbeError(f"token_scope={config.token_scope!r} needs input_ids, or probe_mask=[batch, tokens]")
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if is_whole:
        return mask
    if markers is not None:
        known = input_ids.shape[1] if partial_prompt else seen
        # Padding may have the id of a marker.
        ids = input_ids if attention_mask is None else input_ids.masked_fill(~mask.to(input_ids.device), -1)
        return mask & turn_mask(config.token_scope, markers, ids, known).to(mask.device)
    prefix = torch.tensor(config.prefix_ids, device=input_ids.device)
    count = len(config.prefix_ids)
    width = input_ids.shape[1]
    first = mask.int().argmax(dim=1, keepdim=True)  # [B, 1]: the first token that is not padding
    positions = first + torch.arange(count, device=input_ids.device)  # [B, prefix]
    same = input_ids.gather(1, positions.clamp_max(width - 1)) == prefix
    begins = torch.where(positions < width, same, partial_prompt).all(dim=1, keepdim=True)  # [B, 1]
    if not bool(begins.all()):
        logger.warning_once(
            "A prompt does not begin with the constant prefix that a probe head was trained to leave out (another chat "
            "template or system prompt, or raw text). The head reads all of its tokens; its scores may be less reliable."
        )
    columns = torch.arange(width, device=input_ids.device)
    return mask & ~(begins & (columns >= first) & (columns < first + count))


def tokens_read(config: ProbeConfig, mask: torch.Tensor) -> torch.Tensor:
    """Return the tokens that the head type reads, `[batch, tokens]`: all tokens that count, or the last one of each row."""
    return last_valid(mask) if get_probe_type(config.probe_type).reads == "last" else mask


def check_rows(mask: torch.Tensor, config: ProbeConfig | None = None, first_row: int = 0) -> None:
    """Raise `ProbeError` if no token counts in a row, unless the head reads tool results, which a prompt may not have.

    Args:
        first_row: number of the first row of `mask` in the message.
    """
    if config is not None and config.token_scope == "tool":
        return
    counts = mask.any(dim=1)
    if bool(counts.all()):
        return
    empty = ((~counts).nonzero().flatten() + first_row).tolist()
    raise ProbeError(f"rows {empty[:8]} hold no token that a head reads: use the chat template or pass probe_mask=")


"""Segments: the parts of a prompt that a head judges by themselves. They are turns of a chat, and windows of a long text.

The strongest segment counts; see `strongest`. Windows overlap by half: each begins half a window behind the one before it.
"""

Move = Callable[[torch.Tensor], torch.Tensor]


def judges_turns(config: ProbeConfig) -> bool:
    """Return True if a head judges each turn of a chat by itself.

    The head may miss a harmful turn if it judges only all turns together. Heads with `token_scope="user"` or `"tool"` judge
    turns if they flag one of two labels, or are multi-label.
    """
    judges = config.flagged_index is not None or config.problem_type == "multi_label_classification"
    return judges and config.token_scope in ("user", "tool") and get_probe_type(config.probe_type).reads == "all"


def judges_segments(config: ProbeConfig) -> bool:
    """Return True if a head judges turns or windows by themselves."""
    return config.window > 0 or judges_turns(config)


def number_segments(
    config: ProbeConfig, mask: torch.Tensor, always: bool = False, is_turn: bool = False
) -> torch.Tensor | None:
    """Return the number of each token's turn, from 1, and 0 for tokens that do not count: `[batch, tokens]` int64.

    Neighbouring tokens that count are in one turn. For a head that does not judge turns, all tokens are in one. `find_segments`
    cuts turns into windows.

    Args:
        mask (`[batch, tokens]` bool): the tokens that count.
        always: return the numbers also if no row has several segments. Later tokens may then join them.
        is_turn: all tokens of a row are one turn, because the user chose them (`probe_mask`).

    Returns:
        The numbers, on the device of the mask; `None` if the head judges no segments, or no row has several segments.
    """
    if not judges_segments(config) or (is_turn and config.window == 0):
        return None
    counted = mask.cpu().numpy()  # on the host, as in `turn_mask`
    if judges_turns(config) and not is_turn:
        begins = counted & ~np.pad(counted, ((0, 0), (1, 0)))[:, :-1]
    else:
        begins = counted & (counted.cumsum(axis=1) == 1)
    is_short = config.window == 0 or counted.sum(axis=1).max() <= config.window
    if not always and is_short and begins.sum(axis=1).max() <= 1:
        return None
    return torch.from_numpy(begins.cumsum(axis=1) * counted).to(mask.device)


@dataclass
class Group:
    """Tokens of several segments, side by side.

    Attributes:
        index (`[segments, width]` int64): place of each token among the tokens that are read, `row * n + column`. Filling has the
            place of a token of the segment, if it has one.
        mask (`[segments, width]` bool): false for filling; `None` if there is none.
    """

    index: torch.Tensor
    mask: torch.Tensor | None


@dataclass
class Rows:
    """Segments by row, K of a row at most.

    Attributes:
        places (`[batch, K]` int64): of each segment in a list of segments; `None` if the list has K segments of each row in turn.
        counted (`[batch, K]` bool): false for filling; `None` if there is none.
        spans (`[batch, K, 2]` int64): first column of each segment, and one past its last; 0 for filling.
    """

    places: torch.Tensor | None
    counted: torch.Tensor | None
    spans: torch.Tensor

    @classmethod
    def single(cls, summaries: torch.Tensor) -> Rows:
        """Return rows of one segment each, all turns together, for summaries `[S, batch, width]`. They have no span."""
        batch, device = summaries.shape[1], summaries.device
        return cls(None, None, torch.zeros(batch, 1, 2, dtype=torch.long, device=device))

    @property
    def most(self) -> int:
        """K, the number of segments of the row that has most."""
        return self.spans.shape[1]

    def arrange(self, items: torch.Tensor) -> torch.Tensor:
        """Return items of the list of segments, `[S, segments, ...]`, by row: `[S, batch, K, ...]`."""
        if self.places is None:
            return items.unflatten(1, self.spans.shape[:2])
        return items[:, self.places]


@dataclass
class Segments:
    """The segments to which the tokens of one pass belong.

    Segments have numbers: first those that an earlier pass has begun (the first of each row, then the second of each row), then
    those of `groups`, in order.

    Attributes:
        num_begun: number of segments of a row that an earlier pass has begun, in the row with most.
        begun: the tokens that join these.
        groups: the tokens of segments that begin in this pass.
        ended (`[segments]` int64): numbers of the segments that no later token joins; `None` if these are all, in order.
        ended_rows: `ended` by row.
        open: numbers of the segments that later tokens may join: `[batch]` int64 for the first of each row, and for the second.
        open_rows: `open` by row; those that count if the prompt ends here.
        batch, width: number of rows, and of columns that are read.
    """

    batch: int
    width: int
    num_begun: int
    begun: Group | None
    groups: list[Group]
    ended: torch.Tensor | None
    ended_rows: Rows
    open: list[torch.Tensor]
    open_rows: Rows

    def holding(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which segments hold some tokens: at least half of these, or these as at least half of their own; and which touch them.

        A segment touches tokens if it has one of them.

        Args:
            tokens (`[batch, n]` bool): of the tokens that are read, which must be whole prompts.

        Returns:
            `[batch, K]` bool each, false for filling.
        """
        flat = tokens.flatten()
        masks = [group.index >= 0 if group.mask is None else group.mask for group in self.groups]
        counts = [(flat[group.index] & mask).sum(dim=1) for group, mask in zip(self.groups, masks, strict=True)]
        both = torch.stack([torch.cat(counts), torch.cat([mask.sum(dim=1) for mask in masks])])
        count, size = self.ended_rows.arrange(both if self.ended is None else both[:, self.ended])  # [batch, K]
        touches = count > 0
        if self.ended_rows.counted is not None:
            touches = touches & self.ended_rows.counted
        return touches & ((2 * count >= tokens.sum(dim=1, keepdim=True)) | (2 * count >= size)), touches

    def spread(self, weights: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Return the token weights of one segment of each row in the columns of its tokens: `[S, batch, width]`, 0 elsewhere.

        Args:
            weights (`[S, segments, length]`): of a pass with one group, whose segments have all ended.
            place (`[batch]` int64): which segment of each row.
        """
        (group,) = self.groups
        rows = torch.arange(self.batch, device=place.device)
        columns = (
            self.ended_rows.arrange(group.index[None])[0, rows, place] - rows[:, None] * self.width
        )  # [batch, length]
        chosen = self.ended_rows.arrange(weights)[:, rows, place]
        spread = weights.new_zeros(len(weights), self.batch, self.width)
        # Filling has the weight 0 and may have the column of a token.
        return spread.scatter_add_(2, columns.clamp_min(0).expand_as(chosen), chosen)


def join_counted(parts: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> torch.Tensor | None:
    """Join which segments count, `[batch, K]` of each part with logits `[batch, K, num_labels]`; `None` if all count."""
    if all(counted is None for _, counted in parts):
        return None
    masks = [torch.ones_like(logits[..., 0], dtype=torch.bool) if mask is None else mask for logits, mask in parts]
    return join(masks)


def join(parts: Sequence[torch.Tensor], dim: int = 1) -> torch.Tensor:
    """Return `torch.cat(parts, dim)`, without a copy of a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def span_of(mask: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Return the first column that counts and one past the last, for each label: `[batch, num_labels, 2]` int64.

    Args:
        mask (`[batch, tokens]` bool): the tokens that count.
    """
    first = mask.int().argmax(dim=1)
    last = mask.shape[1] - mask.flip(1).int().argmax(dim=1)
    span = torch.stack([first, torch.where(mask.any(dim=1), last, first)], dim=-1)
    return span.unsqueeze(1).expand(-1, num_labels, -1)


# A segment. `first`, `read` and `stop` are places in the list of all tokens that count, of all rows: the segment's first token, its
# first token that is read in this pass, and the end of its tokens so far.
_FIELDS = {"row": int, "first": int, "read": int, "stop": int, "is_begun": bool, "is_open": bool, "counts": bool}
_SEGMENT = np.dtype(list(_FIELDS.items()))


def find_segments(
    numbers: torch.Tensor,
    window: int,
    columns: slice,
    start: int = 0,
    ends: bool = True,
    move: Move = torch.Tensor.clone,
) -> Segments:
    """Return the segments of the tokens that one pass reads.

    Windows are counted from the first token of a turn that counts. A window that adds no token to the window before it does not
    count.

    Args:
        numbers (`[batch, tokens]` int64, on the CPU): from `number_segments`, of all tokens up to the end of this pass.
        window: as in `ProbeConfig`; 0 for whole turns.
        columns: the columns that are read. They hold all tokens of the pass that count.
        start: first column of the pass. Earlier passes have read the tokens before it.
        ends: no token that counts follows.
        move: copies a tensor to the device of the head.
    """
    turns = numbers.numpy()
    batch = len(turns)
    width = columns.stop - columns.start
    rows, places = np.nonzero(turns)
    bounds = np.searchsorted(rows, np.arange(batch + 1))
    found = []
    for row, (low, high) in enumerate(pairwise(bounds)):
        seen = low + np.count_nonzero(turns[row, :start])
        found += _segments_of_row(row, turns[row, places[low:high]], low, seen, window, ends)
    segments = np.concatenate(found) if found else np.zeros(0, _SEGMENT)
    begun = segments[segments["is_begun"]]
    new = segments[~segments["is_begun"]]
    num_begun = _ranks(begun["row"]).max(initial=-1) + 1
    filled = np.zeros(num_begun * batch, _SEGMENT)
    filled[_ranks(begun["row"]) * batch + begun["row"]] = begun
    # Windows are of one length. Turns are not: the first turn of each row goes into one group, the second into the next.
    ranks = _ranks(new["row"]) if window == 0 else np.zeros(len(new), int)
    parts = [new[ranks == rank] for rank in range(ranks.max(initial=-1) + 1)]
    listed = np.concatenate([filled, *parts])
    is_partial = len(begun) > 0 or bool(listed["is_open"].any())
    index = rows * width + places - columns.start
    ended = _in_rows(listed, listed["counts"] & ~listed["is_open"])
    is_open = _in_rows(listed, listed["is_open"])
    return Segments(
        batch=batch,
        width=width,
        num_begun=num_begun,
        begun=_group(filled, index, True, move) if num_begun else None,
        groups=[_group(part, index, is_partial, move) for part in parts],
        ended=None if np.array_equal(ended, np.arange(len(listed))) else move(torch.from_numpy(ended)),
        ended_rows=_rows(listed[ended], batch, places, move),
        open=[move(torch.from_numpy(is_open[which])) for which in _by_row(listed["row"][is_open], batch).T],
        open_rows=_rows(listed[is_open], batch, places, move),
    )


def _segments_of_row(row: int, turns: np.ndarray, low: int, seen: int, window: int, ends: bool) -> list[np.ndarray]:
    """Return the segments of a row to which tokens from `seen` on belong, or which end there, for each turn.

    Args:
        turns (`[tokens]`): the turn of each token of the row that counts.
        low: place of the first of these tokens.
        seen: place of the first token of this pass.
    """
    parts = []
    high = low + len(turns)
    borders = low + np.flatnonzero(np.diff(turns, prepend=0, append=0))
    for begin, end in pairwise(borders.tolist()):
        if end < seen:  # the turn had ended before this pass
            continue
        if window:
            first = np.arange(begin, end, window // 2)
            limit = first + window
            counts = (first == begin) | (end > first + window // 2)
        else:
            first = np.array([begin])
            limit = np.array([high + 1])  # any turn may grow
            counts = np.array([True])
        is_open = (limit > end) & (end == high) & (not ends)
        is_begun = (first < seen) & (limit > seen)
        part = np.zeros(len(first), _SEGMENT)
        part["row"] = row
        part["first"] = first
        part["read"] = np.maximum(first, seen)
        part["stop"] = np.minimum(limit, end)
        part["is_begun"] = is_begun
        part["is_open"] = is_open
        part["counts"] = counts
        parts.append(part[is_begun | ((first >= seen) & (counts | is_open))])
    return parts


def _ranks(rows: np.ndarray) -> np.ndarray:
    """Return for each entry of a list of ascending numbers how many entries before it are equal."""
    return np.arange(len(rows)) - np.searchsorted(rows, rows)


def _in_rows(segments: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return the numbers of the chosen segments, row by row."""
    numbers = np.flatnonzero(chosen)
    return numbers[np.argsort(segments["row"][numbers], kind="stable")]


def _by_row(rows: np.ndarray, batch: int) -> np.ndarray:
    """Return the places of each row in a list of ascending row numbers, `[batch, K]`. Filling is 0."""
    ranks = _ranks(rows)
    places = np.zeros((batch, ranks.max(initial=-1) + 1), int)
    places[rows, ranks] = np.arange(len(rows))
    return places


def _group(segments: np.ndarray, index: np.ndarray, masked: bool, move: Move) -> Group:
    """Return the tokens of segments that are read in this pass. `index` gives the place of each token that counts."""
    length = max((segments["stop"] - segments["read"]).max(), 1)
    tokens = segments["read"][:, None] + np.arange(length)  # [segments, length]
    mask = tokens < segments["stop"][:, None]
    has_tokens = segments["stop"] > segments["read"]
    places = np.zeros(tokens.shape, int)
    places[has_tokens] = index[np.minimum(tokens, segments["stop"][:, None] - 1)[has_tokens]]
    is_masked = masked or not mask.all()
    return Group(move(torch.from_numpy(places)), move(torch.from_numpy(mask)) if is_masked else None)


def _rows(segments: np.ndarray, batch: int, columns: np.ndarray, move: Move) -> Rows:
    """Arrange segments, which are in the order of their rows. `columns` gives the column of each token that counts."""
    places = _by_row(segments["row"], batch)
    at = segments["row"], _ranks(segments["row"])
    counted = np.zeros(places.shape, bool)
    counted[at] = segments["counts"]
    spans = np.zeros((*places.shape, 2), int)
    spans[at] = np.stack([columns[segments["first"]], columns[segments["stop"] - 1] + 1], axis=-1)
    return Rows(
        places=None if places.size == len(segments) else move(torch.from_numpy(places)),
        counted=None if counted.all() else move(torch.from_numpy(counted)),
        spans=move(torch.from_numpy(spans)),
    )
