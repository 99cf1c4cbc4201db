"""The one way of a hidden state from the LM to a head: held until a group of layers is full, then read at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..backbone.capture import check_seen
from ..errors import ProbeError
from ..heads.decision import ProbeOutput
from ..heads.device import device_type
from ..heads.probe import ProbeModel
from ..heads.stream import ProbeState


_MIB = 1 << 20
# Layers of a group, if not all go together.
_GROUPS = (16, 8, 4, 2)


def state_budget(device: torch.device) -> int:
    """Return the bytes that a reader may hold of an LM's states on a device, copies included.

    On an accelerator each operation is a kernel launch: few large groups are fastest. On a CPU a group must fit the cache.
    """
    return 4 * _MIB if device_type(device) == "cpu" else 128 * _MIB


class StateReader:
    """Feed the hidden states of a running LM to its heads, a group of layers at a time.

    A forward pass over n further tokens is: `begin(token_masks)`, `on_state(layer, hidden)` for each state by a hook, in the
    order of the layers, and `end()`.

    Args:
        heads: the heads, by name.
        states: token-stage states to resume, by head name; see `ProbeState.joined`. Other heads start anew.
        keep: names of the heads whose state is kept after the last token.
        output_attentions: also give token and layer weights.
        differentiable: the results have gradients, to the heads and to the LM.

    Attributes:
        layers: indices of the states that are read.
    """

    def __init__(
        self,
        heads: Mapping[str, ProbeModel],
        states: Mapping[str, Any] | None = None,
        keep: Collection[str] = (),
        output_attentions: bool = False,
        differentiable: bool = False,
    ):
        self.heads = dict(heads)
        self.layers = frozenset(layer for head in self.heads.values() for layer in head.layer_indices)
        for name, head in self.heads.items():
            if head.device.type == "meta":
                raise ProbeError(f"head {name!r} has no weights: offload the LM (accelerate) before heads come")
        self.states: dict[str, ProbeState] = {
            name: head.init_state((states or {}).get(name), name in keep, output_attentions, differentiable)
            for name, head in self.heads.items()
        }
        self._whole, self._differentiable = output_attentions, differentiable
        self._masks: dict[str, torch.Tensor | None] = {}
        self._rows, self._columns = slice(None), slice(None)
        self._last = True
        self._seen: set[int] = set()
        self._held: list[tuple[int, torch.Tensor]] = []
        self._group = 1

    def begin(self, token_masks: Mapping[str, torch.Tensor], last: bool = True, repeats: int = 1) -> None:
        """Announce a forward pass over n further tokens.

        Args:
            token_masks: for each head the tokens that count, `[batch, n]` bool. The LM may run over further columns. Masks on the
                CPU are looked at: columns that no head reads are left out.
            last: no token that counts follows.
            repeats: rows of the LM for each row of the masks: beams or return sequences, which begin alike.
        """
        self._seen, self._held, self._last = set(), [], last
        width = next(iter(token_masks.values())).shape[1] if token_masks else 0
        self._rows, self._columns = slice(None, None, repeats), slice(0, width)
        self._masks = dict(token_masks)
        if width > 1 and not self._whole:
            self._trim()
        for name, mask in self._masks.items():
            self._masks[name] = None if mask is None else mask.to(self.heads[name].device, non_blocking=True)

    def _trim(self) -> None:
        """Leave out the tokens before the first, and behind the last, that counts for any head."""
        distinct = {id(mask): mask for mask in self._masks.values()}  # heads of one scope share a tensor
        if all(bool(mask.all()) for mask in distinct.values()):
            self._masks = dict.fromkeys(self._masks)
            return
        counted = [column for mask in distinct.values() for column in mask.any(dim=0).nonzero().flatten().tolist()]
        self._columns = slice(min(counted), max(counted) + 1) if counted else slice(0, 0)
        cut = {key: mask[:, self._columns] for key, mask in distinct.items()}
        cut = {key: None if bool(mask.all()) else mask for key, mask in cut.items()}
        self._masks = {name: cut[id(mask)] for name, mask in self._masks.items()}

    def on_state(self, layer: int, hidden: torch.Tensor) -> None:
        """Take a state `[rows, columns, hidden_size]` of the announced pass. It must not change afterwards."""
        if layer not in self.layers:
            return
        # The LM's weights have just gone through the cache: here each further operation of Python takes 10 times as long.
        if not self._held:
            # At most two of these are there at once, in fp32: the states and their stack, or the stack and its normalised copy.
            size, budget = 2 * 4 * hidden[self._rows, self._columns].numel(), state_budget(hidden.device)
            self._group = next((group for group in (len(self.layers), *_GROUPS) if group * size <= budget), 1)
        self._held.append((layer, hidden))
        if len(self._held) >= self._group:
            self._flush()

    def end(self) -> None:
        """Read what is held at the end of a pass."""
        check_seen(self.layers, self._seen.union(layer for layer, _ in self._held))
        self._flush()

    def _flush(self) -> None:
        while self._held:
            layers, x = self._stack()
            if not x.shape[2]:
                continue
            with torch.set_grad_enabled(self._differentiable):
                prepared: dict[Any, torch.Tensor] = {}  # heads that normalise alike share the result
                inputs = {}
                for name, head in self.heads.items():
                    key = head.input_format(x)
                    if key not in prepared:
                        prepared[key] = head.prepare(x)
                    inputs[name] = prepared[key]
                del x
                for name, head in self.heads.items():
                    head.step(self.states[name], layers, inputs[name], self._masks[name], self._last)

    def _stack(self) -> tuple[tuple[int, ...], torch.Tensor]:
        """Return the first layers that are held on one device, and their states `[S, rows, n, hidden_size]`. Hold the others."""
        kinds = [(hidden.device, hidden.dtype) for _, hidden in self._held]
        count = next((place for place, kind in enumerate(kinds) if kind != kinds[0]), len(kinds))
        group, self._held = self._held[:count], self._held[count:]
        if short := [hidden.shape[1] for _, hidden in group if hidden.shape[1] < self._columns.stop]:
            raise ProbeError(f"a state has {short[0]} tokens of {self._columns.stop}: no part is scored")
        layers, states = zip(*((layer, hidden[self._rows, self._columns]) for layer, hidden in group), strict=True)
        self._seen.update(layers)
        return layers, states[0].unsqueeze(0) if len(states) == 1 else torch.stack(states)

    def results(self, names: Collection[str] | None = None) -> dict[str, ProbeOutput]:
        """Score what was read: a `ProbeOutput` of each head, or of those in `names`."""
        names = self.heads if names is None else names
        return {name: head.finish(self.states[name]) for name, head in self.heads.items() if name in names}
