"""The plan of an engine's cache for heads: states or features of each token, and head states of each reply."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

import torch
from torch.utils._pytree import tree_leaves

from ..heads.aggregator import State, normalize, select_rows
from ..heads.configuration import shared_layers
from ..heads.probe import ProbeModel
from ..heads.split import split_head
from ..serving.reader import state_budget


_STATES = ""  # in place of a head's name


class CachePlan:
    """The `width` numbers that are stored of each token: hidden states of some layers, and then features.

    Features are the results of a head's linear maps for a token, at every layer that the head reads; see `split_head`. Features
    are stored if they take fewer numbers than the states that they replace.

    Args:
        projected: store features, or states alone. Defaults to the smaller.

    Attributes:
        heads: heads by name, in a form that reads the stored numbers.
        layers: indices of the stored states, ascending.
        sizes: by head, how many numbers it reads of a layer.
        columns: by head, where its numbers lie among those of a token, layer by layer.
        depth: `width` divided by the size of a hidden state, rounded up.
        reply_states: states of the heads that follow replies.
    """

    def __init__(self, heads: Mapping[str, ProbeModel], projected: bool | None = None):
        hidden_size = next(iter(heads.values())).config.hidden_size
        splits = {name: split for name, head in heads.items() if (split := split_head(head)) is not None}
        every = shared_layers(head.config for head in heads.values())
        self.layers = shared_layers(head.config for name, head in heads.items() if name not in splits)
        if projected is None:
            features = sum(maps.shape[0] * maps.shape[1] for maps, _ in splits.values())
            projected = features < (len(every) - len(self.layers)) * hidden_size
        if not projected:
            splits, self.layers = {}, every
        self.heads = {name: splits[name][1] if name in splits else head for name, head in heads.items()}
        self.sizes = {name: splits[name][0].shape[1] if name in splits else hidden_size for name in heads}
        # Heads that read the same layers, normalised alike, share one product with all their maps, [S, D, sizes].
        self._groups: dict[tuple[tuple[int, ...], str | None], list[str]] = {}
        for name in splits:
            alike = tuple(heads[name].layer_indices), heads[name].config.normalize
            self._groups.setdefault(alike, []).append(name)
        self._maps: dict[tuple[tuple[int, ...], str | None], torch.Tensor] = {}
        for alike, names in self._groups.items():
            self._maps[alike] = torch.cat([splits[name][0] for name in names], dim=1).transpose(1, 2)
        widths = {_STATES: len(self.layers) * hidden_size}
        for (layers, _), names in self._groups.items():
            widths |= {name: len(layers) * self.sizes[name] for name in names}
        self.width = sum(widths.values())
        self.depth = -(-self.width // hidden_size)
        places = side_by_side(widths)
        self.columns = {name: places.get(name, places[_STATES]) for name in heads}
        self.reply_states: ReplyStates | None = None

    def move(self, device: torch.device, dtype: torch.dtype, slots: int) -> None:
        """Move heads and maps to a device, and make room for the states of `slots` replies, which vLLM's memory profile counts.

        `dtype` is that of the hidden states.
        """
        for head in self.heads.values():
            head.to(device)
        self._maps = {alike: maps.to(device, dtype) for alike, maps in self._maps.items()}
        if followers := {name: head for name, head in self.heads.items() if head.config.reads_reply}:
            self.reply_states = ReplyStates(followers, self.sizes, slots)

    def pieces(self, states: Mapping[int, torch.Tensor]) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the numbers to store, `[piece, width]` in the model's dtype, and the place of each piece among the tokens.

        `states` are `[tokens, hidden_size]` by layer.
        """
        first = next(iter(states.values()))
        # The states of a piece are in memory three times: stacked, normalised, and as numbers to store.
        size = max(1, state_budget(first.device) // (3 * len(states) * first.shape[1] * first.element_size()))
        for begin in range(0, len(first), size):
            piece = slice(begin, begin + size)
            parts = [states[layer][piece] for layer in self.layers]
            for alike, names in self._groups.items():
                layers, normalization = alike
                x = normalize(torch.stack([states[layer][piece] for layer in layers]), normalization)  # [S, n, D]
                products = torch.bmm(x, self._maps[alike]).transpose(0, 1)  # [n, S, sizes]
                parts += [part.flatten(1) for part in products.split([self.sizes[name] for name in names], dim=-1)]
            yield piece, torch.cat(parts, dim=1)

    def inputs(self, name: str, numbers: torch.Tensor) -> torch.Tensor:
        """Return the input of a head, `[S, rows, tokens, size]`, from stored numbers, `[rows, tokens, width]`."""
        head = self.heads[name]
        x = numbers[..., self.columns[name]].unflatten(-1, (-1, self.sizes[name])).permute(2, 0, 1, 3)
        if len(head.layer_indices) < len(x):  # indexing by a list would wait for a copy to the device
            x = torch.stack([x[self.layers.index(layer)] for layer in head.layer_indices])
        return head.prepare(x)


def side_by_side(sizes: Mapping[str, int]) -> dict[str, slice]:
    """Return the slice of each name, where parts of these sizes lie one behind the other."""
    stops = accumulate(sizes.values())
    return {name: slice(stop - size, stop) for (name, size), stop in zip(sizes.items(), stops, strict=True)}


def empty_state(head: ProbeModel, width: int) -> State:
    """Return the state `[S, 1, ...]` of a head that has read nothing, for inputs `[S, B, n, width]`."""
    # vLLM builds models with another default dtype.
    nothing = torch.zeros(len(head.layer_indices), 1, 1, width, dtype=torch.float32, device=head.device)
    mask = torch.zeros(1, 1, dtype=torch.bool, device=head.device)
    with torch.no_grad():
        return head.token_stage.update(None, nothing, mask, slice(None))


def grows(head: ProbeModel) -> bool:
    """Return True if the state of a head grows with the number of tokens."""
    before = empty_state(head, head.config.hidden_size)
    token = torch.zeros(len(head.layer_indices), 1, 1, head.config.hidden_size)
    with torch.no_grad():
        after = head.token_stage.update(before, token, None, slice(None))
    return [leaf.shape for leaf in _leaves(before)] != [leaf.shape for leaf in _leaves(after)]


class ReplyStates:
    """States of the heads that follow replies, in fp32, for as many replies at the same time as there are slots.

    `heads` and `sizes` are those of `CachePlan`.
    """

    def __init__(self, heads: Mapping[str, ProbeModel], sizes: Mapping[str, int], slots: int):
        self._empty = {name: empty_state(head, sizes[name]) for name, head in heads.items()}
        every = torch.zeros(slots, dtype=torch.long)
        self._states = {name: select_rows(empty, every) for name, empty in self._empty.items()}

    def get(self, name: str, slots: torch.Tensor) -> State:
        """Return a copy of the states of a head in slots `[B]`: `[S, B, ...]`."""
        return select_rows(self._states[name], slots)

    def put(self, name: str, slots: torch.Tensor, state: State) -> None:
        """Store the states `[S, B, ...]` of a head in slots `[B]`, or one state `[S, 1, ...]` in all of them."""
        for kept, new in zip(_leaves(self._states[name]), _leaves(state), strict=True):
            kept[:, slots] = new

    def clear(self, slots: torch.Tensor) -> None:
        """Let all heads begin anew in slots `[B]`."""
        for name, empty in self._empty.items():
            self.put(name, slots, empty)


def _leaves(state: State) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(state) if leaf is not None]
