"""Token-stage states of heads that follow replies, one a request, in tensors that are made before any request comes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..heads.aggregator import select_rows
from ..heads.probe import ProbeModel


def empty_state(head: ProbeModel, width: int) -> Any:
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

    @property
    def heads(self) -> list[str]:
        """Names of the heads."""
        return list(self._states)

    def get(self, name: str, slots: torch.Tensor) -> Any:
        """Return a copy of the states of a head in slots `[B]`: `[S, B, ...]`."""
        return select_rows(self._states[name], slots)

    def put(self, name: str, slots: torch.Tensor, state: Any) -> None:
        """Store the states `[S, B, ...]` of a head in slots `[B]`."""
        for kept, new in zip(_leaves(self._states[name]), _leaves(state), strict=True):
            kept.index_copy_(1, slots, new)

    def clear(self, slots: torch.Tensor) -> None:
        """Let all heads begin anew in slots `[B]`."""
        first = torch.zeros_like(slots)
        for name, empty in self._empty.items():
            self.put(name, slots, select_rows(empty, first))


def _leaves(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    else:
        for part in state or ():
            yield from _leaves(part)
