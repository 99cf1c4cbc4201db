"""One call of `generate()` that may halt: how replies end, and what is put in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput

from ..errors import ProbeError
from ..heads.decision import ProbeOutput
from .arguments import HEAD_ARGUMENTS, generation_setting, token_ids
from .halting import Halt, Halter, HaltReply, Reprompt
from .session import outside_sessions
from .streaming import HoldBackStreamer


if TYPE_CHECKING:
    from .reply import TokenScores
    from .session import PrefillSession


# How the prompt is given to generate().
_PROMPT_ARGUMENTS = ("inputs", "input_ids", "inputs_embeds", "attention_mask")
# Settings that ask for a tuple in the output, and the field that it is in.
_TUPLES = {
    "output_scores": "scores",
    "output_logits": "logits",
    "output_attentions": "attentions",
    "output_hidden_states": "hidden_states",
}


class AllHalted(Exception):
    """Leaves `generate()` at the end of the prefill, where no prompt is left to reply to."""


class HaltingProcessor(LogitsProcessor):
    """Ends the replies to halted prompts at once, where others of the batch go on.

    Args:
        halter: of the call. token: the end-of-sequence token, or where a model has none what the reply is filled with.
    """

    def __init__(self, halter: Halter, token: int):
        self.halter, self.token = halter, token

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not any(self.halter.halts or ()):
            return scores
        rows = torch.tensor([halt is not None for halt in self.halter.halts], device=scores.device)
        rows = rows.repeat_interleave(len(scores) // len(rows))  # beams and return sequences
        scores = scores.clone()
        scores[rows] = torch.finfo(scores.dtype).min
        scores[rows, self.token] = 0.0
        return scores


class HaltedRows(StoppingCriteria):
    """Says which rows have been halted, so that decoding ends with the last of the others, also where there is no EOS."""

    def __init__(self, halter: Halter):
        self.halter = halter

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        halts = self.halter.halts or [None] * len(input_ids)
        rows = torch.tensor([halt is not None for halt in halts], device=input_ids.device)
        return rows.repeat_interleave(len(input_ids) // len(rows))


class HaltingRun:
    """One call of `generate()` that may halt.

    Args:
        model: the probed model. halter, session: of the call.
        reply: what halted prompts get; see `HaltReply`.
        generation_config, kwargs: of the call.

    Raises:
        ProbeError: the reply or the streamer is not allowed.
    """

    def __init__(
        self, model, halter: Halter, session: PrefillSession, reply: HaltReply | None, generation_config, kwargs
    ):
        self.model, self.halter, self.session = model, halter, session
        self.generation_config, self.kwargs = generation_config, kwargs
        self.reply = _reply(reply, kwargs.get("tokenizer"), model.config.get_text_config(decoder=True).vocab_size)
        self.streamer = kwargs.get("streamer")
        self.copies = self._setting("num_return_sequences") or 1
        self._failed = False
        self._plain_generate: Callable | None = None
        session.on_complete = self._decide
        if halter.follows:
            session.reply.on_token = self._follow
        if isinstance(self.streamer, HoldBackStreamer) and session.prompts * self.copies != 1:
            raise ProbeError(
                f"a HoldBackStreamer serves one row, and this call has {session.prompts * self.copies}: generate them one "
                "by one"
            )

    def _decide(self, outputs: dict[str, ProbeOutput]) -> None:
        self._failed = True
        with outside_sessions():
            halts = self.halter.decide(outputs, self.session.prompts)
        self._failed = False
        if self.halter.all_halted:
            raise AllHalted
        if self.session.reply is not None:
            self.session.reply.end([halt is not None for halt in halts])

    def _follow(self, scores: TokenScores) -> None:
        self._failed = True
        before = list(self.halter.halts)
        with outside_sessions():
            flagged = self.halter.follow(scores)
        halts = self.halter.halts
        if any(halts):
            self.session.reply.end([halt is not None for halt in halts])
        if self.streamer is not None and len(halts) == 1:
            self._tell_streamer(flagged[0], halts != before)
        self._failed = False

    def _tell_streamer(self, flagged: bool, halted: bool) -> None:
        holding = isinstance(self.streamer, HoldBackStreamer)
        if halted and holding:
            self.streamer.halt(self._reply_tokens())
        elif halted:
            for token in self._reply_tokens().cpu():
                self.streamer.put(token[None])
        elif holding:
            self.streamer.scored(flagged)

    def generate(self, generate: Callable, inputs: torch.Tensor | None) -> ModelOutput:
        """Calls the plain `generate`, and puts the replies of halted prompts into what it returns."""
        self._plain_generate = generate
        end, pad = self._token("eos_token_id"), self._token("pad_token_id")
        pad = end if pad is None else pad
        pad = 0 if pad is None else pad
        kwargs = dict(self.kwargs)
        processor = HaltingProcessor(self.halter, pad if end is None else end)
        kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or ()), processor])
        if self.halter.follows:
            criteria = [*(kwargs.get("stopping_criteria") or ()), HaltedRows(self.halter)]
            kwargs["stopping_criteria"] = StoppingCriteriaList(criteria)
        prompt = inputs if inputs is not None and inputs.dim() == 2 else kwargs.get("input_ids")
        try:
            output = self._unless_all_halted(generate, inputs, kwargs, prompt)
        except BaseException:
            self._end_stream()
            raise
        if self.halter.follows:
            self.halter.expand(len(output.sequences))
        halts = self.halter.halts
        if any(halts):
            length = 0 if prompt is None else prompt.shape[1]
            output.sequences = with_replies(output.sequences, halts, length, self._reply_tokens(), pad)
        return output

    def _unless_all_halted(self, generate: Callable, inputs, kwargs, prompt: torch.Tensor | None) -> ModelOutput:
        """What the plain `generate` returns, or where no prompt is left to reply to the prompts alone."""
        try:
            return generate(inputs, self.generation_config, **kwargs)
        except AllHalted:
            pass
        if self.streamer is not None:
            self._failed = True
            for token in self._reply_tokens().cpu():
                self.streamer.put(token[None])
            self.streamer.end()
            self._failed = False
        return self._empty_output(prompt)

    def _end_stream(self) -> None:
        """Whoever waits for the stream is told that there will be no more of it, where it was a decision that failed, or what follows it."""
        if isinstance(self.streamer, HoldBackStreamer):
            self.streamer.abort()
        elif self.streamer is not None and (self._failed or self.halter.halts is None):
            self.streamer.end()

    def _setting(self, name: str):
        return generation_setting(self.model, self.generation_config, self.kwargs, name)

    def _token(self, name: str) -> int | None:
        ids = token_ids(self._setting(name))
        return ids[0] if ids else None

    def _empty_output(self, prompt: torch.Tensor | None) -> ModelOutput:
        """What the plain `generate` would have returned of the prompts alone."""
        if prompt is None:  # embeddings: the plain output holds new tokens only
            prompt = torch.zeros(self.session.prompts, 0, dtype=torch.long, device=self.model.device)
        sequences = prompt.repeat_interleave(self.copies, dim=0)
        none = {field: () for setting, field in _TUPLES.items() if self._setting(setting)}  # of no new token
        if (self._setting("num_beams") or 1) == 1:
            return GenerateDecoderOnlyOutput(sequences=sequences, cache=self.session.cache, **none)
        rows = len(sequences)
        if "scores" in none:  # the log probability of nothing
            none["sequences_scores"] = torch.zeros(rows, device=sequences.device)
        none["beam_indices"] = sequences.new_zeros(rows, 0)
        return GenerateBeamDecoderOnlyOutput(sequences=sequences, cache=self.session.cache, **none)

    def _reply_tokens(self) -> torch.Tensor:
        """The reply as token ids; one that the model writes is written once."""
        if isinstance(self.reply, Reprompt):
            if self.session.reply is not None:  # the passes that write it are no tokens of the replies
                self.session.reply.close()
                self.session.reply = None
            ids = self.reply.input_ids.to(self.model.device)
            written = self._plain_generate(ids, attention_mask=torch.ones_like(ids), **self.reply.kwargs)
            sequences = written if isinstance(written, torch.Tensor) else written.sequences
            self.reply = sequences[0, ids.shape[1] :]
        return self.reply


def _reply(reply: HaltReply | None, tokenizer, vocab_size: int) -> torch.Tensor | Reprompt:
    """Token ids, or a prompt for them."""
    if isinstance(reply, Reprompt):
        if not isinstance(reply.kwargs, Mapping):
            raise ProbeError(
                f"Reprompt.kwargs is a {type(reply.kwargs).__name__}; it must be a dict, such as {{'max_new_tokens': 20}}"
            )
        if unknown := sorted(reply.kwargs.keys() & {*_PROMPT_ARGUMENTS, *HEAD_ARGUMENTS}):
            raise ProbeError(
                f"Reprompt.kwargs has {', '.join(unknown)}: its prompt is input_ids alone, without padding, and no heads run "
                "while its reply is written; leave that out"
            )
        if not isinstance(reply.input_ids, torch.Tensor):
            raise ProbeError(
                f"Reprompt.input_ids is a {type(reply.input_ids).__name__}; it must be a tensor of shape [1, tokens], such as "
                'tokenizer(text, return_tensors="pt")["input_ids"]'
            )
        if reply.input_ids.dim() != 2 or len(reply.input_ids) != 1 or not reply.input_ids.numel():
            raise ProbeError(
                f"Reprompt.input_ids has the shape {tuple(reply.input_ids.shape)}; it must be [1, tokens], "
                "with a token at least"
            )
        _check_ids("Reprompt.input_ids", reply.input_ids, vocab_size)
        return reply
    if isinstance(reply, str):
        if tokenizer is None:
            raise ProbeError("a text as halt_reply needs tokenizer=; or pass token ids")
        reply = tokenizer(reply, add_special_tokens=False)["input_ids"]
    try:
        ids = torch.as_tensor([] if reply is None else reply)
    except (TypeError, ValueError, RuntimeError):
        raise ProbeError(
            f"halt_reply is a {type(reply).__name__}; it must be token ids, a text or a Reprompt"
        ) from None
    if ids.dim() != 1:
        raise ProbeError(f"halt_reply has the shape {tuple(ids.shape)}; it must be [tokens]")
    _check_ids("halt_reply", ids, vocab_size)
    return ids.long()


def _check_ids(name: str, ids: torch.Tensor, vocab_size: int) -> None:
    """Raises `ProbeError` where a tensor holds what is no token id of the model: no tokenizer could read such a reply."""
    whole = not ids.is_floating_point() and ids.dtype != torch.bool
    if ids.numel() and not (whole and ids.min() >= 0 and ids.max() < vocab_size):
        raise ProbeError(
            f"{name} holds {ids.flatten().tolist()[:8]}; token ids are whole numbers from 0 to {vocab_size - 1}, of the "
            "tokenizer that belongs to the model"
        )


def with_replies(
    sequences: torch.Tensor, halts: Sequence[Halt | None], prompt_length: int, reply: torch.Tensor, pad: int
) -> torch.Tensor:
    """Puts `reply` in the place of what halted prompts got, or would have got from the token on that was one too many.

    Args:
        sequences (`[rows, tokens]`): rows are prompts, or return sequences of each prompt.
        halts: one entry a prompt or a row. A reply that was halted on its way ends by itself where `reply` is empty.
        prompt_length: tokens of `sequences` that are the prompt's; 0 where prompts were given as embeddings.
        reply (`[tokens]`): may be empty.
        pad: what stands behind the shorter replies.

    Returns:
        `[rows, as many tokens as the longest row has]`.
    """
    repeats = len(sequences) // len(halts)
    starts = {}  # of the reply that is put in, by row
    for row, halt in enumerate(halt for halt in halts for _ in range(repeats)):
        if halt is not None and (halt.token is None or len(reply)):
            starts[row] = prompt_length + (0 if halt.token is None else halt.token + 1)
    untouched = sequences.shape[1] if len(starts) < len(sequences) else prompt_length
    width = max([untouched, *(start + len(reply) for start in starts.values())])
    grown = sequences.new_full((len(sequences), width), pad)
    kept = min(width, sequences.shape[1])
    grown[:, :kept] = sequences[:, :kept]
    for row, start in starts.items():
        grown[row, start:] = pad
        grown[row, start : start + len(reply)] = reply.to(sequences)
    return grown
