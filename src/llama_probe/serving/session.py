"""One call of `generate()` with heads: what is read, and when."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from ..backbone.capture import Capture, Decoder, check_seen, find_decoder, without_peft
from ..errors import ProbeError
from ..heads import repeat_rows
from ..heads.decision import ProbeOutput
from ..heads.probe import ProbeModel
from ..heads.scope import check_rows, prompt_masks
from .arguments import generation_setting, token_ids
from .cache import CachedHead, HeadReference, ProbeCache, asks_for_state, cached_tokens, refuse_without_heads
from .head_group import HeadGroup
from .holding import HeldStates
from .reply import ReplyRecorder, ReplySession, refuse_not_followed


logger = logging.get_logger(__name__)


class PrefillSession:
    """Feeds the states of one batch of prompts to the heads while the LM runs over it, in one or more forward passes.

    Args:
        heads: the heads that read along, by name.
        masks: for each head the tokens that count, `[prompts, prompt_tokens]`.
        input_ids: the prompts, `[prompts, prompt_tokens]`; `None` where they are given as embeddings.
        attention_mask: of the prompts, `[prompts, prompt_tokens]`; `None` where all tokens count.
        past: leading prompt tokens that a cache holds already.
        earlier: what heads keep of these tokens.
        keep: make such a state of the prompts.
        begun: the prompts may go on: heads that have nothing to read yet, in some row, give no result.
        output_attentions: keep token and layer weights.
        shape: `(prompts, prompt_tokens)`, where no head reads the prompts.

    Attributes:
        on_complete: called with the results, once, at the end of the pass that completes the prompt.
        reply: reads the passes after that; `None` where no head does.
        cache: of the LM, once it has run; whoever runs it says so.
        decoder: of the LM, where it stays the same for all passes of the session.

    Raises:
        ProbeError: a prompt that cannot be scored; see `ProbeModel.init_state`.
    """

    def __init__(
        self,
        heads: dict[str, ProbeModel],
        masks: dict[str, torch.Tensor],
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past: int = 0,
        earlier: ProbeCache | None = None,
        keep: bool = False,
        begun: bool = False,
        output_attentions: bool = False,
        shape: tuple[int, int] = (0, 0),
    ):
        self.heads, self.masks = heads, masks
        self.input_ids, self.attention_mask = input_ids, attention_mask
        self.seen = past
        self.prompts, self.length = next(iter(masks.values())).shape if masks else shape
        self.keep = keep
        self.cache: Cache | None = None
        self.decoder: Decoder | None = None
        running = {}
        if earlier is not None:
            earlier.check_length(past)
            running = earlier.resume(heads, masks, input_ids, self._attended())
        if keep and not begun:  # otherwise the group sees to it
            for mask in masks.values():
                check_rows(mask)
        self._group = HeadGroup(heads, masks, past, running, output_attentions, keep)
        self._taken: dict[str, ProbeOutput] | None = None
        self.on_complete: Callable[[dict[str, ProbeOutput]], Any] | None = None
        self.reply: ReplySession | None = None

    @property
    def complete(self) -> bool:
        """Whether the LM has run over the whole prompt; later passes are plain ones, or those of `reply`."""
        return self.seen >= self.length

    @property
    def next_reader(self) -> PrefillSession | ReplySession | bool:
        """What reads the next pass; `False` where nothing does."""
        return (self.reply or False) if self.complete else self

    @contextmanager
    def reading(self, decoder: Decoder, inputs: dict[str, Any]):
        """Reads the states of one forward pass of the LM, which is about to run over `inputs`.

        Yields:
            The arguments with which it must run.

        Raises:
            ProbeError: the pass is not over the next tokens of the prompts, or some layer did not run over all of them.
        """
        rows, columns, repeats, width = self._expect(inputs)
        whole = repeats == 1 and width == columns
        numbers = rows * columns * decoder.hidden_size
        reader, cache = self._group.reader(self.prompts, width), inputs.get(decoder.cache_name)
        held = HeldStates(reader.read, numbers, decoder.num_hidden_layers + 1, cache)
        seen = set()

        def on_state(layer: int, hidden: torch.Tensor) -> None:
            seen.add(layer)
            held.add(layer, hidden if whole else hidden[::repeats, :width])

        with Capture(decoder, on_state, self._group.layers):
            yield decoder.whole(inputs)
        check_seen(self._group.layers, seen)
        held.read()
        self.seen += width
        if not self.complete:
            return
        self._group.check_whole()
        if self.on_complete is not None:
            self.on_complete(self.results())

    def _expect(self, inputs: dict[str, Any]) -> tuple[int, int, int, int]:
        """Of a forward pass over `inputs`: rows, columns, how many rows each prompt has, and how many columns are of prompts.

        Raises:
            ProbeError: the pass is not over the next tokens of the prompts.
        """
        ids = inputs.get("input_ids")
        rows, columns = (inputs["inputs_embeds"] if ids is None else ids).shape[:2]
        # rows: beams and return sequences repeat each prompt; columns: candidate tokens follow the prompt.
        repeats, rest = divmod(rows, self.prompts)
        width = min(columns, self.length - self.seen)
        expected = None if self.input_ids is None else self.input_ids[:, self.seen : self.seen + width]
        same = ids is None or expected is None or torch.equal(ids[:: repeats or 1, :width], expected.to(ids.device))
        # Whoever puts embeddings of their own in place of the ids (PEFT's prompt tuning) may have put further ones before them.
        same &= ids is not None or expected is None or columns == self.length - self.seen
        if rest or not repeats or not same:
            raise ProbeError(
                "the decoding method does not run the LM over the prompt as it was given (a part of it, other rows, or with the "
                "virtual tokens of PEFT's prompt tuning): a part of a prompt is not scored. set_active_probes([]) generates "
                "without heads"
            )
        return rows, columns, repeats, width

    def takes_whole(self, rows: int, columns: int) -> bool:
        """Whether the scores of one pass over so many rows and columns are all that is to be had of it; see `take`."""
        whole = self.seen == 0 and columns == self.length and rows % self.prompts == 0
        return whole and not self.keep and self.reply is None

    def take(self, logits: dict[str, torch.Tensor], inputs: dict[str, Any]) -> None:
        """Takes the logits that a compiled pass over `inputs` gave, in place of `reading` it.

        Raises:
            ProbeError: it was not over the prompts.
        """
        self._expect(inputs)
        self._taken = {name: ProbeOutput.from_logits(each, self.heads[name].config) for name, each in logits.items()}
        self.seen = self.length
        if self.on_complete is not None:
            self.on_complete(self.results())

    def results(self) -> dict[str, ProbeOutput]:
        """`ProbeOutput` of each head.

        Raises:
            ProbeError: the LM has not run over the whole prompt.
        """
        return self._group.results() if self._taken is None else self._taken

    def running(self, name: str, repeats: int = 1) -> Any:
        """What a head goes on from behind the prompts; see `ProbeModel.begin_reply`. `None` where it does not read them."""
        return repeat_rows(self._group.running(name), repeats)

    def probe_cache(
        self,
        running: dict[str, Any] | None = None,
        tokens: torch.Tensor | None = None,
        counted: torch.Tensor | None = None,
    ) -> ProbeCache:
        """What the heads keep of the prompts, once the LM has run over them. Needs `keep`, and ids.

        Args:
            running: what they made of the prompts and of replies to them, by name.
            tokens, counted (`[rows, reply_tokens]`): ids of these replies, and which of them count.
        """
        if running is None:
            running = {name: self.running(name) for name in self.heads}
            tokens = self.input_ids[:, :0]
            counted = tokens.bool()

        def behind(prompts: torch.Tensor, replies: torch.Tensor) -> torch.Tensor:
            return torch.cat(
                [prompts.repeat_interleave(len(replies) // self.prompts, 0), replies.to(prompts.device)], 1
            )

        heads = {
            name: CachedHead(HeadReference(head), behind(self.masks[name], counted), running[name])
            for name, head in self.heads.items()
        }
        return ProbeCache(behind(self.input_ids, tokens), behind(self._attended(), counted), heads)

    def _attended(self) -> torch.Tensor:
        if self.attention_mask is None:
            return torch.ones_like(self.input_ids, dtype=torch.bool)
        return self.attention_mask.bool()


# The generate() call that this thread is in: (model, its assistant, session). Heads are decided once, by the outermost
# call of a model; calls that the decoding method makes for its own ends (assistants, early exits) run without heads.
_CURRENT: ContextVar[tuple[nn.Module, nn.Module | None, PrefillSession] | None] = ContextVar(
    "probe_session", default=None
)


@contextmanager
def open_session(model: nn.Module, assistant: nn.Module | None, session: PrefillSession):
    """Makes `session` the one that `session_of(model)` finds, in this thread and inside the block; it ends with that."""
    token = _CURRENT.set((model, without_peft(assistant), session))
    try:
        yield session
    finally:
        _CURRENT.reset(token)
        if session.reply is not None:
            session.reply.close()
        # Both know the session: the cycle would keep the LM's cache until Python looks for such.
        session.on_complete = session.reply = None


@contextmanager
def outside_sessions():
    """Inside the block no call is one of the decoding method's own: code of the user's calls models with their heads."""
    token = _CURRENT.set(None)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def session_of(model: nn.Module) -> PrefillSession | None:
    """The session of the `generate()` call that `model` is in, or `None`."""
    current = _CURRENT.get()
    return current[2] if current is not None and current[0] is model else None


def is_inner_call(model: nn.Module) -> bool:
    """Whether a `generate()` of `model` is made by another one, that of the model itself or that it assists."""
    current = _CURRENT.get()
    return current is not None and (current[0] is model or current[1] is model)


def prompt_session(
    heads: dict[str, ProbeModel],
    inputs: Mapping[str, Any],
    probe_mask: torch.Tensor | None = None,
    *,
    begun: bool = False,
    placeholder_ids: Sequence[int] = (),
    **kwargs,
) -> PrefillSession:
    """The session of whole prompts: `input_ids` or `inputs_embeds`, and `attention_mask`, in `inputs`.

    Args:
        probe_mask: true for the tokens that count, in place of the heads' own `token_scope`.
        placeholder_ids: see `prompt_masks`. begun, kwargs: see `PrefillSession`.
    """
    ids, embeds, attention_mask = (inputs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
    masks = prompt_masks(heads, ids, embeds, attention_mask, probe_mask, begun, placeholder_ids)
    shape = (embeds if ids is None else ids).shape[:2]
    return PrefillSession(heads, masks, ids, attention_mask, begun=begun, shape=shape, **kwargs)


def forward_session(
    heads: dict[str, ProbeModel],
    kwargs: dict[str, Any],
    probe_mask: torch.Tensor | None,
    probe_state: ProbeCache | bool | None,
    placeholder_ids: Sequence[int] = (),
) -> PrefillSession | None:
    """The session of one call of `forward`, whose arguments the others are: the new tokens alone stand in `kwargs`.

    A state is kept where it is asked for, and where `use_cache=True` is. `None` for a later step of somebody's own decoding loop:
    the prompt is behind it.
    """
    past, ids = cached_tokens(kwargs), kwargs.get("input_ids")
    keep = asks_for_state(probe_state, ids, kwargs.get("use_cache"))
    if not isinstance(probe_state, ProbeCache):
        if past and keep:
            raise ProbeError(
                f"probe_state=True begins a state, and the cache already holds {past} tokens that the heads have not seen: pass "
                "what the call that filled it returned as probe_state (model(..., use_cache=True))"
            )
        if past:
            if ids is not None and ids.shape[1] > 1 and not torch.compiler.is_dynamo_compiling():
                logger.warning_once(_NOT_SCORED)
            return None
        keep = keep or (ids is not None and bool(kwargs.get("use_cache")))
        return prompt_session(heads, kwargs, probe_mask, keep=keep, begun=keep, placeholder_ids=placeholder_ids)
    probe_state.check_length(past)
    ids, attention_mask = probe_state.followed_by(ids, kwargs.get("attention_mask"))
    whole = {"input_ids": ids, "attention_mask": attention_mask}
    return prompt_session(
        heads,
        whole,
        probe_mask,
        past=past,
        earlier=probe_state,
        keep=True,
        begun=True,
        placeholder_ids=placeholder_ids,
    )


def generation_session(
    model: PreTrainedModel,
    heads: dict[str, ProbeModel],
    inputs: torch.Tensor | None,
    generation_config: GenerationConfig | None,
    kwargs: dict[str, Any],
    probe_mask: torch.Tensor | None,
    probe_state: ProbeCache | bool | None,
) -> PrefillSession:
    """The session of one call of `generate()`, whose arguments the others are."""
    if not heads:
        refuse_without_heads(probe_state)
        return PrefillSession({}, {})

    def setting(name: str):
        return generation_setting(model, generation_config, kwargs, name)

    if setting("cache_implementation") == "paged":
        raise ProbeError(PAGED)
    if setting("token_healing"):
        raise ProbeError(
            "token_healing rewrites the end of the prompt after heads have been set up; switch one of them off"
        )
    embeds = kwargs.get("inputs_embeds")
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    if embeds is not None:
        ids = None  # generate() ignores ids beside embeddings, but for bookkeeping
    elif isinstance(inputs, torch.Tensor) and inputs.dim() == 3:
        ids, embeds = None, inputs
    mask = kwargs.get("attention_mask")
    if mask is None and isinstance(ids, torch.Tensor):  # what is none is refused, with the other tensors
        mask = _mask_from_padding(ids, setting("pad_token_id"), setting("eos_token_id"))
    keep = asks_for_state(probe_state, ids, setting("use_cache"))
    decoder = find_decoder(model)
    followers = {name: head for name, head in heads.items() if head.config.reads_reply}
    if followers:
        refuse_not_followed(f"heads that read the reply ({', '.join(followers)})", setting)
    if keep:
        refuse_not_followed("probe_state, for which heads read the reply", setting)
    session = prompt_session(
        {name: head for name, head in heads.items() if head.config.token_scope != "response"},
        {"input_ids": ids, "inputs_embeds": embeds, "attention_mask": mask},
        probe_mask,
        past=cached_tokens(kwargs),
        earlier=probe_state if isinstance(probe_state, ProbeCache) else None,
        keep=keep,
        placeholder_ids=decoder.placeholder_ids,
    )
    session.decoder = decoder
    if followers or keep:
        ends, pad = token_ids(setting("eos_token_id")), None
        if setting("stop_strings") or kwargs.get("stopping_criteria"):
            pad = next(iter(token_ids(setting("pad_token_id"))), None)
        recorder = ReplyRecorder(session, ends) if keep else None
        session.reply = ReplySession(followers, session, ends, pad, recorder)
    return session


_NOT_SCORED = (
    "A pass over several tokens that goes on from a cache was not scored (probe_logits is None): heads would have to read what the "
    "cache holds. Pass probe_state= beside it, as the call that filled it returned it, or the whole prompt without a cache. A PEFT "
    "model that was tuned with a prefix puts such a cache before every prompt: score with the model below, "
    "get_base_model().classify(...), or tune it with LoRA."
)
PAGED = (
    "continuous batching (paged cache, generate_batch) mixes the tokens of many requests in one row, so heads cannot read a "
    "prompt there; use generate(), or set_active_probes([]) to go without heads"
)


def _mask_from_padding(input_ids: torch.Tensor, pad_token_id, eos_token_id) -> torch.Tensor | None:
    """The mask that generate() infers where none is given: padding is told from the pad id, unless that is an eos id."""
    pad = next(iter(token_ids(pad_token_id)), None)
    if pad is None or pad in token_ids(eos_token_id) or not bool((input_ids == pad).any()):
        return None
    return input_ids != pad
