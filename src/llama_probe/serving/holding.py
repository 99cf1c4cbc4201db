"""States of short prompts wait for each other while a language model runs, so that heads read several layers in turn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import Cache

from ..backbone.cache import CacheGrowth, size_in_bytes


# Where a pass has no more numbers a layer than these, states wait: at least this share of all layers, and at most that, as long
# as the LM's own cache has not taken the memory.
_FEW, _LEAST_SHARE, _MOST_SHARE = 1 << 17, 0.035, 0.35
# So many states at least are as large as what a layer makes on its way to one, and has freed when that is there.
_OF_A_LAYER = 3


class HeldStates:
    """Hands the states of one forward pass on to heads, in their order.

    Whatever comes first after a layer of the LM finds the processor's caches full of that layer's weights, and is slow: where
    there are few tokens that is what heads cost. Several layers in turn cost it once. What this takes is memory that the LM will
    need later: its peak comes when its cache is full.

    Args:
        read: takes the index of a state and the state, `[prompts, n, hidden_size]`; or with `together` the indices of several,
            and these in one tensor, `[S, prompts, n, hidden_size]`.
        numbers: of a state in this pass: rows x tokens x hidden_size.
        num_states: how many states there are, L+1.
        cache: of the LM, in this pass.
        together: see `read`.
    """

    def __init__(
        self, read: Callable[..., None], numbers: int, num_states: int, cache: Cache | None, together: bool = False
    ):
        self._read, self._together, self._growth = read, together, CacheGrowth(cache)
        few = numbers <= _FEW
        self._least, self._most = (int(share * num_states) * few for share in (_LEAST_SHARE, _MOST_SHARE))
        self._held: list[tuple[int, torch.Tensor]] = []

    def add(self, layer: int, hidden: torch.Tensor) -> None:
        """Takes the state of one layer, `[prompts, n, hidden_size]`, and has heads read what is due."""
        if self._held and (hidden.device, hidden.dtype) != (self._held[-1][1].device, self._held[-1][1].dtype):
            self.read()
        self._held.append((layer, hidden))
        if len(self._held) > self._least and len(self._held) > min(self._most, self._room(hidden)):
            self.read()

    def read(self) -> None:
        """Has heads read all that waits."""
        if not self._together:
            while self._held:
                self._read(*self._held.pop(0))
            return
        with torch.no_grad():  # of the LM's gradients, where it is being trained; as a decorator it cannot be traced
            while self._held:
                at_once = max(1, int(self._room(self._held[0][1], _OF_A_LAYER)))
                layers, states = zip(*self._held[:at_once], strict=True)
                del self._held[:at_once]
                hidden = states[0].unsqueeze(0) if len(states) == 1 else torch.stack(states)
                del states
                self._read(layers, hidden)

    def _room(self, hidden: torch.Tensor, more: int = 0) -> float:
        """How many states like this one fit, in the copies that reading them takes, where the cache and `more` states will."""
        states = self._least + more + self._growth.bytes_to_come() / size_in_bytes(hidden)
        if not self._together:
            return states
        # Of half precision: as they are, normalised, and on the way to fp32 and there.
        return states / (2 if hidden.dtype == torch.float32 else 2 + 8 / hidden.itemsize)
