"""The pass over the prompts: heads read it, score it, and keep a state of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache

from ..backbone.capture import capturing
from ..backbone.decoder import Decoder
from ..errors import ProbeError
from ..heads import repeat_rows
from ..heads.configuration import ProbeConfig
from ..heads.decision import ProbeOutput
from ..heads.probe import ProbeModel
from ..heads.scope import check_rows, token_mask, tokens_read
from .arguments import on_host
from .cache import CachedHead, HeadReference, ProbeCache
from .reader import StateReader


_OTHER_PROMPT = (
    "the decoding method does not run the LM over the prompt as it was given (PEFT's prompt tuning? set_active_probes([]) "
    "generates without heads)"
)


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
        # All that values decide - which tokens count, where to cut, empty rows - comes from this one copy.
        host = on_host({"ids": ids, "mask": attention_mask, "probe_mask": probe_mask})
        configs, masks = {name: head.config for name, head in heads.items()}, {}
        self.prompts = self.length = 0
        if heads or inputs:
            given = (host["ids"], embeds, host["mask"], host["probe_mask"], partial_prompt)
            masks = prompt_masks(configs, *given, decoder.placeholder_ids, past)
            self.prompts, self.length = (embeds if ids is None else ids).shape[:2]
        self.heads, self.decoder, self.masks = heads, decoder, masks
        self.input_ids, self.attention_mask, self._expected = host["ids"], host["mask"], ids
        self.seen = past
        self.return_state, self._partial_prompt = return_state, partial_prompt
        self.cache: Cache | None = None
        states = {}
        if earlier is not None:
            states = earlier.resume(heads, masks, self.input_ids, self._attended(), past)
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
        self._results: dict[str, ProbeOutput] | None = None
        self._ran: list[torch.Tensor] = []  # ids of the passes so far
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
    def reading(self, inputs: dict[str, Any], whole: bool = True):
        """Read the states of one forward pass of the LM, which is about to run over `inputs`. Yield its arguments.

        With `whole=False` the pass ends with the last layer that a head reads.

        Raises:
            ProbeError: the pass is not over the next tokens of the prompts, or some layer did not run over all of them.
        """
        repeats, width = self._expect(inputs)
        stop = self.seen + width
        cut = {id(mask): mask[:, self.seen : stop] for mask in self._read_masks.values()}
        masks = {name: cut[id(mask)] for name, mask in self._read_masks.items()}
        self._reader.begin(masks, last=stop >= self.length, repeats=repeats)
        with capturing(self.decoder, self._reader.on_state, self._reader.layers, whole):
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
        # Embeddings in place of the ids may have virtual tokens before them (PEFT's prompt tuning).
        same = ids is not None or self._expected is None or columns == self.length - self.seen
        if rest or not repeats or not same:
            raise ProbeError(_OTHER_PROMPT)
        if ids is not None and self._expected is not None:
            self._ran.append(ids[::repeats, :width])
        return repeats, width

    def _advance(self, seen: int) -> None:
        self.seen = seen
        if self.complete and self._ran:  # looked at once, however many passes there were
            ran, self._ran = self._ran[0] if len(self._ran) == 1 else torch.cat(self._ran, dim=1), []
            if not torch.equal(ran, self._expected[:, -ran.shape[1] :].to(ran.device)):
                raise ProbeError(_OTHER_PROMPT)
        if self.complete and self.on_complete is not None:
            self.on_complete(self.results())

    def results(self) -> dict[str, ProbeOutput]:
        """Return the `ProbeOutput` of each head; of a partial prompt, of those that have read something in each row."""
        if self._results is None:
            if not self.complete:
                raise ProbeError(f"the LM has run over {self.seen} of {self.length} tokens: no part is scored")
            names = list(self.heads)
            if self._partial_prompt:
                names = [name for name, mask in self.masks.items() if bool(mask.any(dim=1).all())]
            self._results = self._reader.results(names)
        return self._results

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
            tokens, token_mask (`[rows, reply_tokens]`): ids of the replies, and which of them count, on the CPU.
        """
        if states is None:
            states = {name: self.state(name) for name in self.heads}
            tokens = self.input_ids[:, :0]
            token_mask = tokens.bool()

        def behind(prompts: torch.Tensor, replies: torch.Tensor) -> torch.Tensor:
            rows = prompts.repeat_interleave(len(replies) // self.prompts, 0)
            return torch.cat([rows, replies], 1)

        heads = {}
        for name, head in self.heads.items():
            replies = torch.zeros_like(token_mask) if head.config.skips_replies else token_mask
            heads[name] = CachedHead(HeadReference(head), behind(self.masks[name], replies), states[name])
        return ProbeCache(behind(self.input_ids, tokens), behind(self._attended(), token_mask), heads)

    def _attended(self) -> torch.Tensor:
        if self.attention_mask is None:
            return torch.ones_like(self.input_ids, dtype=torch.bool)
        return self.attention_mask.bool()


def prompt_masks(
    configs: Mapping[str, ProbeConfig],
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    probe_mask: torch.Tensor | None,
    partial_prompt: bool = False,
    placeholder_ids: Sequence[int] = (),
    seen: int = 0,
) -> dict[str, torch.Tensor]:
    """Return for each head, by name, the prompt tokens that count: `[prompts, prompt_tokens]`. Heads of one scope share a tensor.

    Heads are trained on texts. Tokens in `placeholder_ids`, which stand for images or the like, count only where
    `probe_mask` says so. What the LM sees in an image reaches heads through the text tokens after it.

    Args:
        partial_prompt, seen: see `token_mask`.

    Raises:
        ProbeError: there is no prompt, or mask and prompt have different shapes.
    """
    given = {"input_ids": input_ids, "attention_mask": attention_mask, "probe_mask": probe_mask}
    for name, tensor in given.items():
        if tensor is not None and (not isinstance(tensor, torch.Tensor) or tensor.dim() != 2):
            found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            entries = ": pass its entries, with ** before it" if isinstance(tensor, Mapping) else ""
            raise ProbeError(f"{name} must be a tensor [batch, tokens], not {found}{entries}")
    source = input_ids if input_ids is not None else inputs_embeds
    if source is None or 0 in source.shape[:2]:
        raise ProbeError("there is no prompt for the heads to read: pass input_ids, or set_active_probes([]) first")
    shape = source.shape[:2]
    for name, tensor in given.items():
        if tensor is not None and tensor.shape != shape:
            hint = "with a cache, pass all input_ids of the conversation"
            raise ProbeError(f"{name} has the shape {tuple(tensor.shape)}, the prompt {tuple(shape)}: {hint}")
    if attention_mask is None:
        attention_mask = torch.ones(shape, dtype=torch.bool, device=source.device)
    if probe_mask is not None:
        chosen = probe_mask.to(attention_mask.device).bool() & attention_mask.bool()
        return dict.fromkeys(configs, chosen)
    text = None
    if placeholder_ids and input_ids is not None:
        text = ~torch.isin(input_ids, torch.tensor(placeholder_ids, device=input_ids.device))
    found: list[tuple[Any, torch.Tensor]] = []  # scopes and their masks
    masks: dict[str, torch.Tensor] = {}
    for name, config in configs.items():
        scope = config.token_scope, config.prefix_ids, config.turn_markers
        mask = next((mask for other, mask in found if other == scope), None)
        if mask is None:
            mask = token_mask(config, input_ids, attention_mask, partial_prompt, seen)
            mask = mask if text is None else mask & text.to(mask.device)
            found.append((scope, mask))
        masks[name] = mask
    return masks


def read_masks(configs: Mapping[str, ProbeConfig], masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Apply `tokens_read` to the mask of each head. Heads that share a tensor, and read all tokens, share the result."""
    return {name: tokens_read(config, masks[name]) for name, config in configs.items()}
