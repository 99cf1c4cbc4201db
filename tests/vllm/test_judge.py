"""A judge on loopback that does as it is told, asked by the middleware about prompts of which a head is unsure."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable

import httpx
import pytest
from http_server import PlayedGuard, PlayedRequest
from played_server import NEW, TOKENIZER, play, save_heads
from prometheus_client import REGISTRY

from llama_probe.data.prompts import PromptFormat
from llama_probe.vllm.halting_words import CHAT, GUARDRAIL, MODERATIONS
from llama_probe.vllm.judge import KEY_VARIABLE, Judge, logger
from llama_probe.vllm.settings import ProbeSettings


END = " Sorry."
SURE_FINE, UNSURE, SURE_BAD = [3.0, 0.0], [0.5, 0.0], [0.0, 3.0]  # `bad` has 0.05, 0.38 and 0.95
WHOLE, HALTED = ("01234", "length"), (END, "content_filter")


pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def says(payload, status: int = 200, **options) -> Callable[[PlayedRequest], None]:
    return lambda request: request.answer(payload, status, **options)


FINE, BAD = (says({"results": [{"flagged": flag}]}) for flag in (False, True))


def hangs(request: PlayedRequest) -> None:
    request.server.gone += request.rfile.read(1) == b""


def floods(request: PlayedRequest) -> None:
    with contextlib.suppress(OSError):  # the other side has left
        request.answer(b" ", length=10_000_000)
        while request.server.sent < 10_000_000:
            request.wfile.write(b" " * 10_000)
            request.server.sent += 10_000


@pytest.fixture
def guard():
    """A judge."""
    with contextlib.closing(PlayedGuard(hangs)) as guard:
        yield guard


@pytest.fixture
def serve(tmp_path):
    """A function that serves a head, and asks a judge: `(app, engine)`."""

    def start(url: str | None, logits=UNSURE, fails="closed", timeout=20.0):
        heads = save_heads(tmp_path, {"guard": {"id2label": {0: "fine", 1: "bad"}}})
        judge = url and {"url": url, "fails": fails, "timeout": timeout}
        rules, bands = {"guard": {"label": "bad", "threshold": 0.5}}, {"guard": [0.1, 0.9]}
        settings = ProbeSettings(heads, rules, halt_reply=END, judge=judge, unsure=bands if judge else None)
        return play(settings, {"guard": logits})

    return start


class Client:
    """One that sees what is sent when, and may go away."""

    def __init__(self, app, path: str = "/v1/completions", **body):
        body = {"prompt": TOKENIZER("Is it?")["input_ids"], **body}
        self.sent, self.leave, self._body = b"", asyncio.Event(), json.dumps(body).encode()
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

    async def choices(self) -> list[tuple[str, str]]:
        """The whole text of each, and why it ended."""
        await self.task
        lines = [line.removeprefix(b"data: ") for line in self.sent.splitlines() if b"{" in line]
        choices = {}
        for each in (each for line in lines for each in json.loads(line)["choices"]):
            text, _ = choices.get(each["index"], ("", None))
            choices[each["index"]] = text + each["text"], each["finish_reason"]
        return [choices[index] for index in range(len(choices))]

    async def answer(self) -> dict:
        await self.task
        return json.loads(self.sent)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("halts", [False, True], ids=["fine", "bad"])
async def test_client_sees_nothing_until_the_judge_has_answered(serve, guard, stream, copies, halts):
    answers = threading.Event()
    guard.behave = lambda request: answers.wait() and (BAD if halts else FINE)(request)
    app, engine = serve(guard.url + MODERATIONS)
    client = Client(app, stream=stream, n=copies)
    await until(lambda: len(guard.requests) and engine.written == NEW * copies)
    assert client.sent == b"" and not client.task.done()
    answers.set()
    assert await client.choices() == [HALTED if halts else WHOLE] * copies
    assert [body for _, body in guard.requests] == [{"input": "Is it?"}]
    assert engine.running == 0 and engine.aborted == halts
    # However long a reply is, it costs two outputs.
    assert stream or engine.outputs <= 2
    if stream:
        known = json.loads(client.sent.split(b"data: ")[1])["kv_transfer_params"]
        assert known["judged"] == {"guard": "halted" if halts else "passed"} and "unsure" not in known
        assert known["probes"]["guard"]["flagged"] == ["bad"] * halts
        assert (known["halted"] is not None) == halts


async def test_nobody_is_asked_if_the_head_is_sure(serve, guard):
    guard.behave = BAD
    for logits in (SURE_FINE, SURE_BAD):
        app, engine = serve(guard.url + MODERATIONS, logits)
        await Client(app).task
        assert guard.requests == [] and (engine.known["halted"] is None) == (logits is SURE_FINE)


READ = [  # True halts, and None is not an answer
    (MODERATIONS, {"results": [{"flagged": True}]}, True),
    (MODERATIONS, {"results": [{"flagged": False}]}, False),
    (MODERATIONS, {"results": [{"flagged": "no"}]}, None),
    (MODERATIONS, {"results": []}, None),
    (MODERATIONS, b"[" * 60_000, None),
    (MODERATIONS, [1], None),
    (GUARDRAIL, {"action": "NONE"}, False),
    (GUARDRAIL, {"action": "BLOCKED"}, True),
    (GUARDRAIL, {"action": "GUARDRAIL_INTERVENED"}, True),
    (GUARDRAIL, {"action": "none"}, None),
    (CHAT, {"choices": [{"finish_reason": "content_filter", "message": {"content": None}}]}, True),
]
WORDS = {"unsafe\nS1": True, " Safe.": False, "Yes": True, "**No**": False, "Safety: Unsafe\n": True, "Not safe": None}
READ += [(CHAT, {"choices": [{"finish_reason": "stop", "message": {"content": k}}]}, v) for k, v in WORDS.items()]
ASKED = {
    MODERATIONS: {"model": "m", "input": "a"},
    GUARDRAIL: {"model": "m", "input_type": "request", "texts": ["a"]},
    CHAT: {"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 16, "temperature": 0},
}


async def test_questions_and_answers_of_each_protocol(guard, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret\n")
    for path, payload, halts in READ:
        guard.behave = says(payload)
        assert await Judge(None, TOKENIZER, guard.url + path, "m").ask("a") is halts, payload
        headers, body = guard.requests.pop()
        assert body == ASKED[path]
        key = headers["x-api-key"] if path == GUARDRAIL else headers["authorization"].removeprefix("Bearer ")
        assert key == "secret"


FAULTS = {"hangs": hangs, "floods": floods, "refuses": FINE, "dies": says(b'{"results"', length=50)}
FAULTS |= {"garbage": says(b"\xff\x00"), "error": says(b"{}", 500), "moved": says(b"", 307, Location="/")}


@pytest.mark.parametrize("fails", ["closed", "open"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_judge_that_fails_halts_or_lets_pass(serve, guard, monkeypatch, fault, fails):
    """What is logged does not hold the key, and only the beginning of an answer is read."""
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    logged = []
    monkeypatch.setattr(logger, "warning", lambda *words: logged.append(str(words)))
    guard.behave = FAULTS[fault]
    if fault == "refuses":
        guard.close()
    app, engine = serve(guard.url + MODERATIONS, fails=fails, timeout=0.5 if fault == "hangs" else 20.0)
    assert await Client(app).choices() == [WHOLE if fails == "open" else HALTED]
    assert len(guard.requests) == (fault != "refuses"), "asked once"
    assert engine.running == 0 and guard.sent < 8_000_000
    assert len(logged) == 1 and "secret" not in logged[0]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_client_that_goes_away_ends_the_question(serve, guard, stream):
    app, engine = serve(guard.url + MODERATIONS, timeout=600.0)
    client = Client(app, stream=stream)
    await until(lambda: len(guard.requests) == 1)
    client.leave.set()  # which ends a stream
    if not stream:
        client.task.cancel()  # as vLLM does
    await until(lambda: client.task.done() and guard.gone == 1 and engine.running == 0)
    assert engine.aborted == 1 and client.sent == b""


async def test_answers_are_counted_once_a_prompt(serve, guard):
    def judged() -> list[float]:
        labels = ({"probe": "guard", "answer": word} for word in ("halted", "passed", "failed"))
        return [REGISTRY.get_sample_value("llama_probe_judged_total", each) or 0 for each in labels]

    before = judged()
    for behave in (FINE, BAD, BAD, FAULTS["dies"]):
        guard.behave = behave
        await Client(serve(guard.url + MODERATIONS)[0], n=2).choices()
    assert [count - earlier for count, earlier in zip(judged(), before, strict=True)] == [2, 1, 1]


async def test_each_text_of_a_request_is_asked_about_once(tmp_path, guard):
    """Two heads have a prompt each of every input. Neither reads that of the other."""
    configs = {"guard": {"token_scope": "last_user", **PromptFormat(TOKENIZER).config_fields()}}
    configs["raw"] = {"prompt_format": "raw"}
    labels = {"id2label": {0: "fine", 1: "bad"}}
    heads = save_heads(tmp_path, {name: {**labels, **config} for name, config in configs.items()})
    guard.behave = BAD
    rules, bands = {name: {"label": "bad"} for name in heads}, {name: [0.1, 0.9] for name in heads}
    settings = ProbeSettings(heads, rules, judge={"url": guard.url + MODERATIONS}, unsure=bands)
    app, _ = play(settings, dict.fromkeys(heads, UNSURE))
    results = (await Client(app, "/v1/moderations", input=["a", "b", "a"]).answer())["results"]
    assert [result["categories"] for result in results] == [{"guard/bad": True, "raw/bad": True}] * 3
    assert [body["input"] for _, body in guard.requests] == ["a", "b"]


@pytest.mark.parametrize(("path", "halts"), [(MODERATIONS, True), (GUARDRAIL, False)], ids=["bad", "fine"])
async def test_server_judges_for_another(serve, monkeypatch, path, halts):
    """Also for its routes of labels: a small backbone that is unsure asks a larger one."""
    larger, _ = serve(None, SURE_BAD if halts else SURE_FINE)
    create, transport = httpx.AsyncClient, httpx.ASGITransport(larger)
    monkeypatch.setattr(httpx, "AsyncClient", lambda **options: create(transport=transport, **options))
    app, _ = serve(("http://larger/v1" if path == MODERATIONS else "http://larger") + path)
    assert await Client(app).choices() == [HALTED if halts else WHOLE]
    results = (await Client(app, "/v1/moderations", input=["a", "b"]).answer())["results"]
    assert [result["flagged"] for result in results] == [halts] * 2
    answer = await Client(app, GUARDRAIL, input_type="request", texts=["a"]).answer()
    assert (answer["action"] == "BLOCKED") == halts
    assert (await Client(app, "/classify", input="a").answer())["data"][0]["label"] == "fine", "the head's own"
