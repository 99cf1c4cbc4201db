"""HTTP for heads, where vLLM's server has none: scores in streams and as a header, halts that a client sees, counters, and
routes that answer with labels alone."""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

from fastapi import HTTPException
from starlette.datastructures import MutableHeaders, State
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm import RequestOutput, SamplingParams
from vllm.engine.protocol import EngineClient

from .counters import announce, count, count_reply
from .judge import Judge
from .label_routes import COMPLETIONS, LABEL_ROUTES, Formats, LabelRequest, prompt_formats
from .payloads import HALTED, Scores, prompt_halt, reply_of
from .settings import ProbeSettings


_BEAM = re.compile(r"-[0-9a-f]+-beam-\d+$")  # ends the id of a request that a beam search makes
_scores: ContextVar[Scores] = ContextVar("llama_probe_scores")  # of the HTTP request that a task serves
_STORED = "/v1/responses/"  # begins the paths of responses to earlier requests
_UNSCORED = b"event: response."  # a stream of /v1/responses begins before its prompt is read


class _NoTokens(list):
    """Those of a reply that ended before it had some. vLLM streams no end of a choice whose tokens are false, and no text."""

    def __bool__(self) -> bool:
        return True


class ProbeStreams:
    """Put scores and halts into every response to a prompt.

    For `--middleware llama_probe.vllm.middleware.ProbeStreams`, which `python -m llama_probe.vllm` adds. It reads the outputs of the
    server's engine on their way to the response, and changes the finish reason of halted ones. The server then makes
    responses of them; what it has no place for is added to their bytes, see `Scores`.

    It answers `LABEL_ROUTES` itself, by a request to the server's `/v1/completions`; see `label_routes`.
    If a head is unsure, a `Judge` decides before the outputs go on.
    A request for unknown heads is refused. So is beam search beside `halt_on`: each of its steps is a prompt of its own, and
    a beam that ended would be an error inside of vLLM.
    """

    def __init__(self, app: ASGIApp):
        self.app = app
        self._settings: ProbeSettings | None = None
        self._formats: Formats | None = None
        # A long list of texts must not keep streams waiting, and a tokenizer is for one thread.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llama-probe-texts")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"] if scope["type"] == "http" else None
        if method != "POST":
            if method == "GET" and _path(scope).startswith(_STORED):
                send = _Response(send, Scores(is_stored=True)).send
            await self.app(scope, receive, send)
            return
        state = scope["app"].state
        if self._settings is None:
            settings = ProbeSettings.of(state.engine_client.vllm_config)
            _listen(state.engine_client, settings)  # may raise: then no request is answered
            self._settings = settings
        settings = self._settings
        scores = Scores()
        _scores.set(scores)  # for this request alone, which has a task of its own
        rewrite = functools.partial(check_request, settings)
        if (route := LABEL_ROUTES.get(_path(scope))) is not None:
            scores.labels = route(settings, Request(scope).query_params)
            scope, rewrite = _as_completion(scope), functools.partial(self._completion, scores.labels, state)
        await self.app(scope, _rewritten(scope, receive, rewrite), _Response(send, scores).send)

    async def _completion(self, labels: LabelRequest, state: State, body: bytes) -> bytes:
        """Return the body of the request for completions that a request for labels becomes."""
        if self._formats is None:
            self._formats = prompt_formats(labels.settings.configs, state.engine_client.get_tokenizer())
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, labels.completion, body, self._formats)


class _Response:
    """One response on its way. Its start waits for its first body, when the scores are known."""

    def __init__(self, send: Send, scores: Scores):
        self._send, self._scores = send, scores
        self._start: Message | None = None
        self._is_stream = self._is_json = False
        self._body = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            content_type = dict(message["headers"]).get(b"content-type", b"")
            self._is_stream = content_type.startswith(b"text/event-stream")
            self._is_json = message["status"] == 200 and content_type.startswith(b"application/json")
            self._start = message
            return
        self._body += message.get("body", b"")
        are_known = self._scores.are_known
        is_whole = self._is_json and are_known
        is_early = self._is_stream and not are_known and self._body.startswith(_UNSCORED)
        if message.get("more_body", False) and (is_whole or is_early):
            return
        body, self._body = self._body, b""
        if self._is_stream:
            body = self._scores.stream(body)
        elif is_whole:
            self._start["status"], body = self._scores.complete(body)
        if self._start is not None:
            headers = MutableHeaders(scope=self._start)
            if is_whole:
                headers["content-length"] = str(len(body))
            if value := self._scores.header:
                headers["x-llama-probe"] = value
            await self._send(self._start)
            self._start = None
        await self._send({**message, "body": body})


def _path(scope: Scope) -> str:
    """Return the path of a request, without `--root-path`."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


def _as_completion(scope: Scope) -> Scope:
    path = scope["path"].removesuffix(_path(scope)) + COMPLETIONS
    headers = MutableHeaders(raw=list(scope["headers"]))
    del headers["content-length"]
    if key := headers.get("x-api-key"):  # LiteLLM's way to send one
        headers.setdefault("authorization", f"Bearer {key}")
    return {**scope, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers.raw}


def _rewritten(scope: Scope, receive: Receive, rewrite: Callable[[bytes], Awaitable[bytes]]) -> Receive:
    """Return `receive` with another body, made where the server reads it: after its authentication. It answers errors."""
    is_read = False

    async def rewritten() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": await rewrite(await Request(scope, receive).body())}

    return rewritten


async def check_request(settings: ProbeSettings, body: bytes) -> bytes:
    """Return a request's body, if its `kv_transfer_params.probes` is a list of the engine's heads; else raise status 400."""
    try:
        # It is read as the server reads it: the key may be written with escapes, or the body in UTF-16.
        asked = json.loads(body)["kv_transfer_params"].get("probes")
    except (AttributeError, KeyError, TypeError, ValueError):  # the server says what is wrong, if anything is
        return body
    if asked is None or (isinstance(asked, list) and all(name in list(settings.heads) for name in asked)):
        return body
    allowed = f"it must be a list of heads, of {', '.join(settings.heads)}"
    raise HTTPException(400, f"kv_transfer_params.probes is {json.dumps(asked)[:200]}; {allowed}")


def _listen(engine: EngineClient, settings: ProbeSettings) -> None:
    """Have an engine client note and count what its outputs say of heads."""
    announce(settings.heads)
    generate = engine.generate
    guards = {rule.head for rule in settings.rules if rule.config.reads_reply}
    judge = None if settings.judge is None else Judge(settings, engine.get_tokenizer(), **settings.judge)

    @functools.wraps(generate)
    def listening(
        prompt: Any, sampling_params: SamplingParams, request_id: str, *args: Any, **kwargs: Any
    ) -> AsyncIterator[RequestOutput]:
        scores, params = _scores.get(None) or Scores(), sampling_params
        labels = scores.labels
        if labels is None and "reply" in ((params.extra_args or {}).get("kv_transfer_params") or ()):
            # Without a reply no guard reads the prompt, whose logprobs could tell it token by token.
            raise HTTPException(400, "kv_transfer_params.reply is for routes of labels, such as /v1/moderations")
        if _BEAM.search(request_id):  # a prompt with a part of a reply to it
            if settings.halt_on is not None:
                raise ValueError("beam search does not go with --halt-on: leave use_beam_search out")
            return generate(prompt, params, request_id, *args, **kwargs)
        # The server makes an engine's request for each prompt in order, and reads their outputs at the same time.
        place = scores.add(params.n)
        if labels is not None:
            params = copy.copy(params)
            params.extra_args = {"kv_transfer_params": labels.asked[place]}
        if judge is None or (labels is not None and not labels.is_judged):
            return noting(generate(prompt, params, request_id, *args, **kwargs), scores, place)
        outputs = generate(prompt, judge.in_parts(params), request_id, *args, **kwargs)
        return noting(judge.watch(outputs, sampling_params, scores.answers), scores, place)

    async def noting(
        outputs: AsyncIterator[RequestOutput], scores: Scores, place: int
    ) -> AsyncIterator[RequestOutput]:
        async for output in outputs:
            known = output.kv_transfer_params
            if known and "probes" in known:
                if scores.prompts[place] is None:
                    count(known, scores.labels)
                scores.prompts[place] = known
                is_halted = prompt_halt(known) is not None
                if is_halted:  # those of a prompt with one token more would tell how it goes on
                    output.prompt_logprobs = output.prompt_logprobs and [None] * len(output.prompt_logprobs)
                    output.prompt_token_id_logprobs = None
                for reply in output.outputs:
                    if reply.finish_reason is None:
                        continue
                    said = reply_of(known, reply.index)
                    count_reply(said)
                    reply.token_ids = reply.token_ids or _NoTokens()
                    # If another engine has written it, the reason to stop tells.
                    if is_halted or (reply.stop_reason in guards if said is None else said["halted"]):
                        scores.halted.add(place * scores.copies + reply.index)
                        reply.finish_reason = HALTED
                        reply.text += settings.halt_reply or ""
            yield output

    engine.generate = listening
