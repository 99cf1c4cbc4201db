"""One call of `generate()` that may halt: ends replies early and puts the `halt_reply` in their place."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Callable, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput

from ..errors import ProbeError
from ..heads.decision import ProbeOutput
from ..heads.turns import marker_mask
from .arguments import GenerateCall, token_ids
from .halting import Halter, HaltReply, Reprompt
from .outputs import Halt, TokenScores
from .prefill import PrefillSession
from .session import outside_sessions
from .streaming import HoldBackStreamer


class AllHalted(Exception):
    """Leaves the plain `generate()` after the prefill if every prompt is halted."""


class HaltingRun:
    """One call of `generate()` that may halt.

    Args:
        call: the call.
        halter: decides for it.
        session: reads its prompts and replies.
        reply: its `halt_reply`; see `HaltReply`.

    Raises:
        ProbeError: the reply is not allowed, or a `HoldBackStreamer` would get several rows.
    """

    def __init__(self, call: GenerateCall, halter: Halter, session: PrefillSession, reply: HaltReply | None):
        self.call, self.halter, self.session = call, halter, session
        self.tokenizer, self.streamer = call.kwargs.get("tokenizer"), call.kwargs.get("streamer")
        self.reply = _checked(reply, self.tokenizer)
        self.copies = call.setting("num_return_sequences") or 1
        session.on_complete = self._decide
        if any(rule.ask is not None for rule in halter.rules):
            if self.tokenizer is None or session.input_ids is None:
                raise ProbeError("halt_on: ask gets texts of prompts, so generate() needs tokenizer= and input_ids")
            halter.texts = self._texts
        if halter.follows:
            session.reply.on_token = self._follow
        rows = session.prompts * self.copies
        if isinstance(self.streamer, HoldBackStreamer) and rows != 1:
            raise ProbeError(f"a HoldBackStreamer serves one row, and this call has {rows}: generate them one by one")

    def generate(self, generate: Callable) -> ModelOutput:
        """Call the plain `generate`, and put the reply of halted rows into its output."""
        self._plain_generate = generate
        ends = token_ids(self.call.setting("eos_token_id"))
        pad = [*token_ids(self.call.setting("pad_token_id")), *ends, 0][0]
        self._end = [*ends, pad][0]
        kwargs = dict(self.call.kwargs)
        kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or ()), self._force_end])
        if self.halter.follows:
            criteria = [*(kwargs.get("stopping_criteria") or ()), self._stop]
            kwargs["stopping_criteria"] = StoppingCriteriaList(criteria)
        try:
            output = generate(self.call.inputs, self.call.generation_config, **kwargs)
        except AllHalted:
            output = self._without_tokens()
        except BaseException:
            if self.streamer is not None:
                with contextlib.suppress(Exception):  # the first error tells more than that of a broken stream
                    self.streamer.abort() if isinstance(self.streamer, HoldBackStreamer) else self.streamer.end()
            raise
        if self.halter.follows:
            self.halter.expand(len(output.sequences))
        if any(self.halter.halts):
            length = 0 if self.call.input_ids is None else self.call.input_ids.shape[1]
            output.sequences = _with_reply(output.sequences, self.halter.halts, length, self._reply_tokens(), pad)
        return output

    def _force_end(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Force the end-of-sequence token, or padding without one, in the rows of halted prompts. A logits processor."""
        if not any(self.halter.halts or ()):
            return scores
        rows = self._halted_rows(scores)[:, None]
        scores = scores.masked_fill(rows, torch.finfo(scores.dtype).min)
        scores[:, self._end, None] = scores[:, self._end, None].masked_fill(rows, 0.0)
        return scores

    def _stop(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        """Stop halted rows, so that decoding ends with the last of the others. A stopping criterion."""
        return self._halted_rows(input_ids)

    def _halted_rows(self, batch: torch.Tensor) -> torch.Tensor:
        """Return a mask of the halted rows of a batch, in which beams and return sequences repeat each prompt."""
        rows = torch.tensor([halt is not None for halt in self.halter.halts], device=batch.device)
        return rows.repeat_interleave(len(batch) // len(rows))

    def _decide(self, outputs: dict[str, ProbeOutput]) -> None:
        with outside_sessions():
            halts = self.halter.decide(outputs, self.session.prompts)
        if None not in halts:
            if self.streamer is not None:
                self._put_reply()
                self.streamer.end()
            raise AllHalted
        if self.session.reply is not None:
            self.session.reply.end([halt is not None for halt in halts])

    def _texts(self, head: str, rows: list[int]) -> list[str]:
        config, mask = self.session.heads[head].config, self.session.masks[head][rows]
        ids = self.session.input_ids[rows]
        if config.turn_markers is not None:
            mask = mask & ~marker_mask(config.turn_markers, ids)
        counted = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
        return [text.strip() for text in self.tokenizer.batch_decode(counted, skip_special_tokens=True)]

    def _follow(self, scores: TokenScores) -> None:
        before = list(self.halter.halts)
        with outside_sessions():
            flagged = self.halter.follow(scores)
        halts = self.halter.halts
        if any(halts):
            self.session.reply.end([halt is not None for halt in halts])
        if self.streamer is None or len(halts) > 1:
            return
        holds_back = isinstance(self.streamer, HoldBackStreamer)
        if halts != before and holds_back:
            self.streamer.halt(self._reply_tokens())
        elif halts != before:
            self._put_reply()
        elif holds_back:
            self.streamer.scored(flagged[0])

    def _put_reply(self) -> None:
        for token in self._reply_tokens().cpu():
            self.streamer.put(token[None])

    def _reply_tokens(self) -> torch.Tensor:
        """Return the token ids of the reply. The LM writes a `Reprompt` once."""
        if isinstance(self.reply, Reprompt):
            if self.session.reply is not None:  # its hooks must not read the passes that write this
                self.session.reply.close()
                self.session.reply = None
            ids = self.reply.input_ids.to(self.call.model.device)
            written = self._plain_generate(ids, attention_mask=torch.ones_like(ids), **self.reply.kwargs)
            sequences = written if isinstance(written, torch.Tensor) else written.sequences
            self.reply = sequences[0, ids.shape[1] :]
        return self.reply

    def _without_tokens(self) -> ModelOutput:
        """Return the output of a plain `generate` that writes no token."""
        prompt = self.call.input_ids
        if prompt is None:  # the plain output for embeddings holds new tokens alone
            prompt = torch.zeros(self.session.prompts, 0, dtype=torch.long, device=self.call.model.device)
        sequences = prompt.repeat_interleave(self.copies, dim=0)
        per_token = ("scores", "logits", "attentions", "hidden_states")
        none = {name: () for name in per_token if self.call.setting(f"output_{name}")}
        if (self.call.setting("num_beams") or 1) == 1:
            return GenerateDecoderOnlyOutput(sequences=sequences, cache=self.session.cache, **none)
        if "scores" in none:  # the log probability of nothing
            none["sequences_scores"] = torch.zeros(len(sequences), device=sequences.device)
        none["beam_indices"] = sequences.new_zeros(len(sequences), 0)
        return GenerateBeamDecoderOnlyOutput(sequences=sequences, cache=self.session.cache, **none)


def _checked(reply: HaltReply | None, tokenizer) -> torch.Tensor | Reprompt:
    """Return the reply as token ids `[tokens]`, or the `Reprompt` as it is."""
    if isinstance(reply, Reprompt):
        return reply
    if isinstance(reply, str):
        if tokenizer is None:
            raise ProbeError("a text as halt_reply needs tokenizer=; or pass token ids")
        reply = tokenizer(reply, add_special_tokens=False)["input_ids"]
    try:
        ids = torch.as_tensor([] if reply is None else reply)
    except (TypeError, ValueError, RuntimeError):
        ids = None
    if ids is None or ids.dim() != 1 or (ids.is_floating_point() and len(ids)):
        shown = " ".join(reprlib.repr(reply).split())  # a tensor's text has many lines
        raise ProbeError(f"halt_reply={shown} must be token ids, a text or a Reprompt")
    return ids.long()


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
