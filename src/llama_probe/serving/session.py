"""One call of `generate()` with heads: what is read, and when."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput, logging

from ..backbone.cache import cached_tokens
from ..backbone.decoder import Decoder, find_decoder, without_peft
from ..errors import ProbeError
from ..heads.configuration import ProbeConfig
from ..heads.probe import ProbeModel
from .arguments import GenerateCall, token_ids
from .cache import ProbeCache, asks_for_state, refuse_without_heads
from .outputs import Halt, with_results
from .prefill import PrefillSession
from .reply import ReplyRecorder, ReplySession, refuse_not_followed


logger = logging.get_logger(__name__)

_NOT_SCORED = (
    "A pass that continues from a cache was not scored (probe_logits is None): pass the probe_state= of the call that filled it, or the "
    "whole prompt without a cache. PEFT's prefix tuning makes such a cache: score with get_base_model().classify(...)."
)
PAGED = "heads cannot read prompts in a paged cache; use generate(), or set_active_probes([]) to go without heads"

# The generate() call of this thread: (model, its assistant, session). The outermost call of a model decides on heads.
# Calls that the decoding method makes itself (assistants, early exits) run without them.
_CURRENT: ContextVar[tuple[nn.Module, nn.Module | None, PrefillSession] | None] = ContextVar(
    "probe_session", default=None
)


@contextmanager
def open_session(model: nn.Module, assistant: nn.Module | None, session: PrefillSession):
    """Have `session_of(model)` return `session` in this thread and inside the block. Close it at the end."""
    token = _CURRENT.set((model, without_peft(assistant), session))
    try:
        yield session
    finally:
        _CURRENT.reset(token)
        if session.reply is not None:
            session.reply.close()
        # Break the reference cycle, so that the KV cache is freed at once.
        session.on_complete = session.reply = None


@contextmanager
def outside_sessions():
    """Let the user's code call models with their heads inside the block, from within a decoding method."""
    token = _CURRENT.set(None)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def session_of(model: nn.Module) -> PrefillSession | None:
    """Return the session of the `generate()` call that `model` is in, or `None`."""
    current = _CURRENT.get()
    return current[2] if current is not None and current[0] is model else None


def is_inner_call(model: nn.Module) -> bool:
    """Return True if another `generate()` call made this one: of `model` itself, or of a model that it assists."""
    current = _CURRENT.get()
    return current is not None and (current[0] is model or current[1] is model)


def forward_session(
    heads: dict[str, ProbeModel],
    decoder: Decoder,
    kwargs: dict[str, Any],
    probe_mask: torch.Tensor | None,
    probe_state: ProbeCache | bool | None,
) -> PrefillSession | None:
    """Return the session of one call of `forward` with the arguments `kwargs`, which hold only the new tokens.

    It keeps a state if `probe_state` or `use_cache=True` asks for one. Return `None` for a later step of the caller's own
    decoding loop.
    """
    past, ids = cached_tokens(kwargs), kwargs.get("input_ids")
    keep = asks_for_state(probe_state, ids, kwargs.get("use_cache"))
    earlier, inputs = probe_state if isinstance(probe_state, ProbeCache) else None, kwargs
    if earlier is not None:
        whole = earlier.followed_by(ids, kwargs.get("attention_mask"))
        inputs = dict(zip(("input_ids", "attention_mask"), whole, strict=True))
    elif past:
        if keep:
            raise ProbeError(f"probe_state=True: the cache already holds {past} tokens that the heads have not seen")
        if ids is not None and ids.shape[1] > 1:
            logger.warning_once(_NOT_SCORED)
        return None
    keep = keep or (ids is not None and bool(kwargs.get("use_cache")))
    return PrefillSession(
        heads, decoder, inputs, probe_mask, past=past, earlier=earlier, return_state=keep, partial_prompt=keep
    )


def generation_session(
    call: GenerateCall,
    heads: dict[str, ProbeModel],
    probe_mask: torch.Tensor | None,
    probe_state: ProbeCache | bool | None,
) -> PrefillSession:
    """Return the session of one call of `generate()`."""
    if not heads:
        refuse_without_heads(probe_state)
        return PrefillSession({}, None, {})
    if call.setting("cache_implementation") == "paged":
        raise ProbeError(PAGED)
    if call.setting("token_healing"):
        raise ProbeError("token_healing rewrites the end of the prompt behind the heads; switch one of them off")
    ids, embeds = call.inputs, call.kwargs.get("inputs_embeds")
    if ids is None:
        ids = call.kwargs.get("input_ids")
    if embeds is not None:
        ids = None  # generate() ignores ids beside embeddings, but for bookkeeping
    elif isinstance(ids, torch.Tensor) and ids.dim() == 3:
        ids, embeds = None, ids
    mask = call.kwargs.get("attention_mask")
    if mask is None and isinstance(ids, torch.Tensor):  # anything else is refused with the other tensors
        mask = _mask_from_padding(ids, call)
    keep = asks_for_state(probe_state, ids, call.setting("use_cache"))
    followers = {name: head for name, head in heads.items() if head.config.reads_reply}
    if followers:
        refuse_not_followed(f"heads that read the reply ({', '.join(followers)})", call)
    if keep:
        refuse_not_followed("probe_state, for which heads read the reply", call)
    session = PrefillSession(
        {name: head for name, head in heads.items() if head.config.token_scope != "response"},
        find_decoder(call.model),
        {"input_ids": ids, "inputs_embeds": embeds, "attention_mask": mask},
        probe_mask,
        past=cached_tokens(call.kwargs),
        earlier=probe_state if isinstance(probe_state, ProbeCache) else None,
        return_state=keep,
    )
    if followers or keep:
        ends, pad = token_ids(call.setting("eos_token_id")), None
        if call.setting("stop_strings") or call.kwargs.get("stopping_criteria"):
            pad = next(iter(token_ids(call.setting("pad_token_id"))), None)
        session.reply = ReplySession(followers, session, ends, pad, ReplyRecorder(session) if keep else None)
    return session


def with_probes(
    call: GenerateCall,
    output: Any,
    session: PrefillSession,
    reply: ReplySession | None,
    configs: dict[str, ProbeConfig],
    halts: list[Halt | None] | None,
) -> ModelOutput:
    """Return the output of the plain `generate()` with what heads say of its prompts and replies."""
    results = session.results()
    if not isinstance(output, ModelOutput):
        hint = "let it return a generate output, or pass return_dict_in_generate=False"
        raise ProbeError(f"custom_generate returned a {type(output).__name__}, which cannot carry logits: {hint}")
    rows, columns = output.sequences.shape
    new_tokens = columns - (0 if call.input_ids is None else call.input_ids.shape[1])  # embeddings are not returned
    token_logits = state = texts = None
    if reply is not None:
        token_logits = reply.logits(rows, new_tokens) or None
        if reply.recorder is not None:
            state = reply.recorder.probe_cache(rows, cached_tokens(output))
    if (tokenizer := call.kwargs.get("tokenizer")) is not None:
        texts = tokenizer.batch_decode(output.sequences[:, columns - new_tokens :], skip_special_tokens=True)
    return with_results(output, results, configs, halts, token_logits, state, texts)


def _mask_from_padding(input_ids: torch.Tensor, call: GenerateCall) -> torch.Tensor | None:
    """Return the mask that generate() infers: false for pad ids, unless the pad id is an eos id."""
    pad = next(iter(token_ids(call.setting("pad_token_id"))), None)
    return None if pad is None or pad in token_ids(call.setting("eos_token_id")) else input_ids != pad
