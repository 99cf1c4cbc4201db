"""The pass over whole prompts of few tokens, where it is the calls that heads cost, and what lies between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..errors import ProbeError
from ..heads import normalize, without_autocast
from .cache import ProbeState
from .stack import HeadStack, is_few


class ShortPass:
    """Hands the states of one forward pass over whole prompts to stacks of heads.

    Whatever comes first after a layer of the LM finds the processor's caches full of that layer's weights, the interpreter
    itself as well. So all that can be is looked up before the pass.

    Args:
        stacks: with what they hold of the prompts; see `fits`.
    """

    def __init__(self, stacks: Sequence[tuple[HeadStack, ProbeState]]):
        self._stacks = stacks
        self.device = stacks[0][0].device
        self._columns = stacks[0][1].mask.shape[1]
        self._readers: dict[int, list[tuple[str | None, torch.device, list[Callable[[torch.Tensor], None]]]]] = {}

    @staticmethod
    def fits(stacks: Sequence[tuple[HeadStack, ProbeState]], prompts: int, columns: int) -> bool:
        """Whether a pass over so many prompts and columns is one, and nothing but scores is wanted of it."""
        return (
            bool(stacks)
            and is_few(prompts * columns)
            and all(
                state.is_fresh and columns == state.mask.shape[1] and not (state.keep or state.output_attentions)
                for _, state in stacks
            )
        )

    @without_autocast
    def read(self, layer: int, hidden: torch.Tensor) -> None:
        """Takes in the states of one layer, `[prompts, prompt_tokens, hidden_size]`.

        Raises:
            ProbeError: they are those of a part of the prompts.
        """
        if torch.is_grad_enabled():  # as in `HeadGroup.read`
            with torch.no_grad():
                return self.read(layer, hidden)
        if hidden.shape[1] != self._columns:
            raise ProbeError(
                f"layer {layer} has seen {hidden.shape[1]} of {self._columns} prompt tokens; a part of a prompt is not scored"
            )
        if not self._readers:
            self._look_up(hidden.itemsize)
        for kind, device, readers in self._readers[layer]:
            if hidden.dtype != torch.float32 or hidden.device != device:
                hidden = hidden.to(device, torch.float32)
            x = normalize(hidden, kind)
            for reader in readers:
                reader(x)

    def _look_up(self, itemsize: int) -> None:
        found: dict[int, dict[tuple[str | None, torch.device], list[Callable[[torch.Tensor], None]]]] = {}
        for stack, state in self._stacks:
            for layer, reader in stack.readers(state, itemsize).items():
                found.setdefault(layer, {}).setdefault((stack.config.normalize, stack.device), []).append(reader)
        self._readers = {
            layer: [(kind, device, readers) for (kind, device), readers in together.items()]
            for layer, together in found.items()
        }
