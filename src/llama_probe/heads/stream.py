"""The state of a head's token stage while an LM runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .aggregator import State, join_slots, take_slots
from .segments import Segments


# Some columns of a batch, and a mask of the tokens in them that count, `[batch, n]` bool; `None` if all count.
Columns = tuple[slice, torch.Tensor | None]


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


# Of each row the strongest segment that has ended: its logits `[1, batch, num_labels]`, spans `[1, batch, num_labels, 2]` (`None` without
# windows), and if there is one, `[1, batch]` bool (`None` if there is one in each row).
Strongest = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


@dataclass
class ProbeState:
    """The token-stage state of one head between two calls of `ProbeModel.step`; see `ProbeModel.init_state`.

    The groups of layers may differ from one chunk of the prompt to the next.

    Attributes:
        tokens: token-stage state of all tokens. A head with windows has it only if each row is one window.
        summaries: `[slots, batch, width]` of slots that have read the last token.
        segments: segments of the pass that is being read, or was read last; `None` if it was given none.
        open: token-stage state of segments that later tokens may join: of the first of each row, and of the second.
        next_open: those of the slots that have read the pass.
        ended: `[slots, segments, width]`, summaries of the segments that ended in the pass.
        strongest: of the segments that ended in earlier passes; `None` if none has.
        means: sums for the mean states; `None` without novelty.
        weights: how much each token counted, `[slots, batch, tokens]`, with `output_attentions`. Of windows `[slots, segments, window]`.
    """

    tokens: SlotStates
    summaries: SlotStates
    segments: Segments | None
    open: list[SlotStates]
    next_open: list[SlotStates]
    ended: SlotStates
    strongest: Strongest | None
    means: SlotStates | None
    weights: SlotStates
    keep: bool
    output_attentions: bool

    @classmethod
    def create(cls, slots: int, mean_slots: int, state: State, keep: bool, output_attentions: bool) -> ProbeState:
        """Go on from the result of `joined`, or start if it is `None`. `mean_slots` is 0 without novelty."""
        tokens, open_segments, strongest, means = (None, (), None, None) if state is None else state
        return cls(
            tokens=SlotStates(slots, tokens),
            summaries=SlotStates(slots),
            segments=None,
            open=[SlotStates(slots, segment) for segment in open_segments],
            next_open=[],
            ended=SlotStates(slots),
            strongest=strongest,
            means=SlotStates(mean_slots, means) if mean_slots else None,
            weights=SlotStates(slots),
            keep=keep,
            output_attentions=output_attentions,
        )

    def joined(self) -> State:
        """Return what has been read of tokens, open segments, the strongest segment and means; `None` if nothing has been read."""
        tokens = self.tokens.joined()
        open_segments = tuple(segment.joined() for segment in self.open)
        if tokens is None and not open_segments and self.strongest is None:
            return None
        means = None if self.means is None else self.means.joined()
        return tokens, open_segments, self.strongest, means


def as_slice(places: Sequence[int]) -> slice | list[int]:
    """Return ascending indices as a slice if they are evenly spaced. A slice copies nothing."""
    step = places[1] - places[0] if len(places) > 1 else 1
    stop = places[-1] + 1
    is_even = list(range(places[0], stop, step)) == list(places)
    return slice(places[0], stop, step) if is_even else list(places)


def counted_columns(mask: torch.Tensor, move: Callable[[torch.Tensor], torch.Tensor]) -> Columns:
    """Return the columns from the first to the last token that counts. If no token counts, return the first column.

    Args:
        mask (`[batch, tokens]` bool, on the CPU): true for the tokens that count.
        move: copies a mask to the device of the head.
    """
    places = mask.any(dim=0).nonzero().flatten().tolist() or [0]
    columns = slice(places[0], places[-1] + 1)
    mask = mask[:, columns]
    return columns, None if bool(mask.all()) else move(mask)
