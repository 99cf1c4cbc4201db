"""A stream of server-sent events that comes in pieces of any size, and ends of choices that a server leaves out."""

import json

import pytest

from llama_probe.vllm.events import EventStream
from llama_probe.vllm.payloads import Scores


RESULT = {"probes": {"guard": {"label": "très 悪い"}}, "halted": {"head": "guard"}}
DONE = b"data: [DONE]\n\n"
CHUNK = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "tiny"}


def chunk(index: int = 0, finish_reason: str | None = None, text: str = "\n\ndata: é") -> dict:
    return {**CHUNK, "choices": [{"index": index, "delta": {"content": text}, "finish_reason": finish_reason}]}


def encode(*payloads) -> bytes:
    lines = []
    for payload in payloads:
        name = f"event: {payload['type']}\n" if "type" in payload else ""
        lines.append(f"{name}data: {json.dumps(payload, ensure_ascii=False)}\n\n")
    return "".join(lines).encode()


def decode(body: bytes) -> list[dict]:
    *events, rest = body.split(b"\n\n")
    assert rest == b""
    return [json.loads(event.partition(b"data: ")[2]) for event in events if b"{" in event]


STREAMS = {
    "chat": b": keep-alive\n\n" + encode(chunk(), chunk(1), chunk(1, "length"), chunk(0, "content_filter")) + DONE,
    "response": encode(
        {"type": "response.created", "response": {}},
        {"type": "response.completed", "response": {"kv_transfer_params": RESULT}},
    ),
    "incomplete response": encode(
        {
            "type": "response.incomplete",
            "response": {"kv_transfer_params": RESULT, "incomplete_details": {"reason": "x"}},
        },
    ),
    "message": encode(
        {"type": "message_start", "message": {}}, {"type": "message_delta", "delta": {"stop_reason": "x"}}
    ),
}


def change(pieces: list[bytes], scores: Scores | None = None) -> bytes:
    """Feed the pieces, the last one as the last."""
    stream = EventStream(scores or Scores(prompts=[RESULT], copies=2, halted={0}))
    return b"".join(stream.feed(piece, is_last=number == len(pieces)) for number, piece in enumerate(pieces, 1))


@pytest.mark.parametrize("kind", STREAMS)
def test_pieces_of_any_size_give_the_same_events(kind):
    body = STREAMS[kind]
    whole = change([body])
    assert whole != body and whole.count(b"\n\n") == body.count(b"\n\n")
    for place in range(len(body)):
        assert change([body[:place], body[place:]]) == whole
    for size in (1, 2, 7):
        assert change([body[place : place + size] for place in range(0, len(body), size)]) == whole
        assert change([*(body[place : place + size] for place in range(0, len(body), size)), b""]) == whole


def test_what_is_not_an_event_goes_through():
    for body in (b"", b"data: {", b": only a comment", b"event: other\ndata: x\n\nrest"):
        assert change([body[:3], body[3:]]) == body


def test_events_before_the_scores_wait_for_them():
    scores = Scores(prompts=[None])
    stream = EventStream(scores)
    created, completed = STREAMS["response"].split(b"\n\n")[:2]
    assert stream.feed(created + b"\n\n", is_last=False) == b""
    scores.prompts = [RESULT]
    first, last = decode(stream.feed(completed + b"\n\n", is_last=True))
    assert first["response"]["kv_transfer_params"] == RESULT and last["type"] == "response.incomplete"


def test_stream_of_ends_alone_is_one_of_completions():
    ends = {0: {"finish_reason": "content_filter", "stop_reason": "guard"}}
    scores = Scores(model="tiny", prompts=[RESULT], ends=ends, request_id="cmpl-7-0")
    (end,) = decode(change([DONE], scores))
    assert (end["id"], end["object"], end["model"]) == ("cmpl-7", "text_completion", "tiny")
    assert end["choices"] == [
        {"index": 0, "text": "", "logprobs": None, "finish_reason": "content_filter", "stop_reason": "guard"}
    ]
    assert end["kv_transfer_params"] == RESULT
