"""Heads that follow a reply: what is read in the decoding steps of one `generate()` call, and the score of each token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from ..backbone.capture import capturing
from ..backbone.decoder import Decoder
from ..errors import ProbeError
from ..heads.probe import ProbeModel
from .cache import ProbeCache
from .outputs import TokenScores
from .reader import StateReader


class ReplyRecorder:
    """Read the tokens of the replies into what heads keep of the prompts, so that the next prompt can go on from there.

    All tokens that a later prompt will hold count: those that are scored, and the one that ends a reply. Nothing is scored.
    Tokens wait until a chunk is full, and since `generate()` may take the last one back.

    Args:
        prompt: the session of the prompts; it has the states of its heads.
        eos_token_ids: tokens that end a reply.
    """

    _CHUNK = 16

    def __init__(self, prompt: Any, eos_token_ids: Sequence[int] = ()):
        self.prompt = prompt
        self.heads = {name: head for name, head in prompt.heads.items() if not head.config.skips_replies}
        self.layers: Collection[int] = {layer for head in self.heads.values() for layer in head.layer_indices}
        self._ends = torch.tensor(list(eos_token_ids), dtype=torch.long)
        self._open: torch.Tensor | None = None
        self._reader: StateReader | None = None
        self._states: dict[str, Any] = {}
        self._waiting: list[dict[int, torch.Tensor]] = []
        self._tokens: list[torch.Tensor] = []
        self._token_masks: list[torch.Tensor] = []

    def start(self, rows: int, closed: Sequence[bool] | None = None) -> None:
        """Begin once, with one row per prompt or return sequence. `closed` rows have no reply."""
        if self._open is not None:
            return
        repeats = rows // self.prompt.prompts
        self._states = {name: self.prompt.state(name, repeats) for name in self.prompt.heads}
        self._reader = StateReader(self.heads, self._states, keep=self.heads)
        self._open = torch.ones(rows, dtype=torch.bool)
        if closed is not None:
            self._open &= ~torch.tensor(list(closed)).repeat_interleave(rows // len(closed))

    def begin(self, tokens: torch.Tensor, scored: torch.Tensor) -> None:
        """Announce one more token a row: its id, `[rows]`, and whether it is scored."""
        self._open = self._open.to(tokens.device)
        ends = torch.isin(tokens, self._ends.to(tokens.device))
        if len(self._waiting) > self._CHUNK:
            self._read(self._CHUNK)
        self._token_masks.append(self._open & (scored | ends))
        self._open = self._open & ~ends
        self._tokens.append(tokens)
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
        self.start(rows)
        taken_back = max(0, self.prompt.length + len(self._tokens) - length)
        self._read(max(0, len(self._waiting) - taken_back))
        count = len(self._tokens) - len(self._waiting)
        none = torch.zeros(rows, 0, dtype=torch.long)
        tokens = torch.stack(self._tokens[:count], dim=1) if count else none
        token_mask = torch.stack(self._token_masks[:count], dim=1) if count else none.bool()
        states = {name: state.joined() for name, state in self._reader.states.items()}
        return self.prompt.probe_cache({**self._states, **states}, tokens, token_mask)


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

    @property
    def decoder(self) -> Decoder | None:
        """The LM's decoder; see `PrefillSession`."""
        return self.prompt.decoder

    def end(self, rows: Sequence[bool]) -> None:
        """Score no further token of these rows: one entry a prompt or a row."""
        self._ended = torch.tensor(list(rows))

    @contextmanager
    def reading(self, decoder: Decoder, inputs: dict[str, Any]):
        """Read the states of one forward pass of the LM, which is about to run over `inputs`, and score its last token.

        Yields:
            The arguments with which it must run.

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
            self._capture = capturing(decoder, self._on_state, layers)
            self._capture.__enter__()
        if self.recorder is not None:
            self.recorder.start(rows, self._ended)
        tokens = ids[:, -1]
        token_mask = self._count(tokens)
        if self.recorder is not None:
            self.recorder.begin(tokens, token_mask)
        mask = token_mask[:, None]
        self._reader.begin(dict.fromkeys(self.heads, mask))
        self._reading = True
        try:
            yield inputs
        finally:
            self._reading = False
        self._reader.end()
        scores = self._score(token_mask)
        self._steps += 1
        if self.on_token is not None:
            self.on_token(scores)

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
        """Return which of these tokens, one a row, belong to a reply: `[rows]`."""
        if self._live is None:
            self._live = torch.ones_like(tokens, dtype=torch.bool)
        if self._ended is not None:
            ended = self._ended.repeat_interleave(len(tokens) // len(self._ended)).to(tokens.device)
            self._live, self._ended = self._live & ~ended, None
        self._live = self._live & ~torch.isin(tokens, self._ends.to(tokens.device))
        if self._pad is None or len(tokens) == 1:  # the end of the only reply is the end of all passes
            return self._live
        return self._live & (tokens != self._pad)

    def _score(self, token_mask: torch.Tensor) -> TokenScores:
        outputs = self._reader.results()
        for name, output in outputs.items():
            unread = ~token_mask.to(output.logits.device)[:, None]
            output.logits = output.logits.masked_fill(unread, float("nan"))
            self._logits[name].append(output.logits)
        return TokenScores(self._steps, outputs, token_mask)

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


# Settings of generate() under which its passes are not over one more token of each reply.
_BEAMS = ("num_beams", "num_beam_groups", "constraints", "force_words_ids")
_CANDIDATES = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp", "penalty_alpha")
_OTHERS = ("dola_layers", "custom_generate")


def refuse_not_followed(what: str, setting: Callable[[str], Any]) -> None:
    """Raise `ProbeError` if heads cannot follow the replies that a call of `generate()` writes.

    Args:
        what: the reason why they are to follow.
        setting: gives what the call uses for a setting, by its name; `None` if nothing says.
    """
    for name in (*_BEAMS, *_CANDIDATES, *_OTHERS):
        value = setting(name)
        if value and not (name in _BEAMS and value == 1):
            raise ProbeError(f"{name} cannot be used with {what}: leave it out, for greedy search or sampling")
