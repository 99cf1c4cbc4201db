"""An engine that says what it is told to, and a server of one route before it, with the middleware in front."""

import asyncio
import functools
from collections.abc import AsyncGenerator
from dataclasses import asdict
from types import SimpleNamespace

from conftest import make_probe, make_tokenizer
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from vllm import CompletionOutput, RequestOutput, SamplingParams
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.sampling_params import RequestOutputKind
from vllm.utils.async_utils import merge_async_iterators
from vllm.v1.engine.output_processor import RequestOutputCollector

from llama_probe.vllm.compatibility import KEY
from llama_probe.vllm.middleware import ProbeStreams
from llama_probe.vllm.results import prompt_result
from llama_probe.vllm.settings import ProbeSettings


TOKENIZER, NEW = make_tokenizer(), 5
LONGEST = 1024  # tokens of a prompt


class Engine:
    """Writes the tokens `0` to `4` of each reply, one a turn of the loop, and hands them out as vLLM does.

    Attributes:
        prompts: of all requests. asked: `kv_transfer_params` of each.
        written: tokens. outputs, aborted, running: of requests.
        body, authorization: of the last request to the server.
    """

    def __init__(self, settings: ProbeSettings, logits: dict):
        self.vllm_config = SimpleNamespace(
            additional_config={KEY: asdict(settings)}, model_config=SimpleNamespace(max_model_len=LONGEST + 1)
        )
        self.settings, self.logits, self.known = settings, logits, prompt_result(settings, logits)
        self.prompts, self.asked = [], []
        self.written = self.aborted = self.running = self.outputs = 0

    def get_tokenizer(self):
        return TOKENIZER

    async def generate(self, prompt, params, request_id):
        self.prompts.append(prompt)
        asked = (params.extra_args or {}).get("kv_transfer_params")
        self.asked.append(asked)
        if asked and asked.get("reply") is False:  # labels alone
            self.known = prompt_result(self.settings, {name: self.logits[name] for name in asked["probes"]})
        collector = RequestOutputCollector(params.output_kind, request_id)
        writing = asyncio.ensure_future(self._write(prompt, params, collector))
        self.running += 1
        try:
            finished = False
            while not finished:
                output = collector.get_nowait() or await collector.get()
                finished, self.outputs = output.finished, self.outputs + 1
                yield output
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += 1
            raise
        finally:
            self.running -= 1
            writing.cancel()

    async def _write(self, prompt, params, collector):
        first = 0
        for token in range(NEW):
            await asyncio.sleep(0)
            self.written += params.n
            ends = token == NEW - 1
            is_due = token == 0 or token + 1 - first >= (params.stream_interval or 1)
            if not ends and (params.output_kind is RequestOutputKind.FINAL_ONLY or not is_due):
                continue
            ids, first = list(range(first, token + 1)), token + 1
            text, reason = "".join(map(str, ids)), "length" if ends else None
            for index in range(params.n):
                reply = CompletionOutput(index, text, ids, None, None, finish_reason=reason)
                finished = ends and index == params.n - 1
                logprobs, known = [{7: -1.0}] * len(prompt), dict(self.known)
                collector.put(RequestOutput("1", None, prompt, logprobs, [reply], finished, kv_transfer_params=known))


def save_heads(folder, configs: dict[str, dict]) -> dict[str, str]:
    """Save heads of chats, and return their folders, by name."""
    for name, config in configs.items():
        values = {"probe_type": "pooling", "prompt_format": "chat", **config}
        make_probe(**values).save_pretrained(folder / name)
    return {name: str(folder / name) for name in configs}


def stream(outputs: list[AsyncGenerator[RequestOutput, None]], n: int, is_chat: bool) -> AsyncGenerator[str, None]:
    """The events that vLLM's server makes of outputs."""
    names = "enable_auto_tools enable_force_include_usage enable_log_outputs enable_prompt_tokens_details parser_cls"
    server = SimpleNamespace(
        **dict.fromkeys([*names.split(), "system_fingerprint", "_include_reasoning_tokens_details"])
    )
    chunks = "chat_completion_stream_generator_raw"  # from vLLM 0.33 on, what the events are made of
    if hasattr(OpenAIServingChat, chunks):
        setattr(server, chunks, functools.partial(getattr(OpenAIServingChat, chunks), server))
    server._raise_if_error, server.get_chat_request_role = print, lambda request: "assistant"
    server._extract_prompt_text, known = str, RequestResponseMetadata(request_id="1")
    if is_chat:
        body = ChatCompletionRequest(messages=[{"role": "user", "content": "a"}], n=n)
        return OpenAIServingChat.chat_completion_stream_generator(server, body, *outputs, "1", "tiny", [], None, known)
    body, prompts = CompletionRequest(prompt="a", n=n), ["a"] * len(outputs)
    merged, create = merge_async_iterators(*outputs), OpenAIServingCompletion.completion_stream_generator
    return create(server, body, prompts, merged, "1", 0, "tiny", len(prompts), None, known)


async def in_pieces(events: AsyncGenerator[str, None]) -> AsyncGenerator[bytes, None]:
    """Cut events anywhere, as a proxy may."""
    async for event in events:
        body = event.encode()
        for place in range(0, len(body), 50):
            yield body[place : place + 50]


def play(settings: ProbeSettings, logits: dict, root_path: str = "") -> tuple[FastAPI, Engine]:
    """A server whose heads give these logits for each prompt."""
    engine, app = Engine(settings, logits), FastAPI(root_path=root_path)
    app.state.engine_client, app.state.args = engine, SimpleNamespace(served_model_name=["tiny"])

    @app.post("/v1/chat/completions")
    @app.post("/v1/completions")
    async def complete(request: Request, response: Response):
        response.headers["x-request-id"] = "7"
        engine.body, engine.authorization = await request.json(), request.headers.get("authorization")
        body = {"prompt": [5], **engine.body} if isinstance(engine.body, dict) else {"prompt": [5]}
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        asked = body.get("kv_transfer_params")
        kind = RequestOutputKind.DELTA if body.get("stream") else RequestOutputKind.FINAL_ONLY
        extra = {"kv_transfer_params": asked} if isinstance(asked, dict) else None
        params = SamplingParams(n=body.get("n", 1), max_tokens=NEW, output_kind=kind, extra_args=extra)
        outputs = [engine.generate(ids, params, "cmpl-1") for ids in prompts]

        async def choices():
            for output in outputs:
                async for part in output:
                    for reply in part.outputs:
                        known = {"prompt_logprobs": part.prompt_logprobs, "finish_reason": reply.finish_reason}
                        yield {"index": reply.index, "text": reply.text, **known}

        if body.get("stream"):
            events = stream(outputs, params.n, is_chat="chat" in request.url.path)
            return StreamingResponse(in_pieces(events), media_type="text/event-stream")
        usage = {"prompt_tokens": sum(map(len, prompts))}
        common = {"id": "cmpl-1", "model": body.get("model") or "tiny", "usage": usage}
        return common | {"choices": [choice async for choice in choices()]}

    app.add_middleware(ProbeStreams)
    return app, engine
