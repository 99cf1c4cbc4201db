"""The token-stage state of a head while an LM runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .aggregator import State, join_slots, map_state, take_slots


# The columns that hold some tokens, and which tokens of these columns, `[batch, n]` bool; `None` if all.
Columns = tuple[slice, torch.Tensor | None]
# The tokens of each segment, by its number from 1.
Segments = dict[int, Columns]


class SlotStates:
    """States of several slots, cut and joined as groups of slots need. `state` is that of all, as `joined` returned it."""

    def __init__(self, num_slots: int, state: State = None):
        self.num_slots = num_slots
        self._parts: dict[tuple[int, int], State] = {} if state is None else {(0, num_slots): state}

    def pop(self, slots: slice) -> State:
        """Remove and return the state of consecutive slots; `None` if they have read nothing."""
        states = []
        for first, stop in sorted(self._parts):
            if stop <= slots.start or slots.stop <= first:
                continue
            part = self._parts.pop((first, stop))
            for low, high in ((first, slots.start), (slots.stop, stop)):
                if low < high:
                    self._parts[low, high] = take_slots(part, slice(low - first, high - first))
            states.append(take_slots(part, slice(max(first, slots.start) - first, min(stop, slots.stop) - first)))
        return join_slots(states) if states else None

    def put(self, slots: slice, state: State) -> None:
        """Store the state of the slots that `pop` returned before."""
        self._parts[slots.start, slots.stop] = state

    def joined(self) -> State:
        """Return the state of all slots, as one; `None` if nothing has been read."""
        state = self.pop(slice(0, self.num_slots))
        if state is not None:
            self.put(slice(0, self.num_slots), state)
        return state


@dataclass
class ProbeState:
    """The token-stage state of one head between two calls of `ProbeModel.step`; see `ProbeModel.init_state`.

    Groups of layers may differ from one chunk of the prompt to the next; each group's state is cut and joined as needed.

    Attributes:
        tokens: token-stage state, of all segments together.
        segments: token-stage state of each segment, if the head judges it by itself and a row has more than one.
        means: sums for the mean states; `None` without novelty.
        summaries: `[slots, batch, width]` of slots that have read the last token.
        weights: how much each token counted, `[slots, batch, tokens]`, if `output_attentions`.
    """

    tokens: SlotStates
    segments: list[SlotStates]
    means: SlotStates | None
    summaries: SlotStates
    weights: SlotStates
    keep: bool
    output_attentions: bool

    def joined(self) -> State:
        """Return what all slots keep of tokens, segments and means, as one; `None` if nothing has been read."""
        tokens, means = self.tokens.joined(), None if self.means is None else self.means.joined()
        return None if tokens is None else (tokens, tuple(segment.joined() for segment in self.segments), means)


def as_slice(places: Sequence[int]) -> slice | list[int]:
    """Return ascending indices as a slice if they are evenly spaced: it takes no copy."""
    step = places[1] - places[0] if len(places) > 1 else 1
    even = list(range(places[0], places[-1] + 1, step)) == list(places)
    return slice(places[0], places[-1] + 1, step) if even else list(places)


def split_segments(numbers: torch.Tensor, move: Callable[[torch.Tensor], torch.Tensor]) -> Segments:
    """Split tokens by the numbers of their segments, `[batch, tokens]` on the CPU; see `number_segments`.

    Args:
        move: brings a mask to the device of the head.
    """
    found = numbers[numbers > 0].unique().tolist()
    return {number: counted_columns(numbers == number, move) for number in found}


def counted_columns(mask: torch.Tensor, move: Callable[[torch.Tensor], torch.Tensor]) -> Columns:
    """Return the columns from the first to the last token that counts, `[batch, tokens]` bool on the CPU; see `split_segments`.

    If no token counts, the first column is returned, in which nothing counts.
    """
    places = mask.any(dim=0).nonzero().flatten().tolist() or [0]
    columns = slice(places[0], places[-1] + 1)
    mask = mask[:, columns]
    return columns, None if bool(mask.all()) else move(mask)


def repeat_rows(state: State, repeats: int) -> State:
    """Repeat each row of a state `repeats` times, as `torch.repeat_interleave` does."""
    return state if repeats == 1 else map_state(state, lambda tensor: tensor.repeat_interleave(repeats, dim=1))


def select_rows(state: State, rows: torch.Tensor) -> State:
    """Return the state of the rows in `rows`, `[new_rows]`, on any device."""
    return map_state(state, lambda tensor: tensor.index_select(1, rows.to(tensor.device)))
