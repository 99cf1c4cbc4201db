"""Scores over HTTP where vLLM's own responses have no place for them: in streams, and for each of several prompts."""

from __future__ import annotations

import functools
import json
import re
import time
from contextvars import ContextVar
from typing import Any

from .settings import ProbeSettings


_CHAT, _CHATS = "/v1/chat/completions", "/v1/chat/completions/batch"
_PATHS = (_CHAT, _CHATS, "/v1/completions")
_BEAM = re.compile(r"-[0-9a-f]+-beam-\d+$")  # ends the id of a request that a beam search makes
_PREFIX, _END = b"data: ", b"data: [DONE]"


class ProbeStreams:
    """Puts `kv_transfer_params`, as complete responses have it, into the first chunk of each choice of a stream.

    For `--middleware llama_probe.vllm.middleware.ProbeStreams`, which `python -m llama_probe.vllm` adds. Where a request is
    halted that chunk is all there is of the choice: without text, with the finish reason and the stop reason of a complete
    response.

    A complete response to several prompts gets them in each choice, in place of those of the first prompt in `kv_transfer_params` of
    the whole. Beam search beside `halt_on` is refused: each of its steps is a prompt of its own, and a beam that ended would be an
    error inside of vLLM.

    It reads the outputs of the server's engine on their way to the response, and changes nothing but the response's bytes.
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
        path = next(path for path in _PATHS if scope["path"].endswith(path))
        response = _Response(send, model, chat=path == _CHAT, sign="_" if path == _CHATS else "-")
        token = _responses.set(response)
        try:
            await self.app(scope, receive, response.send)
        finally:
            _responses.reset(token)


class _Response:
    """One response on its way.

    Args:
        chat: whether it is to one chat. sign: else, what stands between the response's id and the prompt's number in the ids of
            the engine's requests.

    Attributes:
        known: what the engine says of heads, by prompt. told: the choices of a stream that have it.
        copies: choices a prompt.
    """

    def __init__(self, send: Any, model: str, chat: bool, sign: str):
        self._send, self.model, self.chat, self._sign = send, model, chat, sign
        self.is_stream = False
        self._start: dict[str, Any] | None = None  # of a complete response, until its body is complete
        self._body = b""
        self.response_id = ""
        self.copies = 1
        self.known: dict[int, dict[str, Any]] = {}
        self.told: set[int] = set()

    def note(self, request_id: str, copies: int, known: dict[str, Any]) -> None:
        """Takes what an output of the engine says; there is a request for each of several prompts."""
        if _BEAM.search(request_id):  # a prompt with a part of a reply to it
            return
        response_id, _, prompt = (request_id, "", "0") if self.chat else request_id.rpartition(self._sign)
        if prompt.isdecimal():
            self.response_id, self.copies = response_id, copies
            self.known[int(prompt)] = known

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            content_type = dict(message["headers"]).get(b"content-type", b"")
            self.is_stream = content_type.startswith(b"text/event-stream")
            if not self.is_stream and message["status"] == 200 and len(self.known) > 1:
                self._start = message
                return
        elif self._start is not None:
            self._body += message.get("body", b"")
            if message.get("more_body"):
                return
            message = {"type": "http.response.body", "body": self._complete(self._body)}
            length = (b"content-length", str(len(message["body"])).encode())
            headers = [header for header in self._start["headers"] if header[0].lower() != length[0]]
            await self._send({**self._start, "headers": [*headers, length]})
        elif self.is_stream and message.get("body") and len(self.told) < self.copies * len(self.known):
            events = message["body"].split(b"\n\n")  # vLLM sends whole events
            message = {**message, "body": b"\n\n".join(self._tell(event) for event in events)}
        await self._send(message)

    def _complete(self, body: bytes) -> bytes:
        response = json.loads(body)
        response["kv_transfer_params"] = None
        for choice in response["choices"]:
            choice["kv_transfer_params"] = self.known.get(choice["index"] // self.copies)
        return json.dumps(response, ensure_ascii=False).encode()

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


_responses: ContextVar[_Response] = ContextVar("llama_probe_responses")


def _event(chunk: dict[str, Any]) -> bytes:
    return _PREFIX + json.dumps(chunk, ensure_ascii=False).encode()


def _listen(engine: Any) -> None:
    """Has an engine client note what its outputs say of heads, for the response that they are for. Once a client."""
    if hasattr(engine, "_llama_probe_listens"):
        return
    generate = engine.generate

    @functools.wraps(generate)
    async def listening(prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any):
        if _BEAM.search(request_id) and ProbeSettings.of(engine.vllm_config).halt_on is not None:
            raise ValueError(
                "beam search does not go with heads that halt requests (--halt-on): leave use_beam_search out"
            )
        async for output in generate(prompt, sampling_params, request_id, *args, **kwargs):
            response = _responses.get(None)
            known = output.kv_transfer_params
            if response is not None and known and "probes" in known:
                response.note(request_id, sampling_params.n, known)
            yield output

    engine.generate = listening
    engine._llama_probe_listens = True
