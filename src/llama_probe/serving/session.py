"""One call of `generate()` with heads; `ProbedSession` is its whole way."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput, logging

from ..backbone.decoder import Decoder, find_decoder, without_peft
from ..backbone.kv_cache import cached_tokens
from ..errors import ProbeError
from ..heads.novelty import abstain_levels
from ..heads.probe import ProbeModel
from ..heads.turns import marker_mask
from .cache import ProbeCache, asks_for_state, refuse_without_heads
from .halting import Halter, HaltReply, HaltSpec, HoldBackStreamer, Reprompt, TokenCallback, reply_tokens
from .outputs import Halt, TokenScores, with_results
from .reader import PromptReader
from .reply import ReplyReader


logger = logging.get_logger(__name__)

_NOT_SCORED = (
    "A pass that continues from a cache was not scored (probe_logits is None): pass the probe_state= of the call that filled it, or the "
    "whole prompt without a cache. PEFT's prefix tuning makes such a cache: score with get_base_model().classify(...)."
)
Generate = Callable[..., Any]  # of transformers, bound to the model
PAGED = "heads cannot read prompts in a paged cache; use generate(), or set_active_probes([]) to go without heads"
# Arguments of `generate()` that transformers does not have.
HEAD_ARGUMENTS = ("probes", "probe_mask", "halt_on", "halt_reply", "on_probe_token", "probe_state", "abstain_at")
# Settings under which passes are not over one more token of each reply. 1 is the default of the first two.
_NOT_FOLLOWED = (
    *("num_beams", "num_beam_groups", "constraints", "force_words_ids"),
    *("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp", "penalty_alpha"),
    *("dola_layers", "custom_generate"),
)

# The session of this thread. The outermost call of a model decides on heads; calls that the decoding method makes itself
# (assistants, early exits) run without them.
_CURRENT: ContextVar[PlainSession | None] = ContextVar("probe_session", default=None)


@contextmanager
def _current(session: PlainSession | None):
    token = _CURRENT.set(session)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def session_of(model: nn.Module) -> PlainSession | None:
    """Return the session of the `generate()` call that `model` is in, or None."""
    session = _CURRENT.get()
    return session if session is not None and session.call.model is model else None


def is_inner_call(model: nn.Module) -> bool:
    """Return True if another `generate()` call made this one: of `model` itself, or of a model that it assists."""
    session = _CURRENT.get()
    if session is None:
        return False
    assistant = session.call.kwargs.get("assistant_model")
    return model is session.call.model or (assistant is not None and model is without_peft(assistant))


class GenerateCall:
    """One call of the plain `generate()`: its arguments, and the settings that they give with its config and the model's.

    Raises:
        ProbeError: a config has an argument of heads. It takes any name, and nothing would be halted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: torch.Tensor | None,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
    ):
        self.model, self.inputs, self.generation_config, self.kwargs = model, inputs, generation_config, kwargs
        for config in (generation_config, model.generation_config):
            for name in HEAD_ARGUMENTS:
                if getattr(config, name, None) is not None:
                    raise ProbeError(f"{name} in a generation_config: pass it to generate() itself, {name}=...")

    @property
    def input_ids(self) -> torch.Tensor | None:
        """Token ids of the prompts; None if there are embeddings alone."""
        is_ids = self.inputs is not None and self.inputs.dim() == 2
        return self.inputs if is_ids else self.kwargs.get("input_ids")

    @property
    def prompt_length(self) -> int:
        """Number of prompt tokens in what `generate()` returns: embeddings are not returned."""
        return 0 if self.input_ids is None else self.input_ids.shape[1]

    @property
    def returns_dict(self) -> bool:
        """True if an output is wanted, which is the default with heads, and not the tokens alone."""
        chosen = getattr(self.generation_config, "return_dict_in_generate", None)
        return self.kwargs.get("return_dict_in_generate", chosen) in (None, True)

    def setting(self, name: str) -> Any:
        """Return the value of a setting from the arguments, their config or the model's config, else None."""
        if name in self.kwargs:
            return self.kwargs[name]
        values = (getattr(self.generation_config, name, None), getattr(self.model.generation_config, name, None))
        return next((value for value in values if value is not None), None)

    def token_ids(self, name: str) -> list[int]:
        """Return the token ids in a setting such as `eos_token_id`: none, one or several."""
        value = self.setting(name)
        if isinstance(value, torch.Tensor):
            value = value.flatten().tolist()
        return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]

    def change(self, name: str, value: Any) -> None:
        """Change a setting: in a copy of the config if there is one, because transformers deprecates settings beside it."""
        if self.generation_config is None or name in self.kwargs:
            self.kwargs[name] = value
        else:
            self.generation_config = copy.deepcopy(self.generation_config)
            setattr(self.generation_config, name, value)

    def prompts(self) -> dict[str, torch.Tensor | None]:
        """Return `input_ids` or `inputs_embeds`, and `attention_mask` as `generate()` takes or infers it."""
        ids, embeds = self.inputs, self.kwargs.get("inputs_embeds")
        if ids is None:
            ids = self.kwargs.get("input_ids")
        if embeds is not None:
            ids = None  # generate() ignores ids beside embeddings, but for bookkeeping
        elif isinstance(ids, torch.Tensor) and ids.dim() == 3:
            ids, embeds = None, ids
        mask = self.kwargs.get("attention_mask")
        if mask is None and isinstance(ids, torch.Tensor):  # anything else is refused with the other tensors
            pad = next(iter(self.token_ids("pad_token_id")), None)
            mask = None if pad is None or pad in self.token_ids("eos_token_id") else ids != pad
        return {"input_ids": ids, "inputs_embeds": embeds, "attention_mask": mask}

    def check_followed(self, what: str) -> None:
        """Raise `ProbeError` if heads cannot follow the replies that the call writes. `what` is why they are to follow."""
        for name in _NOT_FOLLOWED:
            value = self.setting(name)
            if value and not (value == 1 and name in ("num_beams", "num_beam_groups")):
                raise ProbeError(f"{name} cannot be used with {what}: leave it out, for greedy search or sampling")


def forward_reader(
    heads: dict[str, ProbeModel],
    decoder: Decoder,
    kwargs: dict[str, Any],
    probe_mask: torch.Tensor | None,
    probe_state: ProbeCache | bool | None,
) -> PromptReader | None:
    """Return the reader for one call of `forward` with the arguments `kwargs`, which hold only the new tokens.

    It keeps a state if `probe_state` or `use_cache=True` asks for one. Return None for a later step of the caller's own decoding
    loop.
    """
    past = cached_tokens(kwargs)
    ids: Any = kwargs.get("input_ids")
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
    return PromptReader(
        heads, decoder, inputs, probe_mask, past=past, earlier=earlier, return_state=keep, partial_prompt=keep
    )


class _AllHalted(Exception):
    """Leaves the plain `generate()` after the prefill if every prompt is halted, so that a streamer sees no token."""

    def __init__(self, cache: Cache | None):
        super().__init__("every prompt is halted")
        self.cache = cache


class PlainSession:
    """One call of `generate()` in which no head runs: inner calls, `probes=[]`, plain outputs."""

    def __init__(self, call: GenerateCall):
        self.call = call

    @property
    def reads_prompt(self) -> bool:
        """True if the next pass is over the prompt, for heads to read."""
        return False

    @property
    def reads_next(self) -> bool:
        """True if heads read the next pass."""
        return False

    def run(self, generate: Generate) -> Any:
        """Call the plain `generate`."""
        with _current(self):
            return generate(self.call.inputs, self.call.generation_config, **self.call.kwargs)


class ProbedSession(PlainSession):
    """One call of `generate()` with heads: they read the prompt and the reply, and their results are put into the output.

    `run` calls the plain `generate()`, which calls the model, whose passes over the prompt and over reply tokens are those of
    `forward`. After the prompt comes `_decide`, after a reply token `_follow`, and at the end `_finish`.

    Args:
        call: the call.
        heads: the heads that run, by name.
        others: arguments of `ProbedGenerationMixin.generate`.

    Raises:
        ProbeError: the prompt cannot be scored as a whole, or the replies cannot be followed.
    """

    def __init__(
        self,
        call: GenerateCall,
        heads: dict[str, ProbeModel],
        probe_mask: torch.Tensor | None = None,
        probe_state: ProbeCache | bool | None = None,
        abstain_at: float | dict[str, float] | None = None,
    ):
        super().__init__(call)
        self.configs = {name: head.config for name, head in heads.items()}
        self.levels = abstain_levels(abstain_at, self.configs)
        self.tokenizer: Any = call.kwargs.get("tokenizer")  # or a processor
        if call.setting("cache_implementation") == "paged":
            raise ProbeError(PAGED)
        if call.setting("token_healing"):
            raise ProbeError("token_healing rewrites the end of the prompt behind the heads; switch one of them off")
        inputs = call.prompts()
        keep = asks_for_state(probe_state, inputs["input_ids"], call.setting("use_cache"))
        followers = {name: head for name, head in heads.items() if head.config.reads_reply}
        if followers:
            call.check_followed(f"heads that read the reply ({', '.join(followers)})")
        if keep:
            call.check_followed("probe_state, for which heads read the reply")
        self.prompt = PromptReader(
            {name: head for name, head in heads.items() if head.config.token_scope != "response"},
            find_decoder(call.model),
            inputs,
            probe_mask,
            past=cached_tokens(call.kwargs),
            earlier=probe_state if isinstance(probe_state, ProbeCache) else None,
            return_state=keep,
        )
        self.reply: ReplyReader | None = None
        if followers or keep:
            pad = None
            if call.setting("stop_strings") or call.kwargs.get("stopping_criteria"):
                pad = next(iter(call.token_ids("pad_token_id")), None)
            self.reply = ReplyReader(followers, self.prompt, call.token_ids("eos_token_id"), pad)

    def run(self, generate: Generate) -> ModelOutput | torch.Tensor:
        """Call the plain `generate`, and return its output with the results of the heads, or its tokens if it asks for these."""
        call = self.call
        as_dict = call.returns_dict
        call.change("return_dict_in_generate", True)
        if self.reply is not None and "disable_compile" not in call.kwargs:
            call.change("disable_compile", True)  # hooks and a state that grows would only break its graphs
        with _current(self), self.reply or contextlib.nullcontext():
            output = self._finish(self._generate(generate))
        return output if as_dict else output["sequences"]

    def _generate(self, generate: Generate) -> Any:
        return generate(self.call.inputs, self.call.generation_config, **self.call.kwargs)

    @property
    def reads_prompt(self) -> bool:
        return not self.prompt.complete

    @property
    def reads_next(self) -> bool:
        return self.reads_prompt or self.reply is not None

    def forward(self, forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """Run one forward pass of the LM, read it, and decide on what was read."""
        output: Any = None
        if self.reads_prompt:
            with self.prompt.reading(inputs) as inputs:
                output = forward(**inputs)
            if self.prompt.complete:
                self._decide(getattr(output, "cache", inputs.get("cache")))
        elif self.reply is not None:
            with self.reply.reading(inputs) as scores:
                output = forward(**inputs)
            self._follow(scores())
        return output

    def _decide(self, cache: Cache | None) -> None:
        """Decide on the prompts, which the LM has just read into its KV cache."""

    def _follow(self, scores: TokenScores) -> None:
        """Decide on one more token of each reply."""

    def _finish(self, output: Any, halts: list[Halt | None] | None = None) -> ModelOutput:
        """Put the results of the heads into the output of the plain `generate()`."""
        if not isinstance(output, ModelOutput):
            hint = "let it return a generate output, or pass return_dict_in_generate=False"
            raise ProbeError(f"custom_generate returned a {type(output).__name__}, which cannot carry logits: {hint}")
        token_logits = state = texts = None
        results, sequences = self.prompt.results(), output["sequences"]
        rows, new_tokens = len(sequences), sequences.shape[1] - self.call.prompt_length
        if self.reply is not None:
            token_logits = self.reply.logits(rows, new_tokens) or None
            if self.reply.recorder is not None:
                state = self.reply.recorder.probe_cache(rows, cached_tokens(output))
        if self.tokenizer is not None:
            texts = self.tokenizer.batch_decode(sequences[:, self.call.prompt_length :], skip_special_tokens=True)
        probed = with_results(output, results, self.configs, halts, token_logits, state, texts)
        if self.levels:
            probed.abstain_at = self.levels
        return probed


class HaltingSession(ProbedSession):
    """A `ProbedSession` in which prompts get no reply, or replies end early.

    Args:
        halter: decides.
        halt_reply: what halted rows get.
        others: see `ProbedSession`.

    Raises:
        ProbeError: an argument is not allowed; see `ProbedSession` as well.
    """

    def __init__(
        self, call: GenerateCall, heads: dict[str, ProbeModel], halter: Halter, halt_reply: HaltReply | None, **others
    ):
        super().__init__(call, heads, **others)
        self.halter = halter
        self.streamer: Any = call.kwargs.get("streamer")
        self._reply_ids = reply_tokens(halt_reply, self.tokenizer)
        self._copies = call.setting("num_return_sequences") or 1
        if any(rule.ask for rule in halter.rules) and (self.tokenizer is None or self.prompt.input_ids is None):
            raise ProbeError("halt_on: ask gets texts of prompts, so generate() needs tokenizer= and input_ids")
        if isinstance(self.streamer, HoldBackStreamer) and (rows := self.prompt.prompts * self._copies) != 1:
            raise ProbeError(f"a HoldBackStreamer serves one row, and this call has {rows}: generate them one by one")

    def _generate(self, generate: Generate) -> Any:
        self._plain, kwargs = generate, dict(self.call.kwargs)
        kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or ()), self._force_end])
        if self.halter.follows:
            kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), self._stop])
        try:
            return generate(self.call.inputs, self.call.generation_config, **kwargs)
        except _AllHalted as halted:
            return self._without_tokens(halted.cache)
        except BaseException:
            if self.streamer is not None:  # its reader must not wait
                with contextlib.suppress(Exception):  # the first error tells more than that of a broken stream
                    self.streamer.abort() if isinstance(self.streamer, HoldBackStreamer) else self.streamer.end()
            raise

    def _decide(self, cache: Cache | None) -> None:
        with _current(None):  # functions of the user may call models with their heads
            halts = self.halter.decide(self.prompt.results(), self.prompt.prompts, self._prompt_texts)
        if None not in halts:
            if self.streamer is not None:
                self._put_reply()
                self.streamer.end()
            raise _AllHalted(cache)
        if self.reply is not None:
            self.reply.end([halt is not None for halt in halts])

    def _follow(self, scores: TokenScores) -> None:
        if not self.halter.follows:
            return
        before = self.halter.halts
        with _current(None):
            flagged = self.halter.follow(scores)
        halts = self.halter.halts
        if self.reply is not None and any(halts):
            self.reply.end([halt is not None for halt in halts])
        if self.streamer is None or len(halts) > 1:
            return
        holds_back = isinstance(self.streamer, HoldBackStreamer)
        if halts != before and holds_back:
            self.streamer.halt(self._reply())
        elif halts != before:
            self._put_reply()
        elif holds_back:
            self.streamer.scored(flagged[0])

    def _finish(self, output: Any, halts: list[Halt | None] | None = None) -> ModelOutput:
        """Put the reply of halted rows into the output, too."""
        if isinstance(output, ModelOutput):
            if self.halter.follows:
                self.halter.expand(len(output["sequences"]))
            halts = self.halter.halts
            if any(halts):
                pad = [*self.call.token_ids("pad_token_id"), *self.call.token_ids("eos_token_id"), 0][0]
                output["sequences"] = _with_reply(
                    output["sequences"], halts, self.call.prompt_length, self._reply(), pad
                )
        return super()._finish(output, halts)

    def _force_end(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Force the end-of-sequence token, or padding without one, in the rows of halted prompts. A logits processor."""
        if not any(self.halter.halts):
            return scores
        end = [*self.call.token_ids("eos_token_id"), *self.call.token_ids("pad_token_id"), 0][0]
        rows = self._halted_rows(scores)[:, None]
        scores = scores.masked_fill(rows, torch.finfo(scores.dtype).min)
        scores[:, end, None] = scores[:, end, None].masked_fill(rows, 0.0)
        return scores

    def _stop(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Stop halted rows, so that decoding ends with the last of the others. A stopping criterion."""
        return self._halted_rows(input_ids)

    def _halted_rows(self, batch: torch.Tensor) -> torch.Tensor:
        """Return a mask of the halted rows of a batch, in which beams and return sequences repeat each prompt."""
        rows = torch.tensor([halt is not None for halt in self.halter.halts], device=batch.device)
        return rows.repeat_interleave(len(batch) // len(rows))

    def _prompt_texts(self, head: str, rows: list[int]) -> list[str]:
        """Return the text that a head reads in some prompts."""
        config, mask = self.configs[head], self.prompt.masks[head][rows]
        ids = self.prompt.ids[rows]
        if config.turn_markers is not None:
            mask = mask & ~marker_mask(config.turn_markers, ids)
        counted = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
        return [text.strip() for text in self.tokenizer.batch_decode(counted, skip_special_tokens=True)]

    def _put_reply(self) -> None:
        for token in self._reply().cpu():
            self.streamer.put(token[None])

    def _reply(self) -> torch.Tensor:
        """Return the token ids of the halt reply. The LM writes a `Reprompt` once, without heads."""
        if isinstance(self._reply_ids, Reprompt):
            ids = self._reply_ids.input_ids.to(self.call.model.device)
            kwargs = {"attention_mask": torch.ones_like(ids), **self._reply_ids.kwargs}
            written = PlainSession(GenerateCall(self.call.model, ids, None, kwargs)).run(self._plain)
            sequences = written if isinstance(written, torch.Tensor) else written.sequences
            self._reply_ids = sequences[0, ids.shape[1] :]
        return self._reply_ids

    def _without_tokens(self, cache: Cache | None) -> ModelOutput:
        """Return the output of a plain `generate` that writes no token."""
        prompt = self.call.input_ids
        if prompt is None:  # the plain output for embeddings holds new tokens alone
            prompt = torch.zeros(self.prompt.prompts, 0, dtype=torch.long, device=self.call.model.device)
        sequences = prompt.repeat_interleave(self._copies, dim=0)
        per_token = ("scores", "logits", "attentions", "hidden_states")
        fields: dict[str, Any] = {name: () for name in per_token if self.call.setting(f"output_{name}")}
        fields |= {"sequences": sequences, "cache": cache}
        if (self.call.setting("num_beams") or 1) == 1:
            return GenerateDecoderOnlyOutput(**fields)
        if "scores" in fields:  # the log probability of nothing
            fields["sequences_scores"] = torch.zeros(len(sequences), device=sequences.device)
        fields["beam_indices"] = sequences.new_zeros(len(sequences), 0)
        return GenerateBeamDecoderOnlyOutput(**fields)


def generate_session(
    call: GenerateCall,
    heads: dict[str, ProbeModel],
    probe_mask: torch.Tensor | None = None,
    halt_on: HaltSpec | None = None,
    halt_reply: HaltReply | None = None,
    on_probe_token: TokenCallback | None = None,
    probe_state: ProbeCache | bool | None = None,
    abstain_at: float | dict[str, float] | None = None,
) -> PlainSession:
    """Return the session of a call with the arguments of `ProbedGenerationMixin.generate`, and the heads that run.

    Raises:
        ProbeError: the prompt cannot be scored as a whole, the replies cannot be followed, or an argument is not allowed.
    """
    halter = None
    if halt_on is not None or on_probe_token is not None:
        halter = Halter(halt_on, {name: head.config for name, head in heads.items()}, on_probe_token)
    elif halt_reply is not None:
        raise ProbeError("halt_reply is what halted prompts get, and nothing halts here: pass halt_on= as well")
    if isinstance(call.kwargs.get("streamer"), HoldBackStreamer) and not (halter is not None and halter.follows):
        raise ProbeError("a HoldBackStreamer needs halt_on= with a head that reads replies, or on_probe_token=")
    if heads and not call.returns_dict and probe_state not in (None, False):
        raise ProbeError("probe_state is returned in the output: leave return_dict_in_generate=False out")
    others: dict[str, Any] = {"probe_mask": probe_mask, "probe_state": probe_state, "abstain_at": abstain_at}
    if halter is not None:
        return HaltingSession(call, heads, halter, halt_reply, **others)
    if heads and call.returns_dict:
        return ProbedSession(call, heads, **others)
    refuse_without_heads(probe_state)
    abstain_levels(abstain_at, {name: head.config for name, head in heads.items()})  # a wrong name is refused
    return PlainSession(call)


def _with_reply(
    sequences: torch.Tensor, halts: Sequence[Halt | None], prompt_length: int, reply: torch.Tensor, pad: int
) -> torch.Tensor:
    """Replace what follows the prompt, or the last token, of each halted row: `[rows, tokens of the longest row]`.

    Args:
        sequences (`[rows, tokens]`): prompts, or return sequences of each prompt.
        halts: one entry a prompt or a row. An empty reply leaves a row that was halted on its way as it is.
        prompt_length: number of prompt tokens in `sequences`; 0 if the prompts were given as embeddings.
        reply (`[tokens]`): token ids, or none.
        pad: fills the shorter rows.
    """
    repeats = len(sequences) // len(halts)
    rows = list(sequences)
    for row, halt in enumerate(halt for halt in halts for _ in range(repeats)):
        if halt is not None and (halt.token is None or len(reply)):
            start = prompt_length + (0 if halt.token is None else halt.token + 1)
            rows[row] = torch.cat([rows[row][:start], reply.to(sequences)])
    return pad_sequence(rows, batch_first=True, padding_value=pad)
