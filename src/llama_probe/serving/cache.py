"""`ProbeCache`: what heads keep of the tokens in an LM's KV cache, so that a later call can go on from there."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import ProbeError
from ..heads import select_rows
from ..heads.probe import ProbeModel


class HeadReference(weakref.ref):
    """A weak reference to the head that made a state: copies of the state are of the same head, and no other process has it.

    Attributes:
        weights: of the head at that time, by what torch counts of their changes in place; no number of theirs is looked at.
    """

    def __init__(self, head: ProbeModel):
        super().__init__(head)
        self.weights = _versions(head)

    def is_of(self, head: ProbeModel) -> bool:
        """Return True if `head` is the one that made the state, with the same weights."""
        return self() is head and self.weights == _versions(head)

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadReference:
        return self

    def __reduce__(self):
        raise ProbeError(
            "probe_state cannot be pickled, nor can an output that holds one: it belongs to the heads that made it, in this "
            "process. Keep the tokens (probe_state.input_ids), and let model(..., use_cache=True) run over them anew; of an output "
            "keep the fields that are wanted"
        )


@dataclass(frozen=True)
class CachedHead:
    """The token-stage state of one head for the tokens in a KV cache.

    Attributes:
        head: the head; its weights made `state`.
        mask (`torch.BoolTensor` of shape `[rows, tokens]`): tokens that count.
        state: token-stage state of all layers that the head reads; `None` where no token counts so far.
    """

    head: HeadReference
    mask: torch.Tensor
    state: Any


class ProbeCache:
    """The heads' states for the tokens in an LM's KV cache: a prompt that goes on from there is scored as a whole.

    `generate` and `forward` return it as `probe_state` beside `cache`, and take both back. It is never changed by them: each
    call returns another one, and one shared prefix serves any number of prompts - of the cache, which transformers changes in
    place, each needs a copy.

    Per layer and row, in fp32: `pooling` and `gate` keep `hidden_size` numbers, `attentive` `2 num_queries + value_rank`,
    `multimax` `num_members * num_maxima`, `last` and `muli` the last state, and `mha` `3 hidden_size / downcast` numbers a
    token, because its tokens attend both ways (`2 hidden_size / downcast` where it is causal).

    Attributes:
        input_ids (`torch.LongTensor` of shape `[rows, tokens]`): the tokens that the LM has run over.
        attention_mask (`torch.BoolTensor` of shape `[rows, tokens]`): false for padding, and behind the end of a reply.
        heads: by name.
    """

    def __init__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, heads: Mapping[str, CachedHead]):
        self.input_ids, self.attention_mask, self.heads = input_ids, attention_mask, dict(heads)

    def get_seq_length(self) -> int:
        """Number of tokens, as that of the cache."""
        return self.input_ids.shape[1]

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.input_ids)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row in place, as `DynamicCache.batch_repeat_interleave` does."""
        rows = torch.arange(self.batch_size, device=self.input_ids.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows whose indices are given, in place, as `DynamicCache.batch_select_indices` does."""
        rows = torch.arange(self.batch_size, device=self.input_ids.device)[indices.to(self.input_ids.device)]
        self.input_ids, self.attention_mask = self.input_ids[rows], self.attention_mask[rows]
        self.heads = {
            name: replace(kept, mask=kept.mask[rows], state=select_rows(kept.state, rows))
            for name, kept in self.heads.items()
        }

    def __repr__(self) -> str:
        rows, tokens = self.input_ids.shape
        return f"ProbeCache({rows} rows of {tokens} tokens, heads: {', '.join(self.heads) or 'none'})"

    def check_length(self, cached: int) -> None:
        """Raises `ProbeError` where a cache of so many tokens is not the one that belongs to it."""
        if cached != self.get_seq_length():
            raise ProbeError(
                f"probe_state is of {self.get_seq_length()} tokens, and the cache beside it holds {cached}: pass both as one call "
                "returned them (cache=out.cache, probe_state=out.probe_state). Tokens cannot be taken out of a state: after "
                "cache.crop, or where a call without probe_state has added to the cache, start anew without both"
            )

    def followed_by(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole prompts, `[rows, tokens]`, and their mask: what was seen, and new tokens behind it.

        Args:
            input_ids (`[rows, new_tokens]`).
            attention_mask (`[rows, tokens]`, *optional*): of the whole; may be left out where nothing is padding so far.

        Raises:
            ProbeError: other rows, or the mask is needed.
        """
        self._check_rows(len(input_ids))
        if attention_mask is None:
            if not self.attention_mask.all():
                raise ProbeError(
                    "a part of the cached tokens is padding: pass attention_mask, of the cached tokens and the new ones"
                )
            new = torch.ones_like(input_ids, dtype=torch.bool)
            attention_mask = torch.cat([self.attention_mask.to(input_ids.device), new], dim=1)
        return torch.cat([self.input_ids.to(input_ids.device), input_ids], dim=1), attention_mask

    def _check_rows(self, prompts: int) -> None:
        if prompts != self.batch_size:
            raise ProbeError(
                f"probe_state has {self.batch_size} rows, and {prompts} prompts are given: repeat or select rows of the cache "
                "and of the state alike, with batch_repeat_interleave or batch_select_indices on copies of both"
            )

    def resume(
        self,
        heads: Mapping[str, ProbeModel],
        masks: Mapping[str, torch.Tensor],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> dict[str, Any]:
        """Return the state that each head goes on from, by name, for prompts that begin with the tokens it has seen.

        Args:
            heads: those that are to go on. Such as are not in the state have seen nothing.
            masks: for each of them the tokens of the whole prompts that count, `[prompts, prompt_tokens]`.
            input_ids, attention_mask (`[prompts, prompt_tokens]`): the whole prompts.

        Raises:
            ProbeError: they begin otherwise, other tokens of them count, or a head is not the one that made the state.
        """
        self._check_rows(len(input_ids))
        seen = self.get_seq_length()
        if input_ids.shape[1] <= seen:
            raise ProbeError(
                f"the prompt has {input_ids.shape[1]} tokens, and probe_state has seen {seen}: pass all input_ids of the "
                "conversation, with at least one new token behind those of earlier calls"
            )
        same = input_ids[:, :seen].to(self.input_ids.device) == self.input_ids
        differing = (~same & self.attention_mask).any(dim=0).nonzero().flatten()
        if len(differing):
            raise ProbeError(
                f"the prompt does not begin with the {seen} tokens that probe_state and the cache have seen; the first that "
                f"differs is number {int(differing[0])}, counted from 0. Text that was decoded and encoded again may give other "
                "tokens: append to out.sequences. Or start anew without cache and probe_state"
            )
        _same_tokens("attention_mask", attention_mask[:, :seen], self.attention_mask)
        states = {}
        for name, head in heads.items():
            kept = self.heads.get(name)
            if kept is None:
                continue
            if not kept.head.is_of(head):
                raise ProbeError(
                    f"probe_state was made by another head called {name!r} than the one that is attached now, or by other weights "
                    "of it; start anew without cache and probe_state"
                )
            wanted = masks[name][:, :seen]
            if head.config.token_scope == "last_user" and not bool(wanted.any()):
                continue  # all rows go on with another turn of the user
            _same_tokens(f"the tokens that {name!r} reads", wanted, kept.mask)
            states[name] = kept.state
        return states


def refuse_without_heads(probe_state: ProbeCache | bool | None) -> None:
    """Raises `ProbeError` where a state is given or asked for, and no head runs that could keep one."""
    if probe_state is not None and probe_state is not False:
        raise ProbeError(
            "probe_state is what heads keep, and none is active: load_probe(...) or set_active_probes([...]) first, or leave "
            "probe_state out"
        )


def asks_for_state(
    probe_state: ProbeCache | bool | None, input_ids: torch.Tensor | None, use_cache: bool | None
) -> bool:
    """Return True if `probe_state=` asks for a state in return: it is `True`, or a state to go on from.

    Raises:
        ProbeError: it is something else, or a state cannot be kept.
    """
    if probe_state is None or probe_state is False:
        return False
    if probe_state is not True and not isinstance(probe_state, ProbeCache):
        raise ProbeError(
            f"probe_state is a {type(probe_state).__name__}; it must be True, or what an earlier call returned as probe_state"
        )
    if use_cache is False:
        raise ProbeError("probe_state goes with a cache, and use_cache=False keeps none; leave one of them out")
    if input_ids is None:
        raise ProbeError("probe_state needs input_ids: later prompts are compared with them (not with inputs_embeds)")
    return True


def _versions(head: ProbeModel) -> list[tuple[int, int]]:
    # What was made in inference mode is not counted, and not changed outside of it either.
    return [(id(p), -1 if p.is_inference() else p._version) for p in head.parameters()]


def _same_tokens(what: str, wanted: torch.Tensor, kept: torch.Tensor) -> None:
    differing = (wanted.to(kept.device).bool() != kept).any(dim=0).nonzero().flatten()
    if len(differing):
        raise ProbeError(
            f"{what}: of the {kept.shape[1]} tokens that the cache holds other ones count now than when probe_state was made; "
            f"the first is number {int(differing[0])}, counted from 0. All tokens of an earlier reply count, up to the "
            "one that ends it, and no padding behind that. What was summed up cannot be taken apart: start anew without "
            "cache and probe_state"
        )
