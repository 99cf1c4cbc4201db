"""`ProbeCache`: what heads keep of the tokens in an LM's KV cache, so that a longer prompt is scored from there."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import ProbeError
from ..heads.aggregator import State, select_rows
from ..heads.probe import ProbeModel


_NEEDS_IDS = "probe_state needs input_ids: later prompts are compared with them (not with inputs_embeds)"


@dataclass(frozen=True)
class CachedHead:
    """The token-stage state of one head for the tokens in a KV cache.

    Attributes:
        head, versions: the head that made `state`, and the versions of its weights; see `is_of`.
        mask (`torch.BoolTensor` of shape `[rows, tokens]`): tokens that count.
        state: token-stage state of all layers that the head reads; `None` where no token counts so far.
    """

    head: weakref.ref[ProbeModel]
    versions: list[tuple[int, int]]
    mask: torch.Tensor
    state: State

    @classmethod
    def create(cls, head: ProbeModel, mask: torch.Tensor, state: State) -> CachedHead:
        """Keep what a head has just read."""
        return cls(weakref.ref(head), _versions(head), mask, state)

    def is_of(self, head: ProbeModel) -> bool:
        """Return True if `head` is the one that made the state, with the same weights."""
        return self.head() is head and self.versions == _versions(head)


def _versions(head: ProbeModel) -> list[tuple[int, int]]:
    # Inference tensors have no version counter; they also cannot be modified in place.
    return [(id(p), -1 if p.is_inference() else p._version) for p in (*head.parameters(), *head.buffers())]


class ProbeCache:
    """The heads' states for the tokens in an LM's KV cache. With it, heads score a longer prompt as a whole from its new tokens.

    `generate` and `forward` return it as `probe_state` beside `cache`, and take both back. A call returns a new state and leaves the
    given one unchanged, so that one shared prefix serves any number of prompts. Each of these prompts needs a copy of the KV cache,
    which transformers changes in place. docs/how-it-works.md says how many numbers each head type keeps; novelty adds
    `hidden_size` numbers for up to three layers.

    Attributes:
        input_ids (`torch.LongTensor` of shape `[rows, tokens]`): the tokens that the LM has run over, on the CPU.
        attention_mask (`torch.BoolTensor` of shape `[rows, tokens]`): false for padding and after the end of a reply; on the CPU.
        heads: by name.
    """

    def __init__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, heads: Mapping[str, CachedHead]):
        self.input_ids, self.attention_mask, self.heads = input_ids, attention_mask, dict(heads)

    def get_seq_length(self) -> int:
        """Return the number of tokens, as the method of the KV cache does."""
        return self.input_ids.shape[1]

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.input_ids)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row in place, as `DynamicCache.batch_repeat_interleave` does."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor | Sequence[int]) -> None:
        """Keep the rows whose indices are given, in place, as `DynamicCache.batch_select_indices` does."""
        rows = torch.arange(self.batch_size, device="cpu")[torch.as_tensor(indices, device="cpu")]
        self.input_ids, self.attention_mask = self.input_ids[rows], self.attention_mask[rows]
        self.heads = {
            name: replace(kept, mask=kept.mask[rows], state=select_rows(kept.state, rows))
            for name, kept in self.heads.items()
        }

    def extended(self, tokens: torch.Tensor, token_mask: torch.Tensor, states: Mapping[str, State]) -> ProbeCache:
        """Return the state behind replies.

        Args:
            tokens (`[rows, reply_tokens]`): ids of the replies.
            token_mask (`[rows, reply_tokens]`): true for the tokens that count.
            states: by name, of the heads that have read the replies. Other heads keep their state.
        """
        heads = {}
        for name, kept in self.heads.items():
            read = token_mask if name in states else torch.zeros_like(token_mask)
            heads[name] = replace(kept, mask=torch.cat([kept.mask, read], 1), state=states.get(name, kept.state))
        ids, attended = torch.cat([self.input_ids, tokens], 1), torch.cat([self.attention_mask, token_mask], 1)
        return ProbeCache(ids, attended, heads)

    def followed_by(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `attention_mask` of whole prompts, `[rows, tokens]`: the tokens seen so far and new ones after them.

        Args:
            attention_mask (`[rows, tokens]`, *optional*): of the whole prompts. Needed if a token seen so far is padding.
        """
        self._check_rows(len(input_ids))
        if attention_mask is None:
            if not self.attention_mask.all():
                raise ProbeError("a part of the cached tokens is padding: pass attention_mask, of old and new tokens")
            new = torch.ones_like(input_ids, dtype=torch.bool)
            attention_mask = torch.cat([self.attention_mask.to(input_ids.device), new], dim=1)
        whole = torch.cat([self.input_ids.to(input_ids.device), input_ids], dim=1)
        return {"input_ids": whole, "attention_mask": attention_mask}

    def _check_rows(self, prompts: int) -> None:
        if prompts != self.batch_size:
            hint = "use batch_repeat_interleave or batch_select_indices of both cache and state"
            raise ProbeError(f"probe_state has {self.batch_size} rows, and {prompts} prompts are given: {hint}")

    def resume(
        self,
        heads: Mapping[str, ProbeModel],
        masks: Mapping[str, torch.Tensor],
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor,
        cached: int,
    ) -> dict[str, State]:
        """Return the state from which each head goes on, by name, for prompts that begin with the tokens seen so far.

        Args:
            heads: heads to resume. A head that is not in this state has seen nothing.
            masks: for each head the tokens of the whole prompts that count, `[prompts, prompt_tokens]`.
            input_ids, attention_mask (`[prompts, prompt_tokens]`): the whole prompts, on the CPU as the masks.
            cached: number of tokens in the KV cache.
        """
        seen = self.get_seq_length()
        if cached != seen:
            raise ProbeError(f"probe_state is of {seen} tokens, and the cache beside it holds {cached}")
        if input_ids is None:
            raise ProbeError(_NEEDS_IDS)
        self._check_rows(len(input_ids))
        if input_ids.shape[1] <= seen:
            hint = "pass all of the conversation, with at least one new token"
            raise ProbeError(f"the prompt has {input_ids.shape[1]} tokens, and probe_state has seen {seen}: {hint}")
        differing = ((input_ids[:, :seen] != self.input_ids) & self.attention_mask).any(dim=0).nonzero().flatten()
        if len(differing):
            first = f"the first that differs is number {int(differing[0])}: append to out.sequences"
            raise ProbeError(f"the prompt does not begin with the {seen} tokens that probe_state has seen; {first}")
        _same_tokens("attention_mask", attention_mask[:, :seen], self.attention_mask)
        states = {}
        for name, head in heads.items():
            if name not in self.heads:
                continue
            kept = self.heads[name]
            if not kept.is_of(head):
                raise ProbeError(f"probe_state was made by another head called {name!r}, or by other weights of it")
            wanted = masks[name][:, :seen]
            if head.config.token_scope == "last_user" and not bool(wanted.any()):
                continue  # all rows go on with another turn of the user
            _same_tokens(f"the tokens that {name!r} reads", wanted, kept.mask)
            states[name] = kept.state
        return states


def refuse_without_heads(probe_state: ProbeCache | bool | None) -> None:
    """Raise `ProbeError` if a state is given or asked for, and no head runs that could keep one."""
    if probe_state is not None and probe_state is not False:
        raise ProbeError("probe_state is the state of heads, and none is active: load_probe(...) first")


def asks_for_state(
    probe_state: ProbeCache | bool | None, input_ids: torch.Tensor | None, use_cache: bool | None
) -> bool:
    """Return True if a call with `probe_state=` returns a state: for `True`, and for a state to go on from."""
    if probe_state is None or probe_state is False:
        return False
    if probe_state is not True and not isinstance(probe_state, ProbeCache):
        raise ProbeError(f"probe_state is a {type(probe_state).__name__}; it must be True, or what a call returned")
    if use_cache is False:
        raise ProbeError("probe_state goes with a cache, and use_cache=False keeps none; leave one of them out")
    if input_ids is None:
        raise ProbeError(_NEEDS_IDS)
    return True


def _same_tokens(what: str, wanted: torch.Tensor, kept: torch.Tensor) -> None:
    differing = (wanted != kept).any(dim=0).nonzero().flatten()
    if len(differing):
        first = f"the first is number {int(differing[0])}"
        raise ProbeError(f"{what}: of the {kept.shape[1]} tokens that were seen other ones count now; {first}")
