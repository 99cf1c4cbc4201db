"""One call of `generate()` with heads, from the prompt to the output: `ProbedSession`."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module
from transformers.utils import ModelOutput

from ..backbone.decoder import find_decoder
from ..backbone.kv_cache import cached_tokens
from ..errors import ProbeError
from ..heads.novelty import abstain_levels
from ..heads.probe import ProbeModel
from .cache import ProbeCache, asks_for_state, refuse_without_heads
from .halting import Halter, HaltReply, HaltSpec, HoldBackStreamer, TokenCallback, reply_tokens
from .host import CausalLM
from .outputs import Halt, TokenScores, with_results
from .reader import PromptReader, ReplyReader
from .texts import texts_read


PAGED = "heads cannot read prompts in a paged cache; use generate(), or set_active_probes([]) to go without heads"
# Arguments of `generate()` that transformers does not have.
HEAD_ARGUMENTS = ("probes", "probe_mask", "halt_on", "halt_reply", "on_probe_token", "probe_state", "abstain_at")
# Settings under which a pass of the LM is not over one more token of each reply: heads cannot follow such replies.
_ASSISTED = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp")
_NOT_FOLLOWED = ("num_beams", *_ASSISTED, "custom_generate")

# The session of this thread. The outermost call of `generate()` decides which heads run. Calls that the decoding method makes
# itself (assistants, early exits) run without heads.
_ACTIVE_SESSION: ContextVar[PlainSession | None] = ContextVar("probe_session", default=None)


@contextlib.contextmanager
def _activate(session: PlainSession | None):
    token = _ACTIVE_SESSION.set(session)
    try:
        yield
    finally:
        _ACTIVE_SESSION.reset(token)


def session_of(model: nn.Module) -> PlainSession | None:
    """Return the session of the `generate()` call that `model` is in, or None."""
    session = _ACTIVE_SESSION.get()
    return session if session is not None and session.model is model else None


@dataclass
class PlainSession:
    """One call of `generate()` in which no head runs, with its arguments and settings.

    It is used for `probes=[]`, for plain outputs and for calls inside another call.

    Attributes:
        generate: the method of transformers, bound to the model.
        reads_prompt: the next pass is over the prompt, and heads read it.
        reads_next: heads read the next pass.
    """

    generate: Callable[..., Any]
    model: CausalLM
    inputs: torch.Tensor | None
    generation_config: GenerationConfig | None
    kwargs: dict[str, Any]
    reads_prompt: bool = False
    reads_next: bool = False

    def run(self) -> Any:
        """Call the plain `generate()`, and return its output."""
        with _activate(self):
            return self.generate(self.inputs, self.generation_config, **self.kwargs)

    @property
    def input_ids(self) -> torch.Tensor | None:
        """Token ids of the prompts; None if there are embeddings alone."""
        return self.kwargs.get("input_ids") if self.inputs is None else self.inputs

    @property
    def returns_dict(self) -> bool:
        """True if the call returns an output, the default with heads. False if it returns the tokens alone."""
        chosen = getattr(self.generation_config, "return_dict_in_generate", None)
        return self.kwargs.get("return_dict_in_generate", chosen) in (None, True)

    def setting(self, name: str) -> Any:
        """Return a setting from the arguments, the config among them or the model's config; None if none has it."""
        if name in self.kwargs:
            return self.kwargs[name]
        value = getattr(self.generation_config, name, None)
        return getattr(self.model.generation_config, name, None) if value is None else value

    def token_ids(self, *names: str) -> list[int]:
        """Return the token ids in settings such as `eos_token_id`: none, one or several each."""
        values = [value for value in map(self.setting, names) if value is not None]
        return [number for value in values for number in torch.as_tensor(value, device="cpu").flatten().tolist()]

    def change(self, name: str, value: Any) -> None:
        """Change a setting, in a copy of the config if the call has one: transformers deprecates arguments beside a config."""
        if self.generation_config is None or name in self.kwargs:
            self.kwargs[name] = value
        else:
            self.generation_config = copy.deepcopy(self.generation_config)
            setattr(self.generation_config, name, value)

    def prompts(self) -> dict[str, Any]:
        """Return `input_ids` or `inputs_embeds`, and `attention_mask` as `generate()` takes or infers it."""
        embeds = self.kwargs.get("inputs_embeds")
        # generate() ignores ids beside embeddings, but for bookkeeping
        ids = self.input_ids if embeds is None else None
        mask = self.kwargs.get("attention_mask")
        if mask is None and isinstance(ids, torch.Tensor):  # anything else is refused with the other tensors
            pad = self.token_ids("pad_token_id")[:1]
            mask = None if not pad or pad[0] in self.token_ids("eos_token_id") else ids != pad[0]
        return {"input_ids": ids, "inputs_embeds": embeds, "attention_mask": mask}

    def check(self, follows: bool) -> None:
        """Raise `ProbeError` if heads cannot read the prompts, or with `follows` the replies."""
        if self.setting("cache_implementation") == "paged":
            raise ProbeError(PAGED)
        if self.setting("token_healing"):
            raise ProbeError(
                "token_healing rewrites the end of the prompt after the heads have read it; switch one of them off"
            )
        if not follows:
            return
        for name in _NOT_FOLLOWED:
            value = self.setting(name)
            if value and (name, value) != ("num_beams", 1):
                hint = "leave it out, for greedy search or sampling"
                raise ProbeError(f"{name} cannot be used with heads or a probe_state that follow the reply: {hint}")


class _AllHalted(Exception):
    """Leaves the plain `generate()` if all prompts are halted, so that no token is written. It carries their KV cache."""


class ProbedSession(PlainSession):
    """One call of `generate()` with heads that read the prompt and the reply.

    `run` calls the plain `generate()`. That calls the model, and the model calls `forward` for each pass that heads read.
    After the prompt `forward` calls `_decide`, after a reply token `_follow`. `_finish` puts the results into the output.
    """

    def __init__(
        self,
        call: PlainSession,
        heads: dict[str, ProbeModel],
        halter: Halter,
        halt_reply: HaltReply | None = None,
        probe_mask: torch.Tensor | None = None,
        probe_state: ProbeCache | bool | None = None,
        abstain_at: float | dict[str, float] | None = None,
    ):
        super().__init__(call.generate, call.model, call.inputs, call.generation_config, call.kwargs)
        self.reads_prompt = self.reads_next = True
        self.heads, self.halter = heads, halter
        self.levels = abstain_levels(abstain_at, {name: head.config for name, head in heads.items()})
        tokenizer = self.kwargs.get("tokenizer")
        self.tokenizer: Any = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has one
        self.streamer: Any = self.kwargs.get("streamer")
        if halter.is_active:
            self._reply_ids = reply_tokens(halt_reply, self.tokenizer)
        self._copies = self.setting("num_return_sequences") or 1
        inputs = self.prompts()
        keep = asks_for_state(probe_state, inputs["input_ids"], self.setting("use_cache"))
        self._followers = {name: head for name, head in heads.items() if head.config.reads_reply}
        self._follows = bool(self._followers) or keep
        self.check(self._follows)
        self.prompt = PromptReader(
            {name: head for name, head in heads.items() if head.config.token_scope != "response"},
            find_decoder(self.model),
            inputs,
            probe_mask,
            past=cached_tokens(self.kwargs),
            earlier=probe_state if isinstance(probe_state, ProbeCache) else None,
            return_state=keep,
        )
        self.reply: ReplyReader | None = None  # once the prompt is complete
        self._hooks = contextlib.ExitStack()  # of `reply`
        if any(rule.ask for rule in halter.rules) and (self.tokenizer is None or self.prompt.input_ids is None):
            raise ProbeError("halt_on: ask gets texts of prompts, so generate() needs tokenizer= and input_ids")
        rows = self.prompt.prompts * self._copies
        if isinstance(self.streamer, HoldBackStreamer) and rows != 1:
            raise ProbeError(f"a HoldBackStreamer serves one row, and this call has {rows}: generate them one by one")

    def run(self) -> ModelOutput | torch.Tensor:
        """Call the plain `generate()`. Return its output with the results of the heads, or the tokens if they are wanted alone."""
        as_dict = self.returns_dict
        self.change("return_dict_in_generate", True)
        if self._follows and "disable_compile" not in self.kwargs:
            self.change("disable_compile", True)  # hooks and a state that grows would only break its graphs
        kwargs = dict(self.kwargs)
        if self.halter.is_active:
            processors = kwargs.get("logits_processor") or ()
            kwargs["logits_processor"] = LogitsProcessorList([*processors, self._force_end])
        if self.halter.follows:
            criteria = kwargs.get("stopping_criteria") or ()
            kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, self._stop])
        with _activate(self), self._hooks:
            try:
                output = self.generate(self.inputs, self.generation_config, **kwargs)
            except _AllHalted as halted:
                output = self._without_tokens(*halted.args)
            output = self._finish(output)
        return output if as_dict else output["sequences"]

    def forward(self, forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """Run one forward pass of the LM with the heads reading it, and decide on their scores."""
        if self.reply is None:  # the prompt is not complete
            with self.prompt.reading(inputs) as inputs:
                output: Any = forward(**inputs)
            if self.prompt.complete:
                self._decide(getattr(output, "cache", inputs.get("cache")))
            return output
        with self.reply.reading(inputs):
            output = forward(**inputs)
        self._follow(self.reply, self.reply.scores())
        return output

    def _decide(self, cache: Cache | None) -> None:
        """Decide on the prompts, which the LM has just read into its KV cache."""
        self.reads_prompt = False
        self.reads_next = self._follows
        if self._follows:
            pad = None
            if self.setting("stop_strings") or self.kwargs.get("stopping_criteria"):
                pad = next(iter(self.token_ids("pad_token_id")), None)
            ends = self.token_ids("eos_token_id")
            self.reply = ReplyReader(self._followers, self.prompt, self._copies, ends, pad)
            self._hooks.enter_context(self.reply.capturing())
        with _activate(None):  # functions of the user may call models with their heads
            halts = self.halter.decide(self.prompt.results, self.prompt.prompts, self._prompt_texts, self._copies)
        if None not in halts:
            if self.streamer is not None:
                self._put_reply()
            if not self._waits_for_others():
                if self.streamer is not None:
                    self.streamer.end()
                raise _AllHalted(cache)
        if self.reply is not None and any(halts):
            self.reply.end([halt is not None for halt in halts])

    def _waits_for_others(self) -> bool:
        """Return True if processes share the model (FSDP, ZeRO-3). All of them then run until the last one is done."""
        chosen = self.kwargs.get("synced_gpus")
        if chosen is not None:
            return chosen
        is_shared = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(self.model)
        is_divided = torch.distributed.is_available() and torch.distributed.is_initialized()
        return is_shared and is_divided and torch.distributed.get_world_size() > 1

    def _follow(self, reply: ReplyReader, scores: TokenScores) -> None:
        """Decide on one more token of each reply."""
        if not self.halter.follows:
            return
        before = self.halter.halts
        with _activate(None):
            flagged = self.halter.follow(scores)
        halts = self.halter.halts
        holds_back = isinstance(self.streamer, HoldBackStreamer)
        if halts != before:
            reply.end([halt is not None for halt in halts])
            if holds_back:
                self.streamer.halt(self._reply_ids)
            elif self.streamer is not None and len(halts) == 1:
                self._put_reply()
        elif holds_back:
            self.streamer.scored(flagged[0])

    def _finish(self, output: Any) -> ModelOutput:
        """Put the results of the heads, and the reply of halted rows, into the output of the plain `generate()`."""
        if not isinstance(output, ModelOutput):
            hint = "let it return a generate output, or pass return_dict_in_generate=False"
            raise ProbeError(f"custom_generate returned a {type(output).__name__}, which cannot carry logits: {hint}")
        start = 0 if self.input_ids is None else self.input_ids.shape[1]  # embeddings are not returned
        halts = self.halter.halts
        fields: dict[str, Any] = {}
        if self.halter.is_active:
            fields["probe_halts"] = halts
        if any(halts):
            pad = [*self.token_ids("pad_token_id", "eos_token_id"), 0][0]
            output["sequences"] = _with_reply(output["sequences"], halts, start, self._reply_ids, pad)
        sequences = output["sequences"]
        if self.reply is not None:
            fields["probe_token_logits"] = self.reply.logits(sequences.shape[1] - start) or None
            if self.prompt.return_state:
                fields["probe_state"] = self.reply.probe_cache(cached_tokens(output))
        if self.tokenizer is not None:
            fields["texts"] = self.tokenizer.batch_decode(sequences[:, start:], skip_special_tokens=True)
        probed = with_results(output, self.prompt.results, self.heads, **fields)
        if self.levels:
            probed.abstain_at = self.levels
        return probed

    def _force_end(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Force the end-of-sequence token, or padding if there is none, in halted rows. A logits processor."""
        if not any(self.halter.halts):
            return scores
        end = [*self.token_ids("eos_token_id", "pad_token_id"), 0][0]
        forced = torch.full_like(scores, torch.finfo(scores.dtype).min)
        forced[:, end] = 0.0
        return torch.where(self._halted_rows(scores)[:, None], forced, scores)

    def _stop(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Stop halted rows, so that decoding ends with the last row that is not halted. A stopping criterion."""
        return self._halted_rows(input_ids)

    def _halted_rows(self, batch: torch.Tensor) -> torch.Tensor:
        """Return a mask of the halted rows of a batch, in which beams and return sequences repeat each prompt."""
        rows = torch.tensor([halt is not None for halt in self.halter.halts], device=batch.device)
        return rows.repeat_interleave(len(batch) // len(rows))

    def _prompt_texts(self, head: str, rows: list[int]) -> list[str]:
        """Return the text that a head reads in some prompts."""
        mask = self.prompt.masks[head][rows].bool()
        return texts_read(self.heads[head].config, self.prompt.input_ids[rows], mask, self.tokenizer)

    def _put_reply(self) -> None:
        for token in self._reply_ids.cpu():
            self.streamer.put(token[None])

    def _without_tokens(self, cache: Cache | None) -> ModelOutput:
        """Return the output of a plain `generate()` that writes no token."""
        prompt = self.input_ids
        if prompt is None:  # the plain output for embeddings holds new tokens alone
            prompt = torch.zeros(self.prompt.prompts, 0, dtype=torch.long, device=self.prompt.decoder.input_device)
        sequences = prompt.repeat_interleave(self._copies, dim=0)
        per_token = ("scores", "logits", "attentions", "hidden_states")
        fields: dict[str, Any] = {name: () for name in per_token if self.setting(f"output_{name}")}
        fields |= {"sequences": sequences, "cache": cache}
        if (self.setting("num_beams") or 1) == 1:
            return GenerateDecoderOnlyOutput(**fields)
        if "scores" in fields:  # the log probability of nothing
            fields["sequences_scores"] = torch.zeros(len(sequences), device=sequences.device)
        fields["beam_indices"] = sequences.new_zeros(len(sequences), 0)
        return GenerateBeamDecoderOnlyOutput(**fields)


def generate_session(
    call: PlainSession,
    heads: dict[str, ProbeModel],
    halt_on: HaltSpec | None,
    on_probe_token: TokenCallback | None,
    **arguments: Any,
) -> PlainSession:
    """Return the session of a call of `ProbedGenerationMixin.generate`, for the heads that run and its `HEAD_ARGUMENTS`."""
    for config in (call.generation_config, call.model.generation_config):
        for name in HEAD_ARGUMENTS:
            if getattr(config, name, None) is not None:  # a config takes any name, and nothing would be halted
                raise ProbeError(f"{name} in a generation_config: pass it to generate() itself, {name}=...")
    halter = Halter(halt_on, {name: head.config for name, head in heads.items()}, on_probe_token)
    if arguments["halt_reply"] is not None and not halter.is_active:
        raise ProbeError("halt_reply is what halted prompts get, and nothing halts here: pass halt_on= as well")
    if isinstance(call.kwargs.get("streamer"), HoldBackStreamer) and not halter.follows:
        raise ProbeError("a HoldBackStreamer needs halt_on= with a head that reads replies, or on_probe_token=")
    if heads and not call.returns_dict and arguments["probe_state"]:
        raise ProbeError("probe_state is returned in the output: leave return_dict_in_generate=False out")
    if halter.is_active or (heads and call.returns_dict):
        return ProbedSession(call, heads, halter, **arguments)
    refuse_without_heads(arguments["probe_state"])
    return call


def end_stream(streamer: Any) -> None:
    """End a stream after an error: its reader must not wait."""
    if streamer is not None:
        with contextlib.suppress(Exception):  # the first error tells more than that of a broken stream
            streamer.abort() if isinstance(streamer, HoldBackStreamer) else streamer.end()


def _with_reply(
    sequences: torch.Tensor, halts: Sequence[Halt | None], prompt_length: int, reply: torch.Tensor, pad: int
) -> torch.Tensor:
    """Put `reply` into halted rows, after the prompt or after the token that halts: `[rows, tokens of the longest row]`.

    An empty reply leaves a row whose reply was begun as it is.

    Args:
        halts: one entry a prompt, or one a row.
    """
    repeats = len(sequences) // len(halts)
    rows = list(sequences)
    for row, tokens in enumerate(sequences):
        halt = halts[row // repeats]
        if halt is None:
            continue
        if halt.token is None:
            rows[row] = torch.cat([tokens[:prompt_length], reply.to(tokens)])
        elif len(reply):
            rows[row] = torch.cat([tokens[: prompt_length + halt.token + 1], reply.to(tokens)])
    return pad_sequence(rows, batch_first=True, padding_value=pad)
