"""The passes over reply tokens: heads score each token, or read it for the next turn."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from ..backbone.capture import capturing
from ..errors import ProbeError
from ..heads.probe import ProbeModel
from .cache import ProbeCache
from .outputs import TokenScores, on_host
from .reader import PromptReader, StateReader


class ReplyReader:
    """Read the tokens of replies with heads, one a row and pass, as the LM reads them.

    A pass reads the token that the pass before it chose: scores are always of the text so far. The last token of a reply is
    read by no pass, and has no score. End-of-sequence tokens and what follows them do not count. For `probe_state` heads of the
    prompt read the tokens as well, with the one that ends a reply: all that a later prompt will hold.

    Args:
        heads: those that score replies, by name.
        prompt: has read the prompts, with the heads that read both.
        eos_token_ids: tokens that end a reply.
        pad_token_id: does not count, if replies may end without such a token: nothing else shows then that one has ended.
            None if none may; it is then a token like any other.

    """

    def __init__(
        self,
        heads: dict[str, ProbeModel],
        prompt: PromptReader,
        eos_token_ids: Sequence[int] = (),
        pad_token_id: int | None = None,
    ):
        self.heads, self.prompt = heads, prompt
        self._ends, self._pad = torch.tensor(list(eos_token_ids), dtype=torch.long), pad_token_id
        self.recorder = ReplyRecorder(prompt) if prompt.return_state else None
        self._reader: StateReader | None = None
        self._hooks = ExitStack()  # from the first pass that is read to the end of the session
        self._reading = False  # what other passes give is not wanted
        self._live: torch.Tensor | None = None
        self._ended: torch.Tensor | None = None
        self._logits: dict[str, list[torch.Tensor]] = {name: [] for name in heads}
        self._steps = 0

    def end(self, rows: Sequence[bool]) -> None:
        """Score no further token of these rows: one entry a prompt or a row."""
        self._ended = torch.tensor(list(rows))

    @contextmanager
    def reading(self, inputs: dict[str, Any]) -> Generator[Callable[[], TokenScores]]:
        """Read the states of one forward pass of the LM, which is about to run over `inputs`, and score its last token.

        Yield a function that returns the scores once the pass is over.

        Raises:
            ProbeError: the pass is not over one more token of each reply.
        """
        ids = inputs.get("input_ids")
        whole = self.prompt.length + self._steps + 1  # without a cache
        rows = 0 if ids is None else len(ids)
        same = rows == len(self._live) if self._live is not None else rows and rows % self.prompt.prompts == 0
        if ids is None or not same or ids.shape[1] not in (1, whole):
            raise ProbeError("the decoding method does not run the LM over one more token of each reply")
        reader = self._reader or self._open(rows)
        token_mask = self._count(ids[:, -1])
        reader.begin(dict.fromkeys(self.heads, token_mask[:, None]))
        self._reading = True
        try:
            yield lambda: TokenScores(self._steps - 1, outputs, token_mask)
        finally:
            self._reading = False
        reader.end()
        outputs = reader.results()
        for name, output in outputs.items():
            unread = ~token_mask.to(output.logits.device)[:, None]
            output.logits = output.logits.masked_fill(unread, float("nan"))
            self._logits[name].append(output.logits)
        self._steps += 1

    def _open(self, rows: int) -> StateReader:
        states = {name: self.prompt.state(name, rows // self.prompt.prompts) for name in self.heads}
        reader = self._reader = StateReader(self.heads, states, keep=self.heads)
        layers = reader.layers | (set() if self.recorder is None else self.recorder.layers)
        self._hooks.enter_context(capturing(self.prompt.decoder, partial(self._on_state, reader), layers))
        return reader

    def _on_state(self, reader: StateReader, layer: int, hidden: torch.Tensor) -> None:
        if self._reading:
            # A view of the last token would keep the states of all.
            last = hidden if hidden.shape[1] == 1 else hidden[:, -1:].clone()
            reader.on_state(layer, last)
            if self.recorder is not None:
                self.recorder.on_state(layer, last)

    def __enter__(self) -> ReplyReader:
        return self

    def __exit__(self, *error: Any) -> None:
        """Remove the hooks from the LM."""
        self._hooks.close()

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
            rows, new_tokens: of the output of `generate()`.
        """
        width = max(0, min(self._steps, new_tokens - 1))
        return {
            name: torch.stack(logits[:width], dim=1)
            if width
            else torch.zeros(rows, 0, self.heads[name].config.num_labels, device=self.heads[name].device)
            for name, logits in self._logits.items()
        }


class ReplyRecorder:
    """Reads the tokens of replies into what heads keep of the prompts. Nothing is scored.

    Tokens wait until a chunk is full, and since `generate()` may take the last one back.
    """

    _CHUNK = 16

    def __init__(self, prompt: PromptReader):
        self.prompt = prompt
        self.heads = {name: head for name, head in prompt.heads.items() if not head.config.skips_replies}
        self.layers = {layer for head in self.heads.values() for layer in head.layer_indices}
        self._states: dict[str, Any] = {}
        self._reader: StateReader | None = None
        self._tokens: list[
            tuple[torch.Tensor, torch.Tensor]
        ] = []  # ids of all tokens, and whether they count, [rows] each
        self._waiting: list[dict[int, torch.Tensor]] = []  # states of the last of them by layer

    def _open(self, rows: int) -> StateReader:
        if self._reader is None:
            repeats = rows // self.prompt.prompts
            self._states = {name: self.prompt.state(name, repeats) for name in self.prompt.heads}
            self._reader = StateReader(self.heads, self._states, keep=self.heads)
        return self._reader

    def begin(self, tokens: torch.Tensor, token_mask: torch.Tensor) -> None:
        """Announce one more token a row: its id, and whether it counts, `[rows]`."""
        reader = self._open(len(tokens))
        if len(self._waiting) > self._CHUNK:
            self._read(reader, self._CHUNK)
        self._tokens.append((tokens, token_mask))
        self._waiting.append({})

    def on_state(self, layer: int, hidden: torch.Tensor) -> None:
        """Take a state `[rows, 1, hidden_size]` of the announced token."""
        if layer in self.layers:
            self._waiting[-1][layer] = hidden

    def _read(self, reader: StateReader, count: int) -> None:
        """Read the first of the tokens that wait."""
        first = len(self._tokens) - len(self._waiting)
        states, self._waiting = self._waiting[:count], self._waiting[count:]
        mask = torch.stack([counted for _, counted in self._tokens[first : first + count]], dim=1)  # [rows, n]
        reader.begin(dict.fromkeys(self.heads, mask), last=False)
        for layer in sorted(self.layers):
            reader.on_state(layer, torch.cat([state[layer] for state in states], dim=1))  # [rows, n, D]
        reader.end()

    def probe_cache(self, rows: int, length: int) -> ProbeCache:
        """Return the state of the heads over prompts and replies, for a KV cache of `rows` rows and `length` tokens."""
        reader = self._open(rows)
        length -= self.prompt.length  # reply tokens in the KV cache
        if (count := length - len(self._tokens) + len(self._waiting)) > 0:
            self._read(reader, min(count, len(self._waiting)))
        read = self._tokens[: len(self._tokens) - len(self._waiting)]
        empty = torch.zeros(rows, 0, dtype=torch.long)
        tokens, token_mask = (
            (torch.stack(part, dim=1) for part in zip(*read, strict=True)) if read else (empty, empty.bool())
        )
        states = self._states | {name: state.joined() for name, state in reader.states.items()}
        return self.prompt.probe_cache(states, **on_host({"tokens": tokens, "token_mask": token_mask}))
