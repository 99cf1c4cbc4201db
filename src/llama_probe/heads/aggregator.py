"""The base class of all head types, and operations on hidden states and on the states that head types keep.

Dimension letters used in all files of this folder:
    S  slots: L+1 layers in the token stage, 1 in the layer stage
    B  batch, N  items to summarise (tokens, or layers), D  hidden size
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ProbeError
from .configuration import ProbeConfig
from .registry import get_probe_type, register_probe_type  # noqa: F401 - for the head types


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
