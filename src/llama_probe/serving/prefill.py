"""The pass over the prompts: heads read it, score it, and keep a state of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ..backbone.cache import cached_tokens
from ..backbone.capture import capturing, stay_in_layers
from ..backbone.decoder import Decoder, find_decoder
from ..errors import ProbeError
from ..heads import repeat_rows
from ..heads.decision import ProbeOutput
from ..heads.novelty import MeanStates
from ..heads.probe import ProbeModel
from ..heads.scope import check_rows, prompt_masks, read_masks
from .cache import CachedHead, HeadReference, ProbeCache
from .reader import StateReader


# Decorated here: the decorator imports the compiler, which `backbone` and the start of a command do without.
_stay_in_layers = torch.compiler.assume_constant_result(stay_in_layers)


class PrefillSession:
    """Read one batch of prompts with the heads while the LM runs over it, in one or more forward passes.

    Args:
        heads: the heads that read along, by name.
        decoder: the LM's decoder; not needed without heads.
        inputs: whole prompts: `input_ids` or `inputs_embeds`, and `attention_mask`. Empty if nothing is to be read.
        probe_mask: true for the tokens that count, in place of the heads' own `token_scope`.
        past: leading prompt tokens that the KV cache holds already.
        earlier: what the heads keep of these tokens.
        return_state: keep the heads' states, for `probe_cache`.
        partial_prompt: the prompts may go on. Heads that have nothing to read yet, in some row, give no result.
        output_attentions: also give token and layer weights.
        differentiable: the results have gradients, to the heads and to the LM.

    Attributes:
        on_complete: called with the results, once, at the end of the pass that completes the prompt.
        reply: reads the passes after that; `None` if no head does.
        cache: the LM's KV cache. Set after each forward pass.

    Raises:
        ProbeError: a prompt cannot be scored.
    """

    def __init__(
        self,
        heads: dict[str, ProbeModel],
        decoder: Decoder | None,
        inputs: Mapping[str, Any],
        probe_mask: torch.Tensor | None = None,
        *,
        past: int = 0,
        earlier: ProbeCache | None = None,
        return_state: bool = False,
        partial_prompt: bool = False,
        output_attentions: bool = False,
        differentiable: bool = False,
    ):
        ids, embeds, attention_mask = map(inputs.get, ("input_ids", "inputs_embeds", "attention_mask"))
        configs, masks = {name: head.config for name, head in heads.items()}, {}
        self.prompts = self.length = 0
        if heads or inputs:
            given = (ids, embeds, attention_mask, probe_mask, partial_prompt)
            masks = prompt_masks(configs, *given, decoder.placeholder_ids, past)
            self.prompts, self.length = (embeds if ids is None else ids).shape[:2]
        self.heads, self.decoder, self.masks = heads, decoder, masks
        self.input_ids, self.attention_mask = ids, attention_mask
        self.seen = past
        self.return_state, self._partial_prompt = return_state, partial_prompt
        self.cache: Cache | None = None
        states = {}
        if earlier is not None:
            states = earlier.resume(heads, masks, ids, self._attended(), past)
        if not partial_prompt:
            for mask in {id(mask): mask for mask in masks.values()}.values():
                check_rows(mask)
        self._read_masks = read_masks(configs, masks)
        for name, mask in self._read_masks.items():
            if name not in states and past and bool(mask[:, :past].any()):
                hint = "pass probe_state= of the call that filled it, or the whole prompt without a cache"
                raise ProbeError(f"the cache holds {past} tokens, and head {name!r} has not read them: {hint}")
        keep = [name for name, head in heads.items() if return_state or head.config.reads_reply]
        self._reader = StateReader(heads, states, keep, output_attentions, differentiable)
        self._taken: dict[str, ProbeOutput] | None = None
        self.on_complete: Callable[[dict[str, ProbeOutput]], Any] | None = None
        self.reply: Any = None  # a ReplySession, which knows this class

    @property
    def complete(self) -> bool:
        """True if the LM has run over the whole prompt. Later passes are plain ones, or those of `reply`."""
        return self.seen >= self.length

    @property
    def next_reader(self) -> Any:
        """The reader of the next pass: `self`, `reply`, or `False` for none."""
        return (self.reply or False) if self.complete else self

    @contextmanager
    def reading(self, inputs: dict[str, Any]):
        """Read the states of one forward pass of the LM, which is about to run over `inputs`. Yield its arguments.

        Raises:
            ProbeError: the pass is not over the next tokens of the prompts, or some layer did not run over all of them.
        """
        repeats, width = self._expect(inputs)
        stop = self.seen + width
        cut = {id(mask): mask[:, self.seen : stop] for mask in self._read_masks.values()}
        masks = {name: cut[id(mask)] for name, mask in self._read_masks.items()}
        self._reader.begin(masks, last=stop >= self.length, repeats=repeats)
        with capturing(self.decoder, self._reader.on_state, self._reader.layers):
            yield self.decoder.whole(inputs)
        self._reader.end()
        self._advance(stop)

    def _expect(self, inputs: dict[str, Any]) -> tuple[int, int]:
        """Return how many rows each prompt has in a forward pass over `inputs`, and how many columns are the prompts'."""
        ids = inputs.get("input_ids")
        rows, columns = (inputs["inputs_embeds"] if ids is None else ids).shape[:2]
        # rows: beams and return sequences repeat each prompt; columns: candidate tokens follow the prompt.
        repeats, rest = divmod(rows, self.prompts)
        width = min(columns, self.length - self.seen)
        expected = None if self.input_ids is None else self.input_ids[:, self.seen : self.seen + width]
        same = ids is None or expected is None or torch.equal(ids[:: repeats or 1, :width], expected.to(ids.device))
        # Embeddings in place of the ids may have virtual tokens before them (PEFT's prompt tuning).
        same &= ids is not None or expected is None or columns == self.length - self.seen
        if rest or not repeats or not same:
            hint = "PEFT's prompt tuning? set_active_probes([]) generates without heads"
            raise ProbeError(f"the decoding method does not run the LM over the prompt as it was given ({hint})")
        return repeats, width

    def take(self, output: Any, inputs: dict[str, Any]) -> None:
        """Take the results in the output of a compiled pass over `inputs`, in place of `reading` it."""
        self._expect(inputs)
        self._taken = {}
        for name, logits in output.probe_logits.items():
            self._taken[name] = ProbeOutput.from_logits(logits, self.heads[name].config)
        for name, means in (output.probe_mean_states or {}).items():
            self._taken[name].means = MeanStates(self.heads[name].novelty, *means)
        self._advance(self.length)

    def _advance(self, seen: int) -> None:
        self.seen = seen
        if self.complete and self.on_complete is not None:
            self.on_complete(self.results())

    def results(self) -> dict[str, ProbeOutput]:
        """Return the `ProbeOutput` of each head; of a partial prompt, of those that have read something in each row."""
        if self._taken is None:
            if not self.complete:
                raise ProbeError(f"the LM has run over {self.seen} of {self.length} tokens: no part is scored")
            names = list(self.heads)
            if self._partial_prompt:
                names = [name for name, mask in self.masks.items() if bool(mask.any(dim=1).all())]
            self._taken = self._reader.results(names)
        return self._taken

    def state(self, name: str, repeats: int = 1) -> Any:
        """Return a head's token-stage state behind the prompts, each row repeated; `None` if it does not read them."""
        return repeat_rows(self._reader.states[name].joined(), repeats) if name in self.heads else None

    def probe_cache(
        self,
        states: dict[str, Any] | None = None,
        tokens: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
    ) -> ProbeCache:
        """Return what the heads keep of the prompts, and of replies to them. Needs `return_state`, and ids.

        Args:
            states: token-stage states behind the replies, by name. Defaults to no reply.
            tokens, token_mask (`[rows, reply_tokens]`): ids of the replies, and which of them count.
        """
        if states is None:
            states = {name: self.state(name) for name in self.heads}
            tokens = self.input_ids[:, :0]
            token_mask = tokens.bool()

        def behind(prompts: torch.Tensor, replies: torch.Tensor) -> torch.Tensor:
            rows = prompts.repeat_interleave(len(replies) // self.prompts, 0)
            return torch.cat([rows, replies.to(prompts.device)], 1)

        heads = {}
        for name, head in self.heads.items():
            replies = torch.zeros_like(token_mask) if head.config.skips_replies else token_mask
            heads[name] = CachedHead(HeadReference(head), behind(self.masks[name], replies), states[name])
        return ProbeCache(behind(self.input_ids, tokens), behind(self._attended(), token_mask), heads)

    def _attended(self) -> torch.Tensor:
        if self.attention_mask is None:
            return torch.ones_like(self.input_ids, dtype=torch.bool)
        return self.attention_mask.bool()


def traced_reader(
    lm: nn.Module,
    heads: Mapping[str, ProbeModel],
    session: PrefillSession | None,
    inputs: dict[str, Any],
    probe_mask: torch.Tensor | None,
) -> StateReader | None:
    """Return what reads the pass of `lm` over `inputs` that `torch.compile` is tracing.

    Values cannot be looked at there: no row is refused, and `traced_results` gives NaN for a row without a token that counts.
    `session` is that of the `generate()` call, which has made the masks.

    Returns:
        `None` if the pass is not over whole prompts, or more than their scores is asked for.
    """
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if (ids is None and embeds is None) or (session is None and cached_tokens(inputs)):
        return None
    rows, columns = (embeds if ids is None else ids).shape[:2]
    configs = {name: head.config for name, head in heads.items()}
    if session is None:
        attention_mask, placeholders = inputs.get("attention_mask"), _placeholder_ids(lm)
        masks = prompt_masks(configs, ids, embeds, attention_mask, probe_mask, placeholder_ids=placeholders)
    else:
        masks = session.masks
        whole = session.seen == 0 and columns == session.length and rows % session.prompts == 0
        if not whole or session.return_state or session.reply is not None:
            return None
    if not _stay_in_layers(lm):
        return None
    reader = StateReader(heads)
    reader.begin(read_masks(configs, masks), repeats=rows // len(next(iter(masks.values()))))
    return reader


@torch.compiler.assume_constant_result
def _placeholder_ids(lm: nn.Module) -> tuple[int, ...]:
    return find_decoder(lm).placeholder_ids
