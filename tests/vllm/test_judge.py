"""A judge on loopback that does as it is told, asked by the middleware about prompts of which a head is unsure."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import httpx
import pytest
from played_server import NEW, TOKENIZER, play, save_heads
from prometheus_client import REGISTRY

from llama_probe.vllm.halting_words import CHAT, GUARDRAIL, MODERATIONS
from llama_probe.vllm.judge import KEY_VARIABLE, Judge, logger
from llama_probe.vllm.settings import ProbeSettings


END = " Sorry."
BODY = {"prompt": TOKENIZER("Is it?")["input_ids"]}
SURE_FINE, UNSURE, SURE_BAD = [3.0, 0.0], [0.5, 0.0], [0.0, 3.0]  # `bad` has 0.05, 0.38 and 0.95
Behaviour = Callable[[asyncio.StreamWriter], Awaitable[None]]


def says(payload, status: str = "200 OK") -> Behaviour:
    async def behave(writer):
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

    return behave


FINE, BAD = (says({"results": [{"flagged": flag}]}) for flag in (False, True))


async def hangs(writer):
    await asyncio.sleep(600)


async def dies(writer):
    writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"results"')


class PlayedGuard:
    """An HTTP server.

    Attributes:
        requests: header and body of each.
        sent: bytes of a long answer that were taken.
        gone: requests that the other side left.
    """

    def __init__(self, behave: Behaviour):
        self.behave, self.requests, self.sent, self.gone = behave, [], 0, 0

    async def __aenter__(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *error):
        self.server.close()

    async def _serve(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        self.requests.append((head, json.loads(await reader.readexactly(length))))
        answering = asyncio.ensure_future(self.behave(writer))
        leaving = asyncio.ensure_future(reader.read())
        await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
        self.gone += not answering.done()
        for task in (answering, leaving):
            task.cancel()
        writer.close()

    async def floods(self, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000\r\n\r\n")
        while self.sent < 10_000_000:
            writer.write(b" " * 10_000)
            await writer.drain()
            self.sent += 10_000


@pytest.fixture
def serve(tmp_path):
    """A function that serves a head, and asks a judge: `(app, engine)`."""

    def start(url: str | None, logits=UNSURE, fails="closed", timeout=5.0, model=None):
        heads = save_heads(tmp_path, {"guard": {"id2label": {0: "fine", 1: "bad"}}})
        judge = url and {"url": url, "fails": fails, "timeout": timeout, "model": model}
        rules, bands = {"guard": {"label": "bad", "threshold": 0.5}}, {"guard": [0.1, 0.9]}
        settings = ProbeSettings(heads, rules, halt_reply=END, judge=judge, unsure=bands if judge else None)
        return play(settings, {"guard": logits})

    return start


class Client:
    """One that sees what is sent when, and may go away."""

    def __init__(self, app, path: str = "/v1/completions", **body):
        self.sent, self.leave, self._body = b"", asyncio.Event(), json.dumps({**BODY, **body}).encode()
        head = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "root_path": ""}
        self.task = asyncio.ensure_future(app({**head, "http_version": "1.1"}, self._receive, self._send))

    async def _receive(self):
        if self._body:
            body, self._body = self._body, b""
            return {"type": "http.request", "body": body}
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        self.sent += message.get("body", b"")

    async def choices(self) -> dict[int, tuple[str, str]]:
        """By index the whole text of each, and why it ended."""
        await self.task
        lines = [line.removeprefix(b"data: ") for line in self.sent.splitlines() if line.strip()]
        texts, reasons = {}, {}
        for each in (each for line in lines for each in json.loads(line)["choices"]):
            texts[each["index"]] = texts.get(each["index"], "") + each["text"]
            reasons[each["index"]] = each["finish_reason"]
        return {index: (text, reasons[index]) for index, text in sorted(texts.items())}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("behave", [FINE, BAD], ids=["fine", "bad"])
def test_a_client_sees_nothing_until_the_judge_has_answered(serve, stream, copies, behave):
    async def run():
        answers = asyncio.Event()

        async def waits(writer):
            await answers.wait()
            await behave(writer)

        async with PlayedGuard(waits) as guard:
            app, engine = serve(guard.url + MODERATIONS)
            client = Client(app, stream=stream, n=copies)
            await until(lambda: len(guard.requests) and engine.written == NEW * copies)
            assert client.sent == b"" and not client.task.done()
            answers.set()
            text, reason = ("01234", "length") if behave is FINE else (END, "content_filter")
            assert await client.choices() == dict.fromkeys(range(copies), (text, reason))
            assert [body for _, body in guard.requests] == [{"input": "Is it?"}]
            assert engine.running == 0 and engine.aborted == (behave is BAD)
            # However long a reply is, it costs two outputs.
            assert stream or engine.outputs <= 2
            if stream:
                known = json.loads(client.sent.split(b"data: ")[1])["kv_transfer_params"]
                assert known["judged"] == {"guard": "passed" if behave is FINE else "halted"}
                assert known["probes"]["guard"]["flagged"] == ["bad"] * (behave is BAD) and "unsure" not in known
                assert (known["halted"] is None) == (behave is FINE)

    asyncio.run(run())


@pytest.mark.parametrize("logits", [SURE_FINE, SURE_BAD], ids=["fine", "bad"])
def test_of_what_the_head_is_sure_nobody_is_asked(serve, logits):
    async def run():
        async with PlayedGuard(hangs) as guard:
            app, engine = serve(guard.url + MODERATIONS, logits)
            await Client(app).task
            assert guard.requests == [] and (engine.known["halted"] is None) == (logits is SURE_FINE)

    asyncio.run(run())


READ = [
    (MODERATIONS, {"results": [{"flagged": True}]}, True),
    (MODERATIONS, {"results": [{"flagged": False}]}, False),
    (MODERATIONS, {"results": [{"flagged": "no"}]}, None),
    (MODERATIONS, {"results": []}, None),
    (GUARDRAIL, {"action": "NONE"}, False),
    (GUARDRAIL, {"action": "BLOCKED"}, True),
    (GUARDRAIL, {"action": "GUARDRAIL_INTERVENED"}, True),
    (GUARDRAIL, {"action": "none"}, None),
]
WORDS = {"unsafe\nS1": True, " Safe.": False, "Yes": True, "**No**": False, "Safety: Unsafe\n": True, "Not safe": None}
READ += [(CHAT, {"choices": [{"finish_reason": "stop", "message": {"content": k}}]}, v) for k, v in WORDS.items()]
READ.append((CHAT, {"choices": [{"finish_reason": "content_filter", "message": {"content": None}}]}, True))
READ += [(MODERATIONS, body, None) for body in (b"", b"<html>", b"[" * 60_000, [1], {"results": 7})]
ASKED = {
    MODERATIONS: {"model": "m", "input": "a"},
    GUARDRAIL: {"model": "m", "input_type": "request", "texts": ["a"]},
    CHAT: {"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 16, "temperature": 0},
}


def test_what_answers_mean(serve, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret\n")

    async def run():
        for path, payload, halts in READ:
            async with PlayedGuard(says(payload)) as guard:
                assert await Judge(None, TOKENIZER, guard.url + path, "m").ask("a") is halts, payload
                ((head, body),) = guard.requests
                assert body == ASKED[path]
                assert ("x-api-key: secret" if path == GUARDRAIL else "authorization: bearer secret") in head

    asyncio.run(run())


FAULTS = {
    "hangs": hangs,
    "dies": dies,
    "garbage": says(b"\xff\x00"),
    "error": says(b"{}", "500 Oh"),
    "moved": says(b"", "307 Moved\r\nLocation: /"),
}


@pytest.mark.parametrize("fails", ["closed", "open"])
@pytest.mark.parametrize("fault", [*FAULTS, "floods", "refuses"])
def test_a_judge_that_fails(serve, monkeypatch, fault, fails):
    """It halts by default. What is logged does not hold the key, and only the beginning of an answer is read."""
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    logged = []
    monkeypatch.setattr(logger, "warning", lambda *words: logged.append(str(words)))

    async def run():
        async with PlayedGuard(FAULTS.get(fault, FINE)) as guard:
            guard.behave = guard.floods if fault == "floods" else guard.behave
            if fault == "refuses":
                guard.server.close()
            app, engine = serve(guard.url + MODERATIONS, fails=fails, timeout=0.2 if fault == "hangs" else 20.0)
            text, reason = ("01234", "length") if fails == "open" else (END, "content_filter")
            assert await Client(app).choices() == {0: (text, reason)}
            assert len(guard.requests) == (fault != "refuses"), "asked once"
            assert engine.running == 0 and guard.sent < 8_000_000

    asyncio.run(run())
    assert len(logged) == 1 and "secret" not in logged[0]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_goes_away_meanwhile(serve, stream):
    async def run():
        async with PlayedGuard(hangs) as guard:
            app, engine = serve(guard.url + MODERATIONS, timeout=600.0)
            client = Client(app, stream=stream)
            await until(lambda: len(guard.requests) == 1)
            client.leave.set()  # which ends a stream
            if not stream:
                client.task.cancel()  # as vLLM does
            await until(lambda: client.task.done() and guard.gone == 1 and engine.running == 0)
            assert engine.aborted == 1 and client.sent == b""

    asyncio.run(run())


def test_a_judge_counts(serve):
    def judged() -> dict[str, float]:
        name, answers = "llama_probe_judged_total", ("halted", "passed", "failed")
        return {word: REGISTRY.get_sample_value(name, {"probe": "guard", "answer": word}) or 0 for word in answers}

    before = judged()

    async def run():
        for behave in (FINE, BAD, BAD, dies):
            async with PlayedGuard(behave) as guard:
                app, _ = serve(guard.url + MODERATIONS)
                await Client(app, n=2).choices()

    asyncio.run(run())
    assert {word: count - before[word] for word, count in judged().items()} == {"halted": 2, "passed": 1, "failed": 1}


@pytest.mark.parametrize(("path", "logits"), [(MODERATIONS, SURE_BAD), (GUARDRAIL, SURE_FINE)], ids=["bad", "fine"])
def test_one_server_judges_for_another(serve, monkeypatch, path, logits):
    """Also for its routes of labels: a small backbone that is unsure asks a larger one."""
    larger, _ = serve(None, logits)
    create = httpx.AsyncClient
    transport = httpx.ASGITransport(larger)
    monkeypatch.setattr(httpx, "AsyncClient", lambda **options: create(transport=transport, **options))
    prefix = "http://larger/v1" if path == MODERATIONS else "http://larger"
    app, _ = serve(prefix + path)
    is_bad = logits is SURE_BAD

    async def run():
        text, reason = (END, "content_filter") if is_bad else ("01234", "length")
        assert await Client(app).choices() == {0: (text, reason)}
        for route, body, read in (
            ("/v1/moderations", {"input": ["a", "b"]}, lambda said: [each["flagged"] for each in said["results"]]),
            (GUARDRAIL, {"input_type": "request", "texts": ["a"]}, lambda said: [said["action"] == "BLOCKED"]),
        ):
            client = Client(app, route, **body)
            await client.task
            said = read(json.loads(client.sent))
            assert said == [is_bad] * len(said)
        client = Client(app, "/classify", input="a")
        await client.task
        assert json.loads(client.sent)["data"][0]["label"] == "fine"

    asyncio.run(run())
