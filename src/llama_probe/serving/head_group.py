"""All heads that read a batch of prompts while a language model runs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..heads.decision import ProbeOutput
from .cache import ProbeState
from .short_pass import ShortPass
from .stack import HeadStack


if TYPE_CHECKING:
    from ..heads.probe import ProbeModel


def shape_of(head: ProbeModel) -> Hashable:
    """What heads must have in common to go through a `HeadStack` together."""
    config, stage = head.config, head.token_stage
    sizes = tuple((name, tuple(tensor.shape)) for name, tensor in stage.named_parameters())
    shape = (type(stage), sizes, config.pool, config.num_attention_heads, stage.causal, config.reads_reply)
    return (*shape, config.normalize, str(sorted(config.options.items())), tuple(head.layer_indices), head.device)


def alike(
    heads: Mapping[str, ProbeModel], masks: Mapping[str, torch.Tensor], running: Mapping[str, Any]
) -> list[list[str]]:
    """The names of the heads, those together that can go through one `HeadStack`, or one reader of a `CompiledPass`.

    Args:
        heads, masks, running: by name; the tokens that count, and what heads go on from. See `ProbeModel.init_state`.
    """
    compiling = torch.compiler.is_dynamo_compiling()
    found: list[tuple[Hashable, torch.Tensor, list[str]]] = []
    for name, head in heads.items():
        # What heads have kept may have come to each in other chunks: those go on alone.
        shape, mask = (shape_of(head), name if running.get(name) is not None else None), masks[name]
        for other, counted, names in found:
            if other == shape and (counted is mask or (not compiling and torch.equal(counted, mask))):
                names.append(name)
                break
        else:
            found.append((shape, mask, [name]))
    return [names for _, _, names in found]


class HeadGroup:
    """Feeds the states of a batch of prompts to heads, a layer at a time, in one chunk or several.

    Heads that are alike go through one `HeadStack`; stacks that normalise alike share the normalised states.

    Args:
        heads, masks, running: by name. For each head the tokens that count, `[prompts, prompt_tokens]`, and, where it has one,
            what it goes on from.
        past, output_attentions, keep: see `ProbeModel.init_state`.

    Attributes:
        layers: indices of the states that are read.

    Raises:
        ProbeError: a prompt that cannot be scored; see `ProbeModel.init_state`.
    """

    def __init__(
        self,
        heads: Mapping[str, ProbeModel],
        masks: Mapping[str, torch.Tensor],
        past: int = 0,
        running: Mapping[str, Any] | None = None,
        output_attentions: bool = False,
        keep: bool = False,
    ):
        running = running or {}
        self._names = list(heads)
        self._stacks: list[tuple[HeadStack, ProbeState]] = []
        self._places: dict[str, tuple[int, int]] = {}  # of each head: its stack, and its number in there
        for number, names in enumerate(alike(heads, masks, running)):
            stack = HeadStack([heads[name] for name in names])
            state = stack.init_state(masks[names[0]], past, output_attentions, running.get(names[0]), keep)
            self._stacks.append((stack, state))
            self._places |= {name: (number, place) for place, name in enumerate(names)}
        self._readers = self._readers_by_layer()
        self.layers = self._readers.keys()

    def _readers_by_layer(self) -> dict[int, list[list[tuple[HeadStack, ProbeState]]]]:
        """For each layer that is read the heads that read it; those that normalise its states alike stand together."""
        found: dict[int, dict[tuple[str | None, torch.device], list[tuple[HeadStack, ProbeState]]]] = {}
        for stack, state in self._stacks:
            for layer in stack.layer_indices:
                key = (stack.config.normalize, stack.device)
                found.setdefault(layer, {}).setdefault(key, []).append((stack, state))
        return {layer: list(together.values()) for layer, together in found.items()}

    def read(self, layer: int, hidden: torch.Tensor) -> None:
        """Takes in the states of one of `layers`, for the next chunk of the prompts.

        Args:
            layer: index of the state, 0 (embeddings) to L (after the final norm).
            hidden (`[prompts, n, hidden_size]`): of the next n tokens.
        """
        if torch.is_grad_enabled():  # the LM's own gradients, where it is being trained, are not the heads' business
            with torch.no_grad():
                return self.read(layer, hidden)
        for together in self._readers[layer]:
            shared = {}
            for stack, state in together:
                stack.step(state, layer, hidden, shared)
            del shared  # a normalised copy, where there is one
            for stack, state in together:
                stack.settle(state)

    def reader(self, prompts: int, columns: int) -> HeadGroup | ShortPass:
        """What has the `read` for a pass over so many prompts and columns of them, which comes next."""
        return ShortPass(self._stacks) if ShortPass.fits(self._stacks, prompts, columns) else self

    def check_whole(self) -> None:
        """Raises `ProbeError` where a layer has not seen the whole prompt."""
        for stack, state in self._stacks:
            stack.check_whole(state)

    @torch.no_grad()
    def results(self) -> dict[str, ProbeOutput]:
        """`ProbeOutput` of each head; with `keep`, none of one that has nothing to read so far in some prompt.

        Raises:
            ProbeError: a layer has not seen the whole prompt.
        """
        scored = [stack.finish(state) if state.mask.any(1).all() else None for stack, state in self._stacks]
        found = {name: scored[number] and scored[number][place] for name, (number, place) in self._places.items()}
        return {name: found[name] for name in self._names if found[name] is not None}

    def running(self, name: str) -> Any:
        """What a head goes on from behind the prompts; see `ProbeModel.begin_reply`. `None` where it does not read them."""
        if name not in self._places:
            return None
        number, place = self._places[name]
        stack, state = self._stacks[number]
        return stack.running(state, place)
