"""Heads that follow a reply: what is read in the decoding steps of one `generate()` call, and the score of each token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from ..backbone.capture import capturing
from ..errors import ProbeError
from ..heads.probe import ProbeModel
from .arguments import GenerateCall, on_host
from .cache import ProbeCache
from .outputs import TokenScores
from .reader import StateReader


class ReplyRecorder:
    """Read the tokens of the replies into what heads keep of the prompts, so that the next prompt can go on from there.

    All tokens that a later prompt will hold count: those that are scored, and the one that ends a reply. Nothing is scored.
    Tokens wait until a chunk is full, and since `generate()` may take the last one back.

    Args:
        prompt: the session of the prompts; it has the states of its heads.
    """

    _CHUNK = 16

    def __init__(self, prompt: Any):
        self.prompt = prompt
        self.heads = {name: head for name, head in prompt.heads.items() if not head.config.skips_replies}
        self.layers: Collection[int] = {layer for head in self.heads.values() for layer in head.layer_indices}
        self._reader: StateReader | None = None
        self._states: dict[str, Any] = {}
        self._waiting: list[dict[int, torch.Tensor]] = []
        self._tokens: list[torch.Tensor] = []
        self._token_masks: list[torch.Tensor] = []

    def _start(self, rows: int) -> None:
        if self._reader is None:
            repeats = rows // self.prompt.prompts
            self._states = {name: self.prompt.state(name, repeats) for name in self.prompt.heads}
            self._reader = StateReader(self.heads, self._states, keep=self.heads)

    def begin(self, tokens: torch.Tensor, token_mask: torch.Tensor) -> None:
        """Announce one more token a row: its id, and whether it counts, `[rows]`."""
        self._start(len(tokens))
        if len(self._waiting) > self._CHUNK:
            self._read(self._CHUNK)
        self._tokens.append(tokens)
        self._token_masks.append(token_mask)
        self._waiting.append({})

    def on_state(self, layer: int, hidden: torch.Tensor) -> None:
        """Take a state `[rows, 1, hidden_size]` of the announced token."""
        if layer in self.layers:
            self._waiting[-1][layer] = hidden

    def _read(self, tokens: int) -> None:
        """Read the first of the tokens that wait."""
        if not tokens:
            return
        first = len(self._tokens) - len(self._waiting)
        chunk, self._waiting = self._waiting[:tokens], self._waiting[tokens:]
        mask = torch.stack(self._token_masks[first : first + tokens], dim=1)  # [rows, n]
        self._reader.begin(dict.fromkeys(self.heads, mask), last=False)
        for layer in sorted(self.layers):
            self._reader.on_state(layer, torch.cat([states[layer] for states in chunk], dim=1))  # [rows, n, D]
        self._reader.end()

    def probe_cache(self, rows: int, length: int) -> ProbeCache:
        """Return the state of the heads over prompts and replies, for a KV cache of `rows` rows and `length` tokens."""
        self._start(rows)
        taken_back = max(0, self.prompt.length + len(self._tokens) - length)
        self._read(max(0, len(self._waiting) - taken_back))
        count = len(self._tokens) - len(self._waiting)
        none = torch.zeros(rows, 0, dtype=torch.long)
        tokens = torch.stack(self._tokens[:count], dim=1) if count else none
        token_mask = torch.stack(self._token_masks[:count], dim=1) if count else none.bool()
        states = {name: state.joined() for name, state in self._reader.states.items()}
        host = on_host({"tokens": tokens, "token_mask": token_mask})
        return self.prompt.probe_cache({**self._states, **states}, **host)


class ReplySession:
    """Read the tokens of the replies with the heads, one a row and pass, as the LM reads them.

    A pass reads the token that the pass before it chose: scores are always of the text so far. The last token of a reply is
    read by no pass, and has no score. End-of-sequence tokens and what follows them do not count.

    Args:
        heads: those that read replies, by name.
        prompt: the session of the prompts; it has the states of the heads that read both.
        eos_token_ids: tokens that end a reply.
        pad_token_id: does not count, if replies may end without such a token: nothing else shows then that one has ended.
            `None` if none may; it is then a token like any other.
        recorder: reads the tokens as well, for the prompts that go on from here.

    Attributes:
        on_token: called at the end of each pass.
    """

    def __init__(
        self,
        heads: dict[str, ProbeModel],
        prompt: Any,
        eos_token_ids: Sequence[int] = (),
        pad_token_id: int | None = None,
        recorder: ReplyRecorder | None = None,
    ):
        self.heads, self.prompt, self.recorder = heads, prompt, recorder
        self.on_token: Callable[[TokenScores], Any] | None = None
        self._ends = torch.tensor(list(eos_token_ids), dtype=torch.long)
        self._pad = pad_token_id
        self._reader: StateReader | None = None
        # Open from the first pass that is read to the end of the session; what other passes give is not wanted.
        self._capture: AbstractContextManager[None] | None = None
        self._reading = False
        self._live: torch.Tensor | None = None
        self._ended: torch.Tensor | None = None
        self._logits: dict[str, list[torch.Tensor]] = {name: [] for name in heads}
        self._steps = 0

    def end(self, rows: Sequence[bool]) -> None:
        """Score no further token of these rows: one entry a prompt or a row."""
        self._ended = torch.tensor(list(rows))

    @contextmanager
    def reading(self, inputs: dict[str, Any]):
        """Read the states of one forward pass of the LM, which is about to run over `inputs`, and score its last token.

        Raises:
            ProbeError: the pass is not over one more token of each reply.
        """
        ids = inputs.get("input_ids")
        whole = self.prompt.length + self._steps + 1  # without a cache
        rows = 0 if ids is None else len(ids)
        same = rows == len(self._live) if self._live is not None else rows and rows % self.prompt.prompts == 0
        if ids is None or not same or ids.shape[1] not in (1, whole):
            raise ProbeError("the decoding method does not run the LM over one more token of each reply")
        if self._reader is None:
            repeats = rows // self.prompt.prompts
            states = {name: self.prompt.state(name, repeats) for name in self.heads}
            self._reader = StateReader(self.heads, states, keep=self.heads)
        if self._capture is None:
            layers = self._reader.layers | (set() if self.recorder is None else set(self.recorder.layers))
            self._capture = capturing(self.prompt.decoder, self._on_state, layers)
            self._capture.__enter__()
        token_mask = self._count(ids[:, -1])
        self._reader.begin(dict.fromkeys(self.heads, token_mask[:, None]))
        self._reading = True
        try:
            yield inputs
        finally:
            self._reading = False
        self._reader.end()
        outputs = self._reader.results()
        for name, output in outputs.items():
            unread = ~token_mask.to(output.logits.device)[:, None]
            output.logits = output.logits.masked_fill(unread, float("nan"))
            self._logits[name].append(output.logits)
        self._steps += 1
        if self.on_token is not None:
            self.on_token(TokenScores(self._steps - 1, outputs, token_mask))

    def _on_state(self, layer: int, hidden: torch.Tensor) -> None:
        if self._reading:
            # A view of the last token would keep the states of all.
            last = hidden if hidden.shape[1] == 1 else hidden[:, -1:].clone()
            self._reader.on_state(layer, last)
            if self.recorder is not None:
                self.recorder.on_state(layer, last)

    def close(self) -> None:
        """Remove the hooks from the LM. Call it at the end."""
        if self._capture is not None:
            self._capture.__exit__(None, None, None)
            self._capture = None

    def _count(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return which of these tokens, one a row, belong to a reply, `[rows]`, and announce them to the recorder."""
        ended, self._ended = self._ended, None
        if ended is not None:
            ended = ended.repeat_interleave(len(tokens) // len(ended)).to(tokens.device)
        if self._live is None:  # a prompt that was halted has no reply
            self._live = torch.ones_like(tokens, dtype=torch.bool) if ended is None else ~ended
        live, ends = self._live, torch.isin(tokens, self._ends.to(tokens.device))
        self._live = live & ~ends if ended is None else live & ~ends & ~ended
        # The end of the only reply is the end of all passes.
        counted = self._live if self._pad is None or len(tokens) == 1 else self._live & (tokens != self._pad)
        if self.recorder is not None:
            self.recorder.begin(tokens, counted | (live & ends))
        return counted

    def logits(self, rows: int, new_tokens: int) -> dict[str, torch.Tensor]:
        """Return the score after each token that was read: `[rows, new_tokens - 1, num_labels]` a head, NaN if none counted.

        Args:
            rows, new_tokens: of what `generate()` returns.
        """
        width = max(0, min(self._steps, new_tokens - 1))
        return {
            name: torch.stack(found[:width], dim=1)
            if width
            else torch.zeros(rows, 0, self.heads[name].config.num_labels, device=self.heads[name].device)
            for name, found in self._logits.items()
        }


# Settings of generate() under which its passes are not over one more token of each reply. 1 is the default of the first two.
_NOT_FOLLOWED = (
    *("num_beams", "num_beam_groups", "constraints", "force_words_ids"),
    *("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp", "penalty_alpha"),
    *("dola_layers", "custom_generate"),
)


def refuse_not_followed(what: str, call: GenerateCall) -> None:
    """Raise `ProbeError` if heads cannot follow the replies that a call writes. `what` is why they are to follow."""
    for name in _NOT_FOLLOWED:
        value = call.setting(name)
        if value and not (value == 1 and name in ("num_beams", "num_beam_groups")):
            raise ProbeError(f"{name} cannot be used with {what}: leave it out, for greedy search or sampling")
