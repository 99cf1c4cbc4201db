"""A streamer that shows a reply only as far as the heads have cleared it."""

from __future__ import annotations

from collections import deque

import torch
from transformers.generation.streamers import BaseStreamer

from ..errors import ProbeError


class HoldBackStreamer(BaseStreamer):
    """Holds back the tokens of a reply until heads have scored them, and the tokens after them, without a flag.

        streamer = HoldBackStreamer(TextStreamer(tokenizer, skip_prompt=True), tokens=8)
        model.generate(**inputs, streamer=streamer, halt_on={"guard": {"threshold": 0.5}})

    A token is shown once it and the next `tokens` are scored and `halt_on` flagged none of them. A flag that does not halt
    yet (`patience`) holds the tokens before it until `tokens` later ones are clear. A halt drops the held tokens: neither a
    flagged token nor the `tokens` before it were shown. Then follow the `halt_reply` of the call and the end. A reply that
    ends by itself is shown whole; its last token is the only one without a score.

    It serves one row at a time, as the streamers of transformers do, and one call after another.

    Args:
        streamer: any streamer of transformers, such as `TextStreamer` or `TextIteratorStreamer`.
        tokens: number of further tokens that must be clear. With 0 a token is shown as soon as it is clear.

    Raises:
        ProbeError: `tokens` is below 0.
    """

    def __init__(self, streamer: BaseStreamer, tokens: int = 8):
        if tokens < 0:
            raise ProbeError(f"tokens={tokens} must be a whole number from 0")
        self.streamer, self.tokens = streamer, tokens
        self._reset()

    def _reset(self) -> None:
        self._held: deque[torch.Tensor] = deque()
        self._clear = 0
        self._prompt_seen = self._halted = False

    def put(self, value: torch.Tensor) -> None:
        """Show the prompt at once, and hold the tokens of the reply."""
        if not self._prompt_seen:
            self._prompt_seen = True
            self.streamer.put(value)
        elif not self._halted:
            self._held.append(value)

    def scored(self, flagged: bool) -> None:
        """Record the flag of the token that was put last. Called by `generate`."""
        self._clear = 0 if flagged else self._clear + 1
        if self._clear > self.tokens:
            while len(self._held) > self.tokens:
                self.streamer.put(self._held.popleft())

    def halt(self, reply: torch.Tensor) -> None:
        """Drop the held tokens, show `reply` and end; later tokens are dropped. Called by `generate`."""
        self._held.clear()
        for token in reply.cpu():
            self.streamer.put(token[None])
        self.streamer.end()
        self._halted = True

    def abort(self) -> None:
        """Drop the held tokens and end after an error. Called by `generate`."""
        self._held.clear()
        self.end()

    def end(self) -> None:
        """Show the held tokens and end."""
        try:
            if not self._halted:
                while self._held:
                    self.streamer.put(self._held.popleft())
                self.streamer.end()
        finally:  # held tokens of this reply must not be shown with the next
            self._reset()
