"""The pass over whole prompts as `torch.compile` traces it: heads are a part of the LM's graph.

What heads do otherwise while the LM runs - to wait for each other, to look at the values of a mask, to raise an error over them -
would break it. Here they read the layers as these run, by operations that the compiler puts together with those of the LM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..backbone.capture import check_seen, find_decoder, handing_states_to, stay_in_layers
from ..heads import normalize, without_autocast
from ..heads.scope import prompt_masks, tokens_read
from .cache import cached_tokens, given_cache
from .head_group import alike
from .holding import HeldStates
from .stack import layers_at_once, reading_dtype


if TYPE_CHECKING:
    from torch import nn
    from transformers import Cache

    from ..heads.probe import ProbeModel
    from .session import PrefillSession


class CompiledPass:
    """Feeds the states of one pass over whole prompts to heads.

    Args:
        heads, masks: by name; of each head the tokens that count, `[prompts, prompt_tokens]`.
        rows: that the LM runs over: beams and return sequences repeat each prompt.
        cache: of the LM; see `HeldStates`.
    """

    def __init__(
        self, heads: Mapping[str, ProbeModel], masks: Mapping[str, torch.Tensor], rows: int, cache: Cache | None
    ):
        prompts, tokens = next(iter(masks.values())).shape
        self._repeats = rows // prompts
        self._names = list(heads)
        together = alike(heads, masks, {})
        self._readers = [_Reader({name: heads[name] for name in names}, masks[names[0]]) for names in together]
        config = next(iter(heads.values())).config
        numbers = rows * tokens * config.hidden_size
        self._held = HeldStates(self.read, numbers, config.num_hidden_layers + 1, cache, together=True)

    def reading(self):
        """Inside the block the LM runs; once only."""
        return handing_states_to(self)

    def on_state(self, layer: int, hidden: torch.Tensor) -> None:
        """Takes the states of one layer, `[rows, prompt_tokens, hidden_size]`."""
        self._held.add(layer, hidden[:: self._repeats])

    def read(self, layers: Sequence[int], hidden: torch.Tensor) -> None:
        """Has all heads read the states of some layers, `[S, prompts, prompt_tokens, hidden_size]`."""
        for reader in self._readers:
            reader.read(layers, hidden)

    def logits(self) -> dict[str, torch.Tensor]:
        """`[prompts, num_labels]` a head; NaN for a prompt of which no token counts.

        Raises:
            ProbeError: not all states came by.
        """
        with torch.no_grad():  # as a decorator it breaks the graph
            self._held.read()
            logits = {}
            for reader in self._readers:
                logits |= reader.logits()
            return {name: logits[name] for name in self._names}


class _Reader:
    """Heads that are `alike`, by name, and the tokens that count for them."""

    def __init__(self, heads: Mapping[str, ProbeModel], mask: torch.Tensor):
        self._heads = heads
        self._first = first = next(iter(heads.values()))
        self.device = first.device
        self._stages = [head.token_stage for head in heads.values()]
        self._mask = tokens_read(first.config, mask.bool()).to(self.device)
        self._seen: list[int] = []
        self._waiting: list[torch.Tensor] = []  # [H, S, B, n, rank] each
        self._summaries: list[torch.Tensor] = []  # [H, S, B, ...] each; of a kind of low rank what `expand` takes

    @without_autocast
    def read(self, layers: Sequence[int], hidden: torch.Tensor) -> None:
        """See `CompiledPass.read`."""
        wanted, config, stages = self._first.layer_indices, self._first.config, self._stages
        places = [place for place, layer in enumerate(layers) if layer in wanted]
        if not places:
            return
        hidden = hidden if len(places) == len(layers) else hidden[places]
        dtype = reading_dtype(stages[0], config, hidden)
        x = normalize(hidden.to(device=self.device, dtype=dtype), config.normalize)
        slots = slice(len(self._seen), len(self._seen) + len(places))
        self._seen += [layers[place] for place in places]
        if stages[0].rank is None:
            self._summaries.append(_in_place(torch.stack([stage(x, self._mask, slots) for stage in stages])))
            return
        self._waiting.append(_in_place(torch.stack([stage.project(x, slots) for stage in stages])))
        waiting = sum(projected.shape[1] for projected in self._waiting)
        if waiting >= layers_at_once(list(self._heads.values()), hidden.itemsize, self._waiting[0].itemsize):
            self._advance()

    def _advance(self) -> None:
        """Goes on with the layers that wait."""
        projected = torch.cat(self._waiting, dim=1)
        stage, sizes = self._stages[0], projected.shape[:2]
        pooled = stage.pooled(stage.absorb(None, projected.flatten(0, 1), self._mask))
        self._summaries.append(_in_place(pooled.unflatten(0, sizes)))
        self._waiting.clear()

    @without_autocast
    def logits(self) -> dict[str, torch.Tensor]:
        """By name; see `CompiledPass.logits`."""
        check_seen(self._first.layer_indices, self._seen)
        if self._waiting:
            self._advance()
        logits, blank = {}, ~self._mask.any(dim=1, keepdim=True)
        for (name, head), summaries in zip(self._heads.items(), torch.cat(self._summaries, dim=1), strict=True):
            if head.token_stage.rank is not None:
                summaries = head.token_stage.expand(summaries, slice(None))
            logits[name] = head.score_summaries(summaries).logits.masked_fill(blank, float("nan"))
        return logits


def _in_place(made: torch.Tensor) -> torch.Tensor:
    """What heads have made of some layers, `[H, ...]`, at the place in the graph where they have made it.

    The compiler moves operations to where their results are used (inductor's `reorder_for_locality`): behind the LM, and the
    states of all layers would be kept until then. It leaves alone what becomes a tuple.
    """
    return torch.stack(made.unbind())


def compiled_pass(
    lm: nn.Module,
    heads: Mapping[str, ProbeModel],
    session: PrefillSession | None,
    inputs: dict[str, Any],
    probe_mask: torch.Tensor | None,
) -> CompiledPass | None:
    """How heads read the pass of `lm` over `inputs` that `torch.compile` is tracing.

    Args:
        heads: of the call. session: of a `generate()`, which has made their masks.
        probe_mask: see `prompt_masks`.

    Returns:
        `None` where this pass is not over whole prompts, or more than their scores is asked for.
    """
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if session is None:
        if (ids is None and embeds is None) or cached_tokens(inputs):
            return None
        masks = prompt_masks(
            heads, ids, embeds, inputs.get("attention_mask"), probe_mask, placeholder_ids=_placeholder_ids(lm)
        )
    else:
        masks = session.masks
    rows, columns = (embeds if ids is None else ids).shape[:2]
    if session is not None and not session.takes_whole(rows, columns):
        return None
    return CompiledPass(heads, masks, rows, given_cache(inputs)) if stay_in_layers(lm) else None


@torch.compiler.assume_constant_result
def _placeholder_ids(lm: nn.Module) -> tuple[int, ...]:
    return find_decoder(lm).placeholder_ids
