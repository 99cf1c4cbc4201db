"""A server with guards of prompts and replies and a judge, asked by clients of OpenAI and Anthropic."""

import asyncio
import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import anthropic
import httpx
import openai
import psutil
import pytest
from http_server import HEADERS, PlayedGuard, ask, serving
from tiny_engine import HEADS, OPTIONS, REPLY_HEADS, TinyServing, make_serving
from transformers import AutoTokenizer

from llama_probe.vllm.payloads import Scores


NEW, LONG, END = 12, 200, " Sorry."
WORDS = ("alpha", "beta", "gamma", "delta", "eps", "zeta", "kappa", "lambda", "sigma")
TEXTS = [f"{word} number {number} " * (1 + 2 * number) for number, word in enumerate(WORDS)]
GREEDY = {"ignore_eos": True, "temperature": 0.0}
WITH_SCORES = {**GREEDY, "kv_transfer_params": {"token_scores": True}}


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinyServing:
    return make_serving(tmp_path_factory.mktemp("serving"), "phi3", HEADS | {"watch": REPLY_HEADS["watch"]})


@pytest.fixture(scope="module")
def chats(tiny) -> dict[str, list[int]]:
    """Token ids of the prompts, by text. The guards halt some of them, and some of their replies."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.backbone)
    options = {"add_generation_prompt": True, "return_dict": False}
    chats = {text: tokenizer.apply_chat_template(chat(text), **options) for text in TEXTS}
    tiny.set_thresholds(list(chats.values()), NEW)
    halts = [tiny.expected(ids, NEW)[1] for ids in chats.values()]
    assert {halt and halt[0] for halt in halts} == {None, "guard", "watch"}
    assert any(halt and halt[1] for halt in halts), "a reply is halted behind its first token"
    return chats


@pytest.fixture(scope="module")
def judge(tiny, chats):
    """Knows which prompts are flagged."""
    flagged = [text.split()[0] for text, ids in chats.items() if tiny.score(ids) >= tiny.thresholds["guard"]]

    def decide(request) -> None:
        request.answer({"results": [{"flagged": any(word in request.body["input"] for word in flagged)}]})

    yield (guard := PlayedGuard(decide))
    guard.close()


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def url(tiny, chats, judge, log):
    scores = sorted(map(tiny.score, chats.values()))
    first = next(number for number, score in enumerate(scores) if score >= tiny.thresholds["guard"])
    # The judge decides on the last prompt that is not flagged, and on the first that is.
    low, high = scores[first - 1] - 1e-4, scores[first] + 1e-4
    arguments = [str(tiny.backbone), "--judge", judge.url + "/moderations", "--unsure", f"guard={low}:{high}"]
    arguments += ["--halt-reply", END]
    for name, folder in tiny.heads.items():
        arguments += ["--probe", f"{name}={folder}"]
    for name, threshold in {**tiny.thresholds, "guard": high}.items():
        arguments += ["--halt-on", f'{name}={{"label": "bad", "threshold": {threshold}}}']
    options = "--served-model-name tiny --dtype float32 --max-model-len 512 --max-num-seqs 8 --api-key none"
    options += " --max-num-batched-tokens 64" + " --enforce-eager" * OPTIONS["enforce_eager"]
    with serving([*arguments, *options.split()], log) as url:
        yield url


@pytest.fixture
def claude(url):
    # A busy server may close an idle connection just as it is used again.
    with anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="none", timeout=250, max_retries=1) as client:
        yield client


def lm_text(text: str) -> str:
    """What the LM has written of a text, without half a character at its end, which vLLM does not send."""
    return text.removesuffix(END).rstrip("\ufffd")


def expected(tiny: TinyServing, ids: list[int], new: int) -> tuple[str, tuple[str, int | None] | None]:
    """What a client may see of a reply, and what halts it."""
    tokens, halt = tiny.expected(ids, new)
    return lm_text(AutoTokenizer.from_pretrained(tiny.backbone).decode(tokens, skip_special_tokens=True)), halt


@dataclass
class Seen:
    """What a client sees: a text, why it ends, what heads say, and in whole replies the number of tokens."""

    text: str
    reason: str
    known: dict
    tokens: int | None = None


def read_chat(client, claude, text, stream) -> Seen:
    answer = ask(client, text, max_tokens=NEW, stream=stream, extra_body=WITH_SCORES)
    parts = list(answer) if stream else [answer]
    choices = [part.choices[0] for part in parts]
    (reason,) = [choice.finish_reason for choice in choices if choice.finish_reason]
    texts = [(choice.delta if stream else choice.message).content or "" for choice in choices]
    assert "probes" in parts[0].kv_transfer_params
    known = [part.kv_transfer_params for part in parts if hasattr(part, "kv_transfer_params")]
    return Seen("".join(texts), reason, known[-1], None if stream else answer.usage.completion_tokens)


def read_response(client, claude, text, stream) -> Seen:
    options = {"model": "tiny", "max_output_tokens": NEW, "extra_body": WITH_SCORES}
    answer = client.responses.create(input=text, stream=stream, **options)
    if stream:
        first, *_, last = answer
        assert first.type == "response.created" and "probes" in first.response.kv_transfer_params
        answer = last.response
        # From 0.33 on vLLM calls a response with `max_output_tokens` incomplete.
        others = ("response.completed", "response.incomplete")
        assert last.type in (others[1:] if answer.kv_transfer_params["halted"] else others)
    reason = answer.incomplete_details.reason if answer.incomplete_details else "max_output_tokens"
    return Seen(answer.output_text, reason, answer.kv_transfer_params)


def read_message(client, claude, text, stream) -> Seen:
    options = {"model": "tiny", "max_tokens": NEW, "messages": chat(text), "extra_body": WITH_SCORES}
    if not stream:
        answer = claude.messages.create(**options)
        known = answer.kv_transfer_params
    else:
        with claude.messages.stream(**options) as events:
            first, *_, last = (event for event in events if event.type in ("message_start", "message_delta"))
            answer = events.get_final_message()
        known = getattr(last, "kv_transfer_params", first.message.kv_transfer_params)
        assert "probes" in first.message.kv_transfer_params
    return Seen("".join(block.text for block in answer.content), answer.stop_reason, known)


ROUTES = {  # how they are read, and why a reply ends there that is not halted, and one that is
    "chat": (read_chat, "length", "content_filter"),
    "response": (read_response, "max_output_tokens", "content_filter"),
    "message": (read_message, "max_tokens", "refusal"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", ROUTES)
def test_route_shows_no_flagged_token(client, claude, tiny, chats, route, stream):
    read, *reasons = ROUTES[route]
    with ThreadPoolExecutor() as threads:
        answers = list(threads.map(lambda text: read(client, claude, text, stream), chats))
    for ids, seen in zip(chats.values(), answers, strict=True):
        shown, halt = expected(tiny, ids, NEW)
        assert lm_text(seen.text) == shown and seen.text.endswith(END) == bool(halt)
        assert seen.reason == reasons[bool(halt)]
        halted = seen.known["halted"]
        assert (halted and (halted["head"], halted["token"])) == halt
        assert seen.tokens in (None, len(tiny.expected(ids, NEW)[0]))
        tiny.check_prompt(seen.known["probes"], ids)
        if halt and halt[1] is None:
            continue
        whole = tiny.reference(ids, NEW).sequences[0, len(ids) : len(ids) + NEW].tolist()
        tiny.check_reply(ids, whole, seen.known["replies"][0], scored=halt[1] + 1 if halt else NEW)


def test_each_of_several_prompts_ends_by_itself(client, tiny, chats):
    options = {"model": "tiny", "max_tokens": NEW}
    prompts = list(chats.values())
    whole = client.completions.create(prompt=prompts, extra_body=GREEDY, **options).model_dump()
    body = {"messages": [chat(text) for text in chats], **options, **GREEDY}
    batch = client.post("/chat/completions/batch", cast_to=dict, body=body)
    chunks = list(client.completions.create(prompt=prompts, stream=True, extra_body=GREEDY, **options))
    assert whole["kv_transfer_params"] is None and batch["kv_transfer_params"] is None
    for index, ids in enumerate(prompts):
        shown, halt = expected(tiny, ids, NEW)
        of_stream = [chunk for chunk in chunks if chunk.choices[0].index == index]
        last = of_stream[-1].choices[0].model_dump()
        last["text"] = "".join(chunk.choices[0].text for chunk in of_stream)
        last["kv_transfer_params"] = of_stream[0].kv_transfer_params
        for choice in (whole["choices"][index], batch["choices"][index], last):
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            assert lm_text(text) == shown and text.endswith(END) == bool(halt)
            assert choice["finish_reason"] == ("content_filter" if halt else "length")
            assert choice["stop_reason"] == (halt and halt[0])
            tiny.check_prompt(choice["kv_transfer_params"]["probes"], ids)


def test_header_has_the_labels_of_a_prompt(client):
    raw = ask(client.with_raw_response, TEXTS[0])
    assert raw.headers["x-llama-probe"] == Scores(prompts=[raw.parse().kv_transfer_params]).header
    with ask(client.with_streaming_response, TEXTS[0], stream=True) as stream:
        assert stream.headers["x-llama-probe"] == raw.headers["x-llama-probe"]


def test_halted_prompt_gives_no_probability_of_its_next_token(url, tiny, chats):
    answers = set()
    for ids in chats.values():
        body = {"query": ids[:-1], "items": [ids[-1:]], "label_token_ids": [40, 41]}
        is_halted = tiny.score(ids) >= tiny.thresholds["guard"]
        answers.add((is_halted, status(url, "generative_scoring", json.dumps(body).encode())))
    assert (True, 400) in answers and (False, 200) in answers and (True, 200) not in answers


def metrics(url: str) -> dict[str, float]:
    lines = httpx.get(url.removesuffix("v1") + "metrics", timeout=250).text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def test_metrics_count_prompts_and_replies(url, client, tiny, chats):
    before, options = metrics(url), {"model": "tiny", "prompt": list(chats.values()), "max_tokens": NEW}
    client.completions.create(**options, extra_body=GREEDY)
    once = metrics(url)
    client.completions.create(**options, n=2, temperature=1.0)
    twice = metrics(url)
    halts = [tiny.expected(ids, NEW)[1] for ids in chats.values()]
    prompts = halts.count(("guard", None))
    tokens = sum(NEW if halt is None else halt[1] + 1 for halt in halts if halt != ("guard", None))

    def grown(name: str, head: str, after: dict, before: dict) -> float:
        line = f'llama_probe_{name}_total{{probe="{head}"}}'
        return after[line] - before.get(line, 0)

    for pair in ((once, before), (twice, once)):
        assert [grown("scored", head, *pair) for head in HEADS] == [len(chats)] * len(HEADS)
        assert [grown(name, "guard", *pair) for name in ("halted", "flagged")] == [prompts] * 2
        assert grown("halted", "tone", *pair) == grown("halted", "watch", *pair) == 0
    replies = len([halt for halt in halts if halt and halt[0] == "watch"])
    assert [grown(name, "watch", once, before) for name in ("halted_replies", "flagged_replies")] == [replies] * 2
    assert grown("reply_tokens", "watch", once, before) == tokens


def status(url: str, path: str, body: bytes, headers: dict = HEADERS) -> int:
    return httpx.post(url.removesuffix("v1") + path, content=body, headers=headers, timeout=250).status_code


PATHS = ("chat/completions", "chat/completions/batch", "completions", "responses", "messages", "moderations")
PATHS = (*(f"v1/{path}" for path in PATHS), "classify", "generative_scoring", "invocations")
MALFORMED = {
    "empty": b"",
    "cut off": b'{"model": "tiny", "messages": [',
    "no object": b"[1]",
    "no UTF-8": b'{"model": "tiny", "input": "\xff"}',
    "nothing asked": b'{"model": "tiny"}',
    "wrong types": b'{"model": "tiny", "messages": 7, "prompt": {"a": 1}, "input": 7, "query": 7, "items": 7}',
    "an unknown head": rb'{"model": "tiny", "prompt": "a", "kv\u005ftransfer_params": {"probes": ["nowhere"]}}',
}


@pytest.mark.parametrize("path", PATHS)
def test_malformed_body_is_refused(url, path):
    assert {kind: status(url, path, body) for kind, body in MALFORMED.items()} == dict.fromkeys(MALFORMED, 400)


def test_refusals_of_vllm_reach_clients(url, client):
    assert status(url, "v1/moderations", b'{"input": "a", "model": "other"}') == 404
    for path in ("v1/moderations", "classify?probe=tone"):
        assert status(url, path, b'{"input": "%s"}' % (b"too long " * 100)) == 400
        assert status(url, path, b'{"input": "a"}', {**HEADERS, "Authorization": "Bearer other"}) == 401
    with pytest.raises(openai.BadRequestError, match="beam search"):
        ask(client, "alpha", n=2, extra_body={"use_beam_search": True})


def test_request_ends_if_its_client_goes_away(url, client, tiny, chats):
    passing = [text for text, ids in chats.items() if tiny.expected(ids, NEW)[1] is None]
    text = min(passing, key=len)
    most = 500 - len(chats[text])
    body = json.dumps({"model": "tiny", "messages": chat(text), "max_tokens": most, "ignore_eos": True})
    for _ in range(8):
        connection = http.client.HTTPConnection(url.split("/")[2])
        connection.request("POST", "/v1/chat/completions", body, HEADERS)
        connection.close()
        with ask(client, text, stream=True, max_tokens=most, extra_body={"ignore_eos": True}) as stream:
            next(iter(stream))

    def running() -> float:
        return sum(value for name, value in metrics(url).items() if name.startswith("vllm:num_requests_running"))

    end = time.monotonic() + 100
    while ask(client, text).choices and running():  # a step counts what runs
        assert time.monotonic() < end, "requests of clients that are gone still run"
        time.sleep(0.2)


def test_kill_9_of_the_engine_lets_no_unscored_token_through(url, tiny, chats, log):
    """Streams end with an error, and so does the server, in one line. No other test can ask it afterwards."""
    processes = psutil.Process().children(recursive=True)
    alive = [process for process in processes if process.status() != psutil.STATUS_ZOMBIE]  # of earlier servers
    engine = next(process for process in alive if "EngineCore" in " ".join(process.cmdline()))
    server = engine.parent()

    async def stream(client, text):
        seen = ""
        try:
            async for chunk in await ask(client, text, max_tokens=LONG, stream=True, extra_body=GREEDY):
                seen += chunk.choices[0].delta.content or ""
                if seen.removesuffix(END) and engine.is_running():
                    engine.kill()
        except (openai.APIError, httpx.HTTPError):
            return seen, True
        return seen, False

    # Of so many some still wait when the first chunk arrives, however late that is.
    texts = list(chats) * 6

    async def all_streams():
        async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=100, max_retries=0) as client:
            return await asyncio.gather(*(stream(client, text) for text in texts))

    cut = []
    for text, (seen, is_cut) in zip(texts, asyncio.run(all_streams()), strict=True):
        shown, _ = expected(tiny, chats[text], LONG)
        assert shown.startswith(lm_text(seen)), text
        assert is_cut or lm_text(seen) == shown, "what had ended before is whole"
        cut.append(is_cut)
    assert any(cut)
    server.wait(timeout=100)
    assert len([line for line in log.read_text().splitlines() if line.startswith("error: ")]) == 1
