"""What vLLM's server does not do for heads over HTTP: scores in streams and as a header, and halts that a client sees."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any

from fastapi import HTTPException

from .payloads import HALTED, Scores
from .settings import ProbeSettings


_BEAM = re.compile(r"-[0-9a-f]+-beam-\d+$")  # ends the id of a request that a beam search makes
_UNSCORED = b"event: response."  # a stream of /v1/responses begins before its prompt is read
_HEADER = b"x-llama-probe"


class ProbeStreams:
    """Put scores and halts into every response to a prompt.

    For `--middleware llama_probe.vllm.middleware.ProbeStreams`, which `python -m llama_probe.vllm` adds. It reads the outputs of the
    server's engine on their way to the response, and changes the finish reason of halted ones. The server then makes
    responses of them; what it has no place for is added to their bytes, see `Scores`.

    A request for unknown heads is refused. So is beam search beside `halt_on`: each of its steps is a prompt of its own, and
    a beam that ended would be an error inside of vLLM.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        state = scope["app"].state
        settings = ProbeSettings.of(state.engine_client.vllm_config)
        _listen(state.engine_client, settings)
        model = (state.args.served_model_name or [state.args.model])[0]
        response = _Response(send, Scores(model, has_text=bool(settings.halt_reply)))
        token = _scores.set(response.scores)
        try:
            await self.app(scope, _checked(receive, settings), response.send)
        finally:
            _scores.reset(token)


class _Response:
    """One response on its way. Its start waits for its first body, when the scores are known.

    Attributes:
        scores: of the request that it answers.
    """

    def __init__(self, send: Any, scores: Scores):
        self._send, self.scores = send, scores
        self._start: dict[str, Any] | None = None
        self._is_stream = self._is_json = False
        self._body = b""

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            content_type = dict(message["headers"]).get(b"content-type", b"")
            self._is_stream = content_type.startswith(b"text/event-stream")
            self._is_json = message["status"] == 200 and content_type.startswith(b"application/json")
            self._start = message
            return
        if message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if self._waits(message.get("more_body", False)):
                return
            message = {**message, "body": self._with_scores()}
            self._body = b""
        if self._start is not None:
            await self._send({**self._start, "headers": self._headers(message)})
            self._start = None
        await self._send(message)

    def _waits(self, more: bool) -> bool:
        """True if the body so far cannot be sent yet."""
        if self._is_stream:
            return more and self._body.startswith(_UNSCORED) and not self.scores.are_known
        return more and self._is_json and self.scores.are_known

    def _with_scores(self) -> bytes:
        if self._is_stream and self._body:
            return self.scores.stream(self._body)
        if not self._is_json or not self.scores.are_known:
            return self._body
        return self.scores.complete(self._body)

    def _headers(self, message: dict[str, Any]) -> list[tuple[bytes, bytes]]:
        added = {}
        if self._is_json and self.scores.are_known:
            added[b"content-length"] = str(len(message["body"])).encode()
        if header := self.scores.header:
            added[_HEADER] = header
        return [item for item in self._start["headers"] if item[0].lower() not in added] + list(added.items())


def _checked(receive: Any, settings: ProbeSettings) -> Any:
    """Return `receive` with a check of the heads that the body asks for.

    It raises where the server reads the body, after its authentication, and the server answers.
    """
    body: list[bytes] = []

    async def checked() -> dict[str, Any]:
        message = await receive()
        if message["type"] == "http.request":
            body.append(message.get("body", b""))
            if not message.get("more_body"):
                whole = b"".join(body)
                body.clear()
                check_request(whole, settings)
        return message

    return checked


def check_request(body: bytes, settings: ProbeSettings) -> None:
    """Raise `HTTPException` if a request's `kv_transfer_params.probes` is not a list of the engine's heads."""
    if b"kv_transfer_params" not in body:
        return
    try:
        params = json.loads(body)["kv_transfer_params"]
        asked = params.get("probes")
    except (AttributeError, KeyError, TypeError, ValueError):  # the server says what is wrong, if anything is
        return
    if asked is None or (isinstance(asked, list) and all(name in list(settings.heads) for name in asked)):
        return
    known = ", ".join(settings.heads)
    found = json.dumps(asked)
    found = found if len(found) <= 200 else f"{found[:200]}..."
    raise HTTPException(400, f"kv_transfer_params.probes is {found}; it must be a list of heads, of {known}")


_scores: ContextVar[Scores] = ContextVar("llama_probe_scores")


def _listen(engine: Any, settings: ProbeSettings) -> None:
    """Have an engine client note what its outputs say of heads, for the request that they are for. Once a client."""
    if hasattr(engine, "_llama_probe_listens"):
        return
    generate = engine.generate

    @functools.wraps(generate)
    def listening(prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        outputs = generate(prompt, sampling_params, request_id, *args, **kwargs)
        if _BEAM.search(request_id):  # a prompt with a part of a reply to it
            if settings.halt_on is not None:
                raise ValueError(
                    "beam search does not go with heads that halt requests (--halt-on): leave use_beam_search out"
                )
            return outputs
        scores = _scores.get(None)
        # The server makes an engine's request for each prompt in order, and reads their outputs at the same time.
        return outputs if scores is None else noting(outputs, scores, scores.add(request_id, sampling_params.n))

    async def noting(outputs: AsyncIterator[Any], scores: Scores, place: int) -> AsyncIterator[Any]:
        async for output in outputs:
            known = output.kv_transfer_params
            if known and "probes" in known:
                scores.prompts[place] = known
                if known.get("halted"):
                    for reply in output.outputs:
                        reply.finish_reason = HALTED
                        reply.text = settings.halt_reply or reply.text
            yield output

    engine.generate = listening
    engine._llama_probe_listens = True
