"""The cache of an engine for its heads: of every token the states of some layers, numbers that heads make of them, or both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..heads.probe import ProbeModel
from ..heads.states import normalize
from ..serving.reader import state_budget
from .reply_states import ReplyStates


class CachePlan:
    """Divides heads into those that read cached states and those that read features of them.

    Features are what a head's linear maps give for a token, at every layer that it reads; see `ProbeModel.projected`. They are
    kept if that takes fewer numbers than the states alone.

    Args:
        heads: by name.
        projected: keep features, or states alone. Defaults to what is smaller.

    Attributes:
        names: of all heads, in order.
        whole: heads that read states. readers: those that read features, as they read them.
        layers: indices of the states that are kept, ascending.
        maps: maps of each reader, `[S, rank, D]`.
        columns: places of each reader's features, `S * rank`, in those of a token.
        width: number of features of a token.
        reply_states: of the heads that follow replies, where they run; see `follow_replies`.
    """

    def __init__(self, heads: Mapping[str, ProbeModel], projected: bool | None = None):
        splits = {name: head.projected() for name, head in heads.items()}
        splits = {name: split for name, split in splits.items() if split is not None}
        every = _layers(heads.values())
        others = _layers(head for name, head in heads.items() if name not in splits)
        size = sum(maps.shape[0] * maps.shape[1] for maps, _ in splits.values())
        if projected is None:
            projected = size < (len(every) - len(others)) * next(iter(heads.values())).config.hidden_size
        if not projected:
            splits, others, size = {}, every, 0
        self.names = list(heads)
        self.whole = {name: head for name, head in heads.items() if name not in splits}
        self.readers = {name: reader for name, (_, reader) in splits.items()}
        self.maps = {name: maps for name, (maps, _) in splits.items()}
        self.layers, self.width = others, size
        self.columns: dict[str, slice] = {}
        first = 0
        for name, maps in self.maps.items():
            self.columns[name] = slice(first, first + maps.shape[0] * maps.shape[1])
            first = self.columns[name].stop
        self.reply_states: ReplyStates | None = None

    def follow_replies(self, slots: int, device: torch.device) -> None:
        """Make room for the states of `slots` replies, and move all heads beside it. A server counts this memory at its start."""
        for head in (*self.whole.values(), *self.readers.values()):
            head.to(device)
        heads = {name: head for name, head in (self.whole | self.readers).items() if head.config.reads_reply}
        widths = {
            name: self.maps[name].shape[1] if name in self.maps else head.config.hidden_size
            for name, head in heads.items()
        }
        if heads:
            self.reply_states = ReplyStates(heads, widths, slots)


class Projector:
    """Makes features of the states of tokens.

    Heads that read the same layers, normalised alike, share one product with all their maps.

    Args:
        heads: of the plan, by name. plan: with features.
    """

    def __init__(self, heads: Mapping[str, ProbeModel], plan: CachePlan):
        self.plan = plan
        self._groups: dict[tuple[tuple[int, ...], str | None], list[str]] = {}  # heads by layers and normalisation
        for name in plan.readers:
            alike = tuple(heads[name].layer_indices), heads[name].config.normalize
            self._groups.setdefault(alike, []).append(name)
        self._maps = {  # [S, D, ranks]
            alike: torch.cat([plan.maps[name] for name in names], dim=1).transpose(1, 2)
            for alike, names in self._groups.items()
        }
        self._read = sorted({layer for layers, _ in self._groups for layer in layers})

    def project(self, states: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Return `[tokens, width]`, in the model's dtype, for states `[tokens, hidden_size]` by layer."""
        first = states[self._read[0]]
        features = first.new_empty(len(first), self.plan.width)
        # [tokens, S, rank]
        rooms = {
            name: features[:, self.plan.columns[name]].unflatten(1, (len(layers), -1))
            for (layers, _), names in self._groups.items()
            for name in names
        }
        # At most two of a group's states are there at once: their stack, and its normalised copy.
        size = max(1, state_budget(first.device) // max(1, 2 * first.numel() * first.element_size()))
        for begin in range(0, len(self._read), size):
            some = self._read[begin : begin + size]
            x, normalized = torch.stack([states[layer] for layer in some]), {}  # [S, tokens, D]
            for (layers, kind), names in self._groups.items():
                places = [place for place, layer in enumerate(some) if layer in layers]
                if not places:
                    continue
                if kind not in normalized:
                    normalized[kind] = normalize(x, kind)
                own = normalized[kind] if len(places) == len(some) else normalized[kind][places]
                slot = layers.index(some[places[0]])
                slots = slice(slot, slot + len(places))
                found = torch.bmm(own, self._maps_as(own, (layers, kind))[slots]).transpose(0, 1)  # [tokens, S, ranks]
                ranks = [rooms[name].shape[-1] for name in names]
                for name, part in zip(names, found.split(ranks, dim=-1), strict=True):
                    rooms[name][:, slots] = part
        return features

    def _maps_as(self, states: torch.Tensor, alike: tuple[tuple[int, ...], str | None]) -> torch.Tensor:
        """Return the maps of a group beside states. They are moved once, before an engine records anything."""
        maps = self._maps[alike]
        if (maps.device, maps.dtype) != (states.device, states.dtype):
            self._maps[alike] = maps.to(states.device, states.dtype)
        return self._maps[alike]


def _layers(heads: Iterable[ProbeModel]) -> list[int]:
    return sorted({layer for head in heads for layer in head.layer_indices})
