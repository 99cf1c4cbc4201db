"""What every kind of head must be able to do, and the registry that finds a kind by its name.

Dimension letters used in all files of this folder:
    S  slots: L+1 layers in the token stage, 1 in the layer stage
    B  batch, N  items to summarise (tokens, or layers), D  hidden size
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ProbeError


if TYPE_CHECKING:
    from .configuration import ProbeConfig


class Classifier(nn.Module):
    """The map from a head's pooled vector `[B, D]` to its logits `[B, num_labels]`; linear, in whatever `inputs` makes of it.

    It is no `nn.Linear`: what adapts or quantises all linear layers of an LM leaves the heads on it alone.
    """

    def __init__(self, in_features: int, num_labels: int):
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.empty(num_labels, in_features))
        self.bias = nn.Parameter(torch.empty(num_labels))
        self.reset_parameters()

    reset_parameters = nn.Linear.reset_parameters

    @property
    def lm(self) -> nn.Module | None:
        """The LM that the map is bound to, where it needs something of it beside its states; most need nothing."""
        return None

    def needs(self, lm: nn.Module) -> Any:
        """What the map needs of the frozen LM, for `bind`. Nothing is changed yet.

        Raises:
            ProbeError: the LM does not have it, or the map is bound to another one.
        """
        return None

    def bind(self, needed: Any) -> None:
        """Takes what `needs` found. It is no part of the module, and does not go with a copy or a pickle of it."""

    def rebind(self, lm: nn.Module) -> None:
        """After a copy, or a pickle, of an LM with the head on it: takes from the copy what was taken from the LM."""

    def release(self) -> None:
        """Frees the map for another LM. What it has it keeps until then."""

    def inputs(self, pooled: torch.Tensor) -> torch.Tensor:
        """What the linear map is applied to: `[B, D]` to `[B, in_features]`."""
        return pooled

    def member_logits(self, pooled: torch.Tensor) -> torch.Tensor | None:
        """Of a head that is several in one, which learn apart: the logits of each, `[members, B, num_labels]`."""
        return None

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """`[B, D]` to `[B, num_labels]`."""
        return F.linear(self.inputs(pooled), self.weight, self.bias)


class Aggregator(nn.Module, ABC):
    """Summarises N vectors into one, for several slots side by side.

    The same kind serves both stages, unless `create_layer_stage` says otherwise: the token stage has one slot a layer, with
    its parameters stacked in tensors of shape `[slots, ...]`, and the layer stage has a single slot.

    A kind implements `update`, `result` and `weights`. Because the whole-tensor path is one `update` followed by `result`, and
    the serving path is one `update` a layer and chunk of tokens, the two cannot drift apart.

    Args:
        num_slots (`int`): number of independent summaries.
        config (`ProbeConfig`): the head's configuration, with `hidden_size` set.

    Attributes:
        reads: `"all"`, or `"last"` where only the last of the tokens that count and the last of the layers matter: the
            others are then neither captured nor cached.
        normalize: of the config, where that leaves it open.
        convex: whether the classifier is all that is learned, and is fitted as a convex problem; see
            `llama_probe.training.fitting`. Others learn by gradient steps.
        causal: of the instance; whether what is made of an item may depend on that item and earlier ones alone.
        rank: of the instance; see `LowRankAggregator`.

    A state is a tensor `[S, B, ...]`, `None`, or a tuple or list of these, so that `join_slots`, `take_slots`, `repeat_rows` and
    `select_rows` can handle it. `update` makes a new one and leaves the old one as it is: many prompts may go on from it.
    """

    reads: ClassVar[str] = "all"
    normalize: ClassVar[str] = "layernorm"
    convex: ClassVar[bool] = False
    causal: bool = False
    rank: int | None = None

    def __init__(self, num_slots: int, config: ProbeConfig):
        super().__init__()
        self.num_slots = num_slots
        self.hidden_size = config.hidden_size
        self.pool = config.pool

    @classmethod
    def check(cls, config: ProbeConfig) -> None:
        """Raises `ProbeError` where `config` holds a value that this kind cannot be built from; of options none are known here."""
        if config.options:
            raise ProbeError(f"options has {sorted(config.options)}; probe_type={config.probe_type!r} has none")

    @classmethod
    def members(cls, config: ProbeConfig) -> int:
        """How many heads a head of `config` is the mean of, which learn apart."""
        return 1

    @classmethod
    def create_classifier(cls, config: ProbeConfig) -> Classifier:
        """The map from what the layer stage gives, `[B, D]` in most kinds, to the logits, for a head of `config`."""
        return Classifier(config.hidden_size, config.num_labels)

    @classmethod
    def create_layer_stage(cls, config: ProbeConfig) -> Aggregator:
        """What summarises the layers' summaries, for a head of `config`: an aggregator with a single slot, without a mask."""
        return cls(1, config)

    @abstractmethod
    def update(self, state: Any, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> Any:
        """Takes in further items.

        Args:
            state: what an earlier `update` returned for the same slots, or `None` at the start.
            x (`torch.FloatTensor` of shape `[S, B, n, D]`): the next n items of the slots in `slots`.
            mask (`torch.BoolTensor` of shape `[B, n]`, *optional*): which items count; `None` where all do.
            slots (`slice`): the slots that `x` belongs to.

        Returns:
            The new state.
        """

    @abstractmethod
    def result(self, state: Any, slots: slice) -> torch.Tensor:
        """The summary of everything taken in so far: a tensor of shape `[S, B, D]`."""

    @abstractmethod
    def weights(self, x: torch.Tensor, mask: torch.Tensor | None, slots: slice) -> torch.Tensor:
        """How much each item counted: `[S, B, N]`, at least 0, 0 off the mask, summing to 1 over N."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, slots: slice = slice(None)) -> torch.Tensor:
        """`[S, B, N, D]` and an optional `[B, N]` mask to `[S, B, D]`."""
        return self.result(self.update(None, x, mask, slots), slots)

    # Several heads side by side, while the LM runs. A kind may have a cheaper way to the same.

    @classmethod
    def read(cls, stages: Sequence[Self], state: Any, x: torch.Tensor, mask: torch.Tensor | None, slot: int) -> Any:
        """`update` for one slot of several aggregators that differ in their parameters alone.

        Args:
            stages: the aggregators, H of them.
            state: what an earlier `read` returned for the slot, or `None`: of shape `[H, B, ...]`.
            x (`[1, B, n, D]`): the next n items, for all of them.
            mask: see `update`. slot: which one.

        Returns:
            The new state.
        """
        slots = slice(slot, slot + 1)
        if len(stages) == 1:
            return stages[0].update(state, x, mask, slots)
        parts = [None if state is None else take_slots(state, slice(i, i + 1)) for i in range(len(stages))]
        return join_slots([stage.update(part, x, mask, slots) for stage, part in zip(stages, parts, strict=True)])

    @classmethod
    def summarize(cls, stages: Sequence[Self], state: Any, slot: int, out: torch.Tensor) -> None:
        """`result` of what `read` gave, into `out`, `[H, B, D]`."""
        slots = slice(slot, slot + 1)
        if len(stages) == 1:
            out.copy_(stages[0].result(state, slots))
            return
        for number, stage in enumerate(stages):
            each = slice(number, number + 1)
            out[each] = stage.result(take_slots(state, each), slots)

    @classmethod
    def whole_reader(
        cls, stages: Sequence[Self], mask: torch.Tensor | None, slot: int, out: torch.Tensor
    ) -> Callable[[torch.Tensor], None]:
        """What does `read` and `summarize` for one slot, of items that come all at once: `[B, N, D]` into `out`, `[H, B, D]`."""

        def read(x: torch.Tensor) -> None:
            cls.summarize(stages, cls.read(stages, None, x.unsqueeze(0), mask, slot), slot, out)

        return read


_PROBE_TYPES: dict[str, type[Aggregator]] = {}


def register_probe_type(name: str):
    """Class decorator that makes an `Aggregator` available as `ProbeConfig(probe_type=name)`.

    Raises:
        ValueError: the name already belongs to another class.
    """

    def register(cls: type[Aggregator]) -> type[Aggregator]:
        known = _PROBE_TYPES.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"probe_type {name!r} is taken by {known.__name__}; register under another name")
        _PROBE_TYPES[name] = cls
        return cls

    return register


def probe_types() -> list[str]:
    """Names of all registered kinds."""
    return sorted(_PROBE_TYPES)


def get_probe_type(name: str) -> type[Aggregator]:
    """The class registered under `name`; `ProbeError` lists the known ones."""
    if not isinstance(name, str) or name not in _PROBE_TYPES:
        raise ProbeError(
            f"probe_type={name!r} is not known; allowed: {', '.join(probe_types())}, and kinds of one's own, once the file "
            "that registers them is imported"
        )
    return _PROBE_TYPES[name]


def create_stages(config: ProbeConfig) -> tuple[Aggregator, Aggregator]:
    """Builds the token stage and the layer stage of a head of `config`."""
    kind = get_probe_type(config.probe_type)
    token_stage = kind(len(config.layer_indices), config)
    token_stage.causal = config.causal
    return token_stage, kind.create_layer_stage(config)


def join_slots(states: Sequence[Any]) -> Any:
    """One state of all slots, from the states of consecutive slots."""
    if len(states) == 1:
        return states[0]
    if isinstance(states[0], (tuple, list)):
        return type(states[0])(join_slots(parts) for parts in zip(*states, strict=True))
    return None if states[0] is None else torch.cat(list(states))


def take_slots(state: Any, slots: slice) -> Any:
    """The state of some slots, from one of all slots."""
    return _each_tensor(state, lambda tensor: tensor[slots])


def repeat_slots(state: Any, slots: int) -> Any:
    """A state of so many slots that are alike, from that of one; they share its memory."""
    return _each_tensor(state, lambda tensor: tensor.expand(slots, *tensor.shape[1:]))


def repeat_rows(state: Any, repeats: int) -> Any:
    """A state in which each row stands `repeats` times, one after the other."""
    return state if repeats == 1 else _each_tensor(state, lambda tensor: tensor.repeat_interleave(repeats, dim=1))


def select_rows(state: Any, rows: torch.Tensor) -> Any:
    """A state of the rows whose indices are given: `rows` is `[new_rows]`, on any device."""
    return _each_tensor(state, lambda tensor: tensor.index_select(1, rows.to(tensor.device)))


def _each_tensor(state: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(state, (tuple, list)):
        return type(state)(_each_tensor(part, change) for part in state)
    return None if state is None else change(state)


def last_valid(mask: torch.Tensor) -> torch.Tensor:
    """Where the last true of each row of a `[B, N]` mask is: booleans `[B, N]`, one true a row that has any."""
    return mask & (mask.int().cumsum(dim=1) == mask.sum(dim=1, keepdim=True))


def masked_mean(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of `[S, B, N, D]` over the items where the `[B, N]` mask is true: `[S, B, D]`."""
    if mask is None:
        return x.mean(dim=2)
    weight = mask.to(x.dtype)
    weight = weight / weight.sum(dim=1, keepdim=True).clamp_min(1.0)  # [B, N]
    return torch.matmul(weight[None, :, None, :], x).squeeze(2)


def masked_max(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Maximum, per dimension, of `[S, B, N, D]` over the items where the mask is true: `[S, B, D]`."""
    if mask is not None:
        x = x.masked_fill(~mask[None, :, :, None], float("-inf"))
    return x.amax(dim=2)
