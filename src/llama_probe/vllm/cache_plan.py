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
        heads: of the plan, by name. plan: with features. device, dtype: of the states.
    """

    def __init__(
        self,
        heads: Mapping[str, ProbeModel],
        plan: CachePlan,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.plan = plan
        self._groups: dict[tuple[tuple[int, ...], str | None], list[str]] = {}  # heads by layers and normalisation
        for name in plan.readers:
            alike = tuple(heads[name].layer_indices), heads[name].config.normalize
            self._groups.setdefault(alike, []).append(name)
        self._maps = {  # [S, D, ranks]
            alike: torch.cat([plan.maps[name] for name in names], dim=1).transpose(1, 2).to(device, dtype)
            for alike, names in self._groups.items()
        }

    def project(self, states: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Return `[tokens, width]`, in the model's dtype, for states `[tokens, hidden_size]` by layer."""
        first = next(iter(states.values()))
        features = first.new_empty(len(first), self.plan.width)
        for (layers, kind), names in self._groups.items():
            ranks = [self.plan.maps[name].shape[1] for name in names]
            # The states of a piece are there twice: their stack, and its normalised copy.
            size = max(1, state_budget(first.device) // (2 * len(layers) * first.shape[1] * first.element_size()))
            for begin in range(0, len(first), size):
                piece = slice(begin, begin + size)
                x = normalize(torch.stack([states[layer][piece] for layer in layers]), kind)  # [S, n, D]
                products = torch.bmm(x, self._maps[layers, kind]).transpose(0, 1)  # [n, S, ranks]
                for name, part in zip(names, products.split(ranks, dim=-1), strict=True):
                    features[piece, self.plan.columns[name]] = part.flatten(1)
        return features


def _layers(heads: Iterable[ProbeModel]) -> list[int]:
    return sorted({layer for head in heads for layer in head.layer_indices})
