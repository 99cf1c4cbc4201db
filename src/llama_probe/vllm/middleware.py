"""HTTP for heads: scores in streams and as a header, halts that a client sees, counters, and routes of labels alone."""

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
from vllm import CompletionOutput, RequestOutput, SamplingParams
from vllm.engine.protocol import EngineClient

from ..files import JSON
from .counters import announce, count, count_reply
from .events import EventStream
from .judge import Judge
from .label_routes import COMPLETIONS, LABEL_ROUTES, Formats, LabelRequest, prompt_formats
from .payloads import HALTED, Scores, prompt_halt
from .settings import ProbeSettings


_BEAM = re.compile(r"-[0-9a-f]+-beam-\d+$")  # ends the id of a request that a beam search makes
_REQUEST_SCORES: ContextVar[Scores] = ContextVar("llama_probe_scores")  # of the HTTP request that a task serves
_STORED = "/v1/responses/"  # begins the paths of responses to earlier requests


class ProbeStreams:
    """Put scores and halts into every response to a prompt, as middleware of vLLM's server.

    The middleware reads the outputs of the server's engine, and changes the finish reason of halted ones. The server then makes
    responses of these outputs. `Scores` and `EventStream` add to the bytes of a response what the server has no place for.

    A request to one of `LABEL_ROUTES` becomes a request to the server's `/v1/completions`; see `label_routes`. If a head is
    unsure, a `Judge` decides before the outputs go on. A request for unknown heads is refused. Beam search is refused beside
    `halt_on`: each step of the search is a prompt of its own, and a beam that ended would be an error inside of vLLM.
    """

    def __init__(self, app: ASGIApp):
        self.app = app
        self._settings: ProbeSettings | None = None
        self._formats: Formats | None = None
        # A long list of texts must not keep streams waiting, and a tokenizer serves one thread.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llama-probe-texts")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope.get("method")  # none of a WebSocket
        if method != "POST":
            if method == "GET" and _path(scope).startswith(_STORED):
                send = _Response(send, Scores(is_stored=True)).send
            await self.app(scope, receive, send)
            return
        state = scope["app"].state
        if self._settings is None:
            engine = state.engine_client
            settings = ProbeSettings.of(engine.vllm_config)
            engine.generate = functools.partial(_Listener(settings, engine).generate, engine.generate)
            self._settings = settings  # last: if an error came before, the next request must raise it too
        settings = self._settings
        scores = Scores(state.args.served_model_name[0])  # `server_arguments` sets one
        _REQUEST_SCORES.set(scores)  # each request has a task of its own
        rewrite = functools.partial(check_request, settings, scores)
        if (route := LABEL_ROUTES.get(_path(scope))) is not None:
            scores.labels = route(settings, Request(scope).query_params)
            scope = _as_completion(scope)
            rewrite = functools.partial(self._completion, scores.labels, state)
        await self.app(scope, _rewritten(scope, receive, rewrite), _Response(send, scores).send)

    async def _completion(self, labels: LabelRequest, state: State, body: bytes) -> bytes:
        """Return the request for completions that a request for labels becomes."""
        if self._formats is None:
            self._formats = prompt_formats(labels.settings.configs, state.engine_client.get_tokenizer())
        # vLLM refuses a prompt that leaves no room for a token of a reply.
        limit = state.engine_client.vllm_config.model_config.max_model_len - 1
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, labels.completion, body, self._formats, limit)


class _Response:
    """Send one response. Its start waits for the first body, because the scores are known then."""

    def __init__(self, send: Send, scores: Scores):
        self._send, self._scores = send, scores
        self._start: Message | None = None
        self._is_json = False
        self._json = b""
        self._events: EventStream | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            content_type = dict(message["headers"]).get(b"content-type", b"")
            self._is_json = message["status"] == 200 and content_type.startswith(b"application/json")
            if content_type.startswith(b"text/event-stream"):
                self._events = EventStream(self._scores)
            self._start = message
            return
        body = message.get("body", b"")
        has_more = message.get("more_body", False)
        is_scored = self._is_json and self._scores.are_known
        if self._events is not None:
            body = self._events.feed(body, is_last=not has_more)
            if has_more and not body:
                return
        elif is_scored:
            self._json += body
            if has_more:
                return
            self._start["status"], body = self._scores.complete(self._json)
        if self._start is not None:
            headers = MutableHeaders(scope=self._start)
            if is_scored:
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
    """Return `receive` with another body, which is made when the server reads it, after the server's authentication."""
    is_read = False

    async def rewritten() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": await rewrite(await Request(scope, receive).body())}

    return rewritten


async def check_request(settings: ProbeSettings, scores: Scores, body: bytes) -> bytes:
    """Return a request's body, if its `kv_transfer_params.probes` is a list of the engine's heads; else raise status 400."""
    try:
        # Read the body as the server does: it may be in UTF-16, or have escapes in its keys.
        request = json.loads(body)
        scores.model = request.get("model") or scores.model
        probes = request["kv_transfer_params"].get("probes")
    except (AttributeError, KeyError, TypeError, ValueError):  # the server says what is wrong with it
        return body
    if probes is None or (isinstance(probes, list) and all(name in list(settings.heads) for name in probes)):
        return body
    allowed = f"it must be a list of heads, of {', '.join(settings.heads)}"
    raise HTTPException(400, f"kv_transfer_params.probes is {json.dumps(probes)[:200]}; {allowed}")


class _Listener:
    """Note and count what the outputs of an engine say of heads, and end halted replies as clients see them."""

    def __init__(self, settings: ProbeSettings, engine: EngineClient):
        announce(settings.heads)
        self._settings = settings
        self._judge = None if settings.judge is None else Judge(settings, engine.get_tokenizer(), **settings.judge)
        self._reply_guards = {rule.head for rule in settings.rules if rule.config.reads_reply}

    def generate(
        self,
        generate: Callable[..., AsyncIterator[RequestOutput]],
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *args: Any,
        **kwargs: Any,
    ) -> AsyncIterator[RequestOutput]:
        """Take the place of the engine's own `generate`, which is the first argument."""
        scores = _REQUEST_SCORES.get(None) or Scores()
        params = sampling_params
        labels = scores.labels
        if labels is None and "reply" in ((params.extra_args or {}).get("kv_transfer_params") or ()):
            # Without a reply no guard reads the prompt, whose logprobs could tell the reply token by token.
            raise HTTPException(400, "kv_transfer_params.reply is for routes of labels, such as /v1/moderations")
        if _BEAM.search(request_id):  # a prompt with a part of a reply to it
            if self._settings.halt_on is not None:
                raise ValueError("beam search does not go with --halt-on: leave use_beam_search out")
            return generate(prompt, params, request_id, *args, **kwargs)
        # The server asks the engine for each prompt in order, and reads the outputs of all at the same time.
        place = scores.add(request_id, params.n)
        if labels is not None:
            params = copy.copy(params)
            params.extra_args = {"kv_transfer_params": labels.prompt_params[place]}
        if self._judge is None or (labels is not None and not labels.is_judged):
            return self._note(generate(prompt, params, request_id, *args, **kwargs), scores, place)
        outputs = generate(prompt, self._judge.in_parts(params), request_id, *args, **kwargs)
        return self._note(self._judge.watch(outputs, sampling_params, scores.decisions), scores, place)

    async def _note(
        self, outputs: AsyncIterator[RequestOutput], scores: Scores, place: int
    ) -> AsyncIterator[RequestOutput]:
        async for output in outputs:
            result = output.kv_transfer_params
            if result and "probes" in result:
                if scores.prompts[place] is None:
                    count(result, scores.labels)
                scores.prompts[place] = result
                if prompt_halt(result) is not None:
                    # The logprobs of this prompt and one more token would tell the next token of its reply.
                    output.prompt_logprobs = output.prompt_logprobs and [None] * len(output.prompt_logprobs)
                    output.prompt_token_id_logprobs = None
                for reply in output.outputs:
                    if reply.finish_reason is not None:
                        self._end(reply, result, scores, place * scores.copies + reply.index)
            yield output

    def _end(self, reply: CompletionOutput, result: JSON, scores: Scores, choice: int) -> None:
        """Count a reply that has ended. If it was halted, set its finish reason and add the halt reply."""
        replies = result.get("replies") or []
        own = replies[reply.index] if reply.index < len(replies) else None  # see `Replies.summaries`
        count_reply(own)
        # If another engine has written the reply, its stop reason tells.
        is_halted = reply.stop_reason in self._reply_guards if own is None else bool(own["halted"])
        if is_halted or prompt_halt(result) is not None:
            scores.halted.add(choice)
            reply.finish_reason = HALTED
            reply.text += self._settings.halt_reply or ""
        scores.ends[choice] = {"finish_reason": reply.finish_reason, "stop_reason": reply.stop_reason}
