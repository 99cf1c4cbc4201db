"""The token-stage state of a head while an LM runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .aggregator import State, join_slots, take_slots


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
        tokens: token-stage state.
        means: sums for the mean states; `None` without novelty.
        summaries: `[slots, batch, width]` of slots that have read the last token.
        weights: how much each token counted, `[slots, batch, tokens]`, if `output_attentions`.
    """

    tokens: SlotStates
    means: SlotStates | None
    summaries: SlotStates
    weights: SlotStates
    keep: bool
    output_attentions: bool

    def joined(self) -> State:
        """Return what all slots keep, as one; `None` if nothing has been read."""
        tokens = self.tokens.joined()
        return tokens if self.means is None or tokens is None else (tokens, self.means.joined())


def as_slice(places: Sequence[int]) -> slice | list[int]:
    """Return ascending indices as a slice if they are evenly spaced: it takes no copy."""
    step = places[1] - places[0] if len(places) > 1 else 1
    even = list(range(places[0], places[-1] + 1, step)) == list(places)
    return slice(places[0], places[-1] + 1, step) if even else list(places)
