"""Scores in streams over HTTP: vLLM's own chunks have no place for them."""

from __future__ import annotations

import functools
import json
import time
from contextvars import ContextVar
from typing import Any


_CHAT = "/v1/chat/completions"
_PATHS = (_CHAT, "/v1/completions")
_PREFIX, _END = b"data: ", b"data: [DONE]"


class ProbeStreams:
    """Puts `kv_transfer_params`, as complete responses have it, into the first chunk of each choice of a stream.

    For `--middleware llama_probe.vllm.middleware.ProbeStreams`, which `python -m llama_probe.vllm` adds. Where a request is
    halted that chunk is all there is of the choice: without text, with the finish reason and the stop reason of a complete
    response.

    It reads the outputs of the server's engine on their way to the response, and changes nothing but the stream's bytes.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].endswith(_PATHS):
            await self.app(scope, receive, send)
            return
        state = scope["app"].state
        _listen(state.engine_client)
        model = (state.args.served_model_name or [state.args.model])[0]
        stream = _Stream(send, model, chat=scope["path"].endswith(_CHAT))
        token = _streams.set(stream)
        try:
            await self.app(scope, receive, stream.send)
        finally:
            _streams.reset(token)


class _Stream:
    """One response on its way.

    Attributes:
        known: what the engine says of heads, by prompt. told: the choices that have it.
        copies: choices a prompt.
    """

    def __init__(self, send: Any, model: str, chat: bool):
        self._send, self.model, self.chat = send, model, chat
        self.is_stream = False
        self.response_id = ""
        self.copies = 1
        self.known: dict[int, dict[str, Any]] = {}
        self.told: set[int] = set()

    def note(self, request_id: str, copies: int, known: dict[str, Any]) -> None:
        """Takes what an output of the engine says; completions have a request for each of their prompts."""
        response_id, _, prompt = (request_id, "", "0") if self.chat else request_id.rpartition("-")
        if prompt.isdecimal():  # others are made on the way of a beam search
            self.response_id, self.copies = response_id, copies
            self.known[int(prompt)] = known

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            content_type = dict(message["headers"]).get(b"content-type", b"")
            self.is_stream = content_type.startswith(b"text/event-stream")
        elif self.is_stream and message.get("body") and len(self.told) < self.copies * len(self.known):
            events = message["body"].split(b"\n\n")  # vLLM sends whole events
            message = {**message, "body": b"\n\n".join(self._tell(event) for event in events)}
        await self._send(message)

    def _tell(self, event: bytes) -> bytes:
        if event.startswith(_END):
            return b"".join(_event(chunk) + b"\n\n" for chunk in self._missing()) + event
        chunk = json.loads(event[len(_PREFIX) :]) if event.startswith(_PREFIX) else {}
        choice = next(iter(chunk.get("choices") or ()), None)
        if choice is None or choice["index"] in self.told or choice["index"] // self.copies not in self.known:
            return event
        return _event(self._with_scores(chunk))

    def _with_scores(self, chunk: dict[str, Any]) -> dict[str, Any]:
        (choice,) = chunk["choices"]
        self.told.add(choice["index"])
        known = chunk["kv_transfer_params"] = self.known[choice["index"] // self.copies]
        if known.get("halted"):
            choice.update(finish_reason="stop", stop_reason=known["halted"]["head"])
        return chunk

    def _missing(self) -> list[dict[str, Any]]:
        """Chunks of choices without a token, of which vLLM's server says nothing."""
        chunks = []
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        for prompt, known in sorted(self.known.items()):
            for index in range(prompt * self.copies, (prompt + 1) * self.copies):
                if known.get("halted") and index not in self.told:
                    choice = {"index": index, "logprobs": None, **({"delta": {}} if self.chat else {"text": ""})}
                    head = {"id": self.response_id, "object": kind, "created": int(time.time()), "model": self.model}
                    chunks.append(self._with_scores({**head, "choices": [choice]}))
        return chunks


_streams: ContextVar[_Stream] = ContextVar("llama_probe_streams")


def _event(chunk: dict[str, Any]) -> bytes:
    return _PREFIX + json.dumps(chunk, ensure_ascii=False).encode()


def _listen(engine: Any) -> None:
    """Has an engine client note what its outputs say of heads, for the response that they are for. Once a client."""
    if hasattr(engine, "_llama_probe_listens"):
        return
    generate = engine.generate

    @functools.wraps(generate)
    async def listening(prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any):
        async for output in generate(prompt, sampling_params, request_id, *args, **kwargs):
            stream = _streams.get(None)
            known = output.kv_transfer_params
            if stream is not None and known and "probes" in known:
                stream.note(request_id, sampling_params.n, known)
            yield output

    engine.generate = listening
    engine._llama_probe_listens = True
