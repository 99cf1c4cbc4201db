"""The token-stage state of a head while an LM runs."""

from __future__ import annotations

from typing import Any

import torch

from .aggregator import join_slots, repeat_rows, take_slots


class ProbeState:
    """Hold the token-stage state of one head between two calls of `ProbeModel.step`.

    Groups of layers may differ from one chunk of the prompt to the next; each group's state is cut and joined as needed.

    Args:
        num_slots: number of layers that the head reads, S.
        state: token-stage state of all slots, as `joined` returned it, to go on from.
        keep: keep the token-stage state after the last token, so that further tokens can follow.
        output_attentions: keep how much each token counted.
    """

    def __init__(self, num_slots: int, state: Any = None, keep: bool = False, output_attentions: bool = False):
        self.num_slots = num_slots
        self.keep, self.output_attentions = keep, output_attentions
        self._weights: dict[int, torch.Tensor | None] = {}
        self._parts: dict[tuple[int, int], Any] = {} if state is None else {(0, num_slots): state}
        self._summaries: dict[int, torch.Tensor] = {}

    def pop(self, slots: slice) -> Any:
        """Remove and return the state of consecutive slots; `None` if they have read nothing."""
        found = []
        for first, stop in sorted(self._parts):
            if stop <= slots.start or slots.stop <= first:
                continue
            part = self._parts.pop((first, stop))
            for low, high in ((first, slots.start), (slots.stop, stop)):
                if low < high:
                    self._parts[low, high] = take_slots(part, slice(low - first, high - first))
            found.append(take_slots(part, slice(max(first, slots.start) - first, min(stop, slots.stop) - first)))
        return join_slots(found) if found else None

    def put(self, slots: slice, state: Any) -> None:
        """Store the state of the slots that `pop` returned before."""
        self._parts[slots.start, slots.stop] = state

    def put_summary(self, slots: slice, summary: torch.Tensor) -> None:
        """Store the summaries `[slots, batch, width]` of slots that have read the last token."""
        if torch.compiler.is_dynamo_compiling():
            # Inductor moves an operation to where its result is used (`reorder_for_locality`), here behind the LM, and would keep
            # the states of all layers until then. It leaves what becomes a tuple in its place.
            summary = torch.stack(summary.unbind())
        self._summaries[slots.start] = summary

    def joined(self) -> Any:
        """Return the token-stage state of all slots, as one; `None` if nothing has been read."""
        state = self.pop(slice(0, self.num_slots))
        if state is not None:
            self.put(slice(0, self.num_slots), state)
        return state

    def summaries(self) -> torch.Tensor | None:
        """Return the stored summaries `[slots, batch, width]`, in the order of the slots; `None` if there are none."""
        parts = [self._summaries[first] for first in sorted(self._summaries)]
        return join_slots(parts) if parts else None

    def put_weights(self, slots: slice, weights: torch.Tensor | None) -> None:
        """Store how much each token counted, `[slots, batch, tokens]`; `None` if the kind does not say."""
        self._weights[slots.start] = weights

    def weights(self) -> torch.Tensor | None:
        """Return the stored weights of all slots, `[batch, num_slots, tokens]`; `None` if there are none."""
        parts = [self._weights[first] for first in sorted(self._weights)]
        return torch.cat(parts).transpose(0, 1) if parts and parts[0] is not None else None

    def repeated(self, repeats: int) -> ProbeState:
        """Return a state in which each row stands `repeats` times, one after the other. Needs `keep`."""
        return ProbeState(self.num_slots, repeat_rows(self.joined(), repeats), self.keep)
