"""The memory of an engine for its heads: states or features of each token, and a state of each reply that they follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ..heads.aggregator import State, select_rows
from ..heads.configuration import shared_layers
from ..heads.probe import ProbeModel
from ..heads.states import normalize
from ..serving.reader import state_budget


class CachePlan:
    """Divides heads into those that read cached states and those that read features of them.

    Features are what a head's linear maps give for a token, at every layer that it reads; see `ProbeModel.projected`. They are
    kept if that takes fewer numbers than the states alone.

    Args:
        projected: keep features, or states alone. Defaults to what is smaller.

    Attributes:
        whole: heads that read states. readers: those that read features, as they read them.
        layers: indices of the states that are kept, ascending.
        maps: maps of each reader, `[S, rank, D]`.
        columns: places of each reader's features, `S * rank`, in those of a token.
        reply_states: of the heads that follow replies, where they run; see `follow_replies`.
    """

    def __init__(self, heads: Mapping[str, ProbeModel], projected: bool | None = None):
        splits = {name: head.projected() for name, head in heads.items()}
        splits = {name: split for name, split in splits.items() if split is not None}
        every = shared_layers(head.config for head in heads.values())
        others = shared_layers(head.config for name, head in heads.items() if name not in splits)
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


def empty_state(head: ProbeModel, width: int) -> State:
    """Return the state `[S, 1, ...]` of a head that has read nothing, for inputs `[S, B, n, width]`."""
    # vLLM builds models with another default dtype.
    nothing = torch.zeros(len(head.layer_indices), 1, 1, width, dtype=torch.float32, device=head.device)
    mask = torch.zeros(1, 1, dtype=torch.bool, device=head.device)
    with torch.no_grad():
        return head.token_stage.update(None, nothing, mask, slice(None))


def grows(head: ProbeModel) -> bool:
    """Return True if the state of a head grows with the tokens that it reads."""
    before = empty_state(head, head.config.hidden_size)
    token = torch.zeros(len(head.layer_indices), 1, 1, head.config.hidden_size)
    with torch.no_grad():
        after = head.token_stage.update(before, token, None, slice(None))
    return [leaf.shape for leaf in _leaves(before)] != [leaf.shape for leaf in _leaves(after)]


class ReplyStates:
    """States of heads, by slot, in fp32.

    Args:
        heads: those that follow replies, by name, as they read what is cached.
        widths: of what they read at a layer.
        slots: replies at the same time. One more slot, `spare`, is for what nobody reads.
    """

    def __init__(self, heads: Mapping[str, ProbeModel], widths: Mapping[str, int], slots: int):
        self.spare = slots
        self._empty = {name: empty_state(head, widths[name]) for name, head in heads.items()}
        every = torch.zeros(slots + 1, dtype=torch.long, device=next(iter(heads.values())).device)
        self._states = {name: select_rows(empty, every) for name, empty in self._empty.items()}

    def get(self, name: str, slots: torch.Tensor) -> State:
        """Return a copy of the states of a head in slots `[B]`: `[S, B, ...]`."""
        return select_rows(self._states[name], slots)

    def put(self, name: str, slots: torch.Tensor, state: State) -> None:
        """Store the states `[S, B, ...]` of a head in slots `[B]`."""
        for kept, new in zip(_leaves(self._states[name]), _leaves(state), strict=True):
            kept.index_copy_(1, slots, new)

    def clear(self, slots: torch.Tensor) -> None:
        """Let all heads begin anew in slots `[B]`."""
        first = torch.zeros_like(slots)
        for name, empty in self._empty.items():
            self.put(name, slots, select_rows(empty, first))


def _leaves(state: State) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    else:
        for part in state or ():
            yield from _leaves(part)
