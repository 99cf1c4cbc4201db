"""A streamer that shows a reply only as far as heads have passed it."""

from __future__ import annotations

from collections import deque

import torch
from transformers.generation.streamers import BaseStreamer

from ..errors import ProbeError


class HoldBackStreamer(BaseStreamer):
    """Holds a reply's tokens back from another streamer until heads have scored them, and what follows, without a flag.

        streamer = HoldBackStreamer(TextStreamer(tokenizer, skip_prompt=True), tokens=8)
        model.generate(**inputs, streamer=streamer, halt_on={"guard": {"threshold": 0.5}})

    A token is shown once it and the `tokens` after it have been scored, and `halt_on` flagged none of them. Where a flag
    was not followed by a halt, because `patience` did not come to its end, the tokens before it are shown once as many
    later ones are clear. A halt drops what is held: nothing that a flag stood on was shown, nor the `tokens` before it.
    Then comes the `halt_reply` of the call, if it has one, and the end. A reply that comes to its own end is shown whole; its
    last token is the only one that no head has scored.

    It serves one row at a time, as transformers' streamers do, and may be used again for the next call.

    Args:
        streamer: any streamer of transformers, such as `TextStreamer` or `TextIteratorStreamer`.
        tokens: how many further tokens must be clear; with 0 a token is shown as soon as it is.

    Raises:
        ProbeError: `tokens` is no such number.
    """

    def __init__(self, streamer: BaseStreamer, tokens: int = 8):
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0:
            raise ProbeError(f"tokens={tokens!r} must be a whole number from 0: how many clear tokens must follow")
        self.streamer, self.tokens = streamer, tokens
        self._reset()

    def _reset(self) -> None:
        self._held: deque[torch.Tensor] = deque()
        self._clear = 0
        self._prompt_seen = self._halted = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, which goes on at once, and then the tokens of the reply."""
        if self._prompt_seen and not self._halted:
            self._held.append(value)
        elif not self._prompt_seen:
            self._prompt_seen = True
            self.streamer.put(value)

    def scored(self, flagged: bool) -> None:
        """Says that the token that was put last has been scored, and whether it was flagged. `generate` calls it."""
        self._clear = 0 if flagged else self._clear + 1
        if self._clear > self.tokens:
            while len(self._held) > self.tokens:
                self.streamer.put(self._held.popleft())

    def halt(self, reply: torch.Tensor) -> None:
        """Drops what is held, and ends with these token ids in its place. `generate` calls it; what it puts later is dropped."""
        self._held.clear()
        for token in reply.cpu():
            self.streamer.put(token[None])
        self.streamer.end()
        self._halted = True

    def abort(self) -> None:
        """Drops what is held, and ends, where the call goes no further. `generate` calls it."""
        self._held.clear()
        self._end()

    def end(self) -> None:
        """Shows what is still held, and ends."""
        if not self._halted:
            for value in self._held:
                self.streamer.put(value)
        self._end()

    def _end(self) -> None:
        try:
            if not self._halted:
                self.streamer.end()
        finally:  # what is held of this reply must not be shown with the next
            self._reset()
