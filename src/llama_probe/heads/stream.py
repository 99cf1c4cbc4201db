"""The state of a head's token stage while an LM runs, and the segments of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .aggregator import State, join_slots, map_state, take_slots


# Some columns of a batch, and a mask of the tokens in them that count, `[batch, n]` bool; `None` if all count.
Columns = tuple[slice, torch.Tensor | None]
# The tokens of each segment, by the segment's number from 1.
Segments = dict[int, Columns]


class SlotStates:
    """The states of several slots, in groups that may be cut and joined.

    Args:
        state: the state of all slots, from `joined`.
    """

    def __init__(self, num_slots: int, state: State = None):
        self.num_slots = num_slots
        self._parts: dict[tuple[int, int], State] = {} if state is None else {(0, num_slots): state}

    def pop(self, slots: slice) -> State:
        """Remove and return the state of consecutive slots; `None` if these slots have read nothing."""
        states = []
        for first, stop in sorted(self._parts):
            if stop <= slots.start or slots.stop <= first:
                continue
            part = self._parts.pop((first, stop))
            for low, high in ((first, slots.start), (slots.stop, stop)):  # slots of this part that stay
                if low < high:
                    self._parts[low, high] = take_slots(part, slice(low - first, high - first))
            taken = slice(max(first, slots.start) - first, min(stop, slots.stop) - first)
            states.append(take_slots(part, taken))
        return join_slots(states) if states else None

    def put(self, slots: slice, state: State) -> None:
        """Store the state of the slots that `pop` returned before."""
        self._parts[slots.start, slots.stop] = state

    def joined(self) -> State:
        """Return the state of all slots; `None` if no slot has read anything."""
        state = self.pop(slice(0, self.num_slots))
        if state is not None:
            self.put(slice(0, self.num_slots), state)
        return state


@dataclass
class ProbeState:
    """The token-stage state of one head between two calls of `ProbeModel.step`; see `ProbeModel.init_state`.

    The groups of layers may differ from one chunk of the prompt to the next.

    Attributes:
        tokens: token-stage state of all segments together.
        segments: token-stage state of each segment, if the head judges segments and a row has several.
        means: sums for the mean states; `None` without novelty.
        summaries: `[slots, batch, width]` of slots that have read the last token.
        weights: how much each token counted, `[slots, batch, tokens]`, with `output_attentions`.
    """

    tokens: SlotStates
    segments: list[SlotStates]
    means: SlotStates | None
    summaries: SlotStates
    weights: SlotStates
    keep: bool
    output_attentions: bool

    def joined(self) -> State:
        """Return the states of tokens, segments and means; `None` if nothing has been read."""
        tokens = self.tokens.joined()
        if tokens is None:
            return None
        means = None if self.means is None else self.means.joined()
        return tokens, tuple(segment.joined() for segment in self.segments), means


def as_slice(places: Sequence[int]) -> slice | list[int]:
    """Return ascending indices as a slice if they are evenly spaced. A slice copies nothing."""
    step = places[1] - places[0] if len(places) > 1 else 1
    stop = places[-1] + 1
    is_even = list(range(places[0], stop, step)) == list(places)
    return slice(places[0], stop, step) if is_even else list(places)


def split_segments(numbers: torch.Tensor, move: Callable[[torch.Tensor], torch.Tensor]) -> Segments:
    """Return the tokens of each segment.

    Args:
        numbers (`[batch, tokens]`, on the CPU): from `number_segments`.
        move: copies a mask to the device of the head.
    """
    found = numbers[numbers > 0].unique().tolist()
    return {number: counted_columns(numbers == number, move) for number in found}


def counted_columns(mask: torch.Tensor, move: Callable[[torch.Tensor], torch.Tensor]) -> Columns:
    """Return the columns from the first to the last token that counts. If no token counts, return the first column.

    Args:
        mask (`[batch, tokens]` bool, on the CPU): true for the tokens that count.
        move: as in `split_segments`.
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
