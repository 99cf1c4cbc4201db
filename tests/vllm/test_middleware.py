"""The middleware before a server of a few routes and an engine that says what it is told to."""

import json
from urllib.parse import unquote

import pytest
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from played_server import play, save_heads
from vllm import SamplingParams
from vllm.entrypoints.generate.structured_decisions.strategies import READ_STRATEGIES

from llama_probe.vllm.compatibility import ARCHITECTURES, PREFIX
from llama_probe.vllm.payloads import Scores, halt_of
from llama_probe.vllm.settings import ProbeSettings


BAD = {"label": "bad", "score": 0.981234, "scores": {"fine": 0.018766, "bad": 0.981234}}


@pytest.fixture
def serve(tmp_path):
    """A function that serves an engine which says this of each prompt: `(client, engine)`."""

    def start(known: dict):
        settings = ProbeSettings(save_heads(tmp_path, {"guard": {}, "tone": {}}), {"guard": {"label": "LABEL_1"}})
        app, engine = play(settings, {"guard": [0.0, 0.0], "tone": [0.0, 0.0]})
        engine.known = known

        @app.post("/v1/responses")
        async def responses():
            async def events():
                yield 'event: response.created\ndata: {"type": "response.created", "response": {}}\n\n'
                yield 'event: response.in_progress\ndata: {"type": "response.in_progress", "response": {}}\n\n'
                async for _ in engine.generate([5], SamplingParams(), "resp_1_0"):
                    pass
                data = {"status": "completed", "kv_transfer_params": engine.known}
                yield f"event: response.completed\ndata: {json.dumps({'type': 'response.completed', 'response': data})}\n\n"

            return StreamingResponse(events(), media_type="text/event-stream")

        @app.get("/v1/responses/1")
        async def stored():
            return {"object": "response", "status": "completed", "kv_transfer_params": engine.known}

        @app.post("/fails")
        async def fails():
            async def events():
                yield "event: response.created\ndata: {}\n\n"
                raise OSError("gone")

            return StreamingResponse(events(), media_type="text/event-stream")

        return TestClient(app, raise_server_exceptions=False), engine

    return start


def asking(heads) -> str:
    return json.dumps({"kv_transfer_params": {"probes": heads}})


@pytest.mark.parametrize(
    "body",
    [
        *map(asking, ("guard", {"guard": 1}, ["guard", "nowhere"], [["guard"]], True, ["x" * 1000])),
        asking(["nowhere"]).encode("utf-16"),
        asking(["nowhere"]).replace("_", r"\u005f", 1),
    ],
)
def test_heads_that_are_not_there_are_refused_before_the_engine_is_asked(serve, body):
    client, engine = serve({"probes": {"guard": BAD}})
    response = client.post("/v1/completions", content=body)
    assert response.status_code == 400 and engine.prompts == []
    detail = response.json()["detail"]
    assert "kv_transfer_params.probes" in detail and "guard, tone" in detail
    assert "\n" not in detail and len(detail) < 400


@pytest.mark.parametrize(
    "body", [{}, {"kv_transfer_params": None}, {"kv_transfer_params": {"probes": None}}, {"kv_transfer_params": [1]},
             {"kv_transfer_params": {"probes": []}}, {"kv_transfer_params": {"probes": ["tone"]}}, "kv_transfer_params"],
    ids=str,
)  # fmt: skip
def test_other_bodies_reach_the_server_as_they_are(serve, body):
    client, engine = serve({"probes": {"guard": BAD}, "halted": None})
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200 and engine.body == body
    assert response.json()["choices"][0]["finish_reason"] == "length"


def test_a_body_in_pieces_is_checked_as_a_whole(serve):
    client, engine = serve({"probes": {"guard": BAD}})
    for heads, status in ((["nowhere"], 400), (["guard"], 200)):
        pieces = (piece.encode() for piece in asking(heads))
        assert client.post("/v1/completions", content=pieces).status_code == status
    assert engine.body == json.loads(asking(["guard"])) and len(engine.prompts) == 1


def test_a_stream_that_begins_before_its_prompt_is_read_waits_for_the_scores(serve):
    known = {"probes": {"guard": BAD}, "halted": {"head": "guard"}}
    response = serve(known)[0].post("/v1/responses")
    assert response.headers["x-llama-probe"] == "guard=bad;p=0.981"
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds == ["created", "in_progress", "incomplete"]
    assert events[0]["response"]["kv_transfer_params"] == known
    halted = {"status": "incomplete", "incomplete_details": {"reason": "content_filter"}, "kv_transfer_params": known}
    assert events[-1]["response"] == halted
    assert "event: response.incomplete\n" in response.text and "response.completed" not in response.text


@pytest.mark.parametrize("halted", [None, {"head": "guard"}])
def test_a_stored_response_says_that_it_was_halted(serve, halted):
    client, engine = serve({"probes": {"guard": BAD}, "halted": halted})
    response = client.get("/v1/responses/1").json()
    assert response["status"] == ("incomplete" if halted else "completed") and engine.prompts == []


def test_a_stream_that_fails_before_its_scores_is_an_error(serve):
    assert serve({})[0].post("/fails").status_code == 500


def chunk(index: int, finish_reason=None, **delta) -> bytes:
    choice = {"index": index, "delta": delta, "finish_reason": finish_reason}
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "tiny"}
    return b"data: " + json.dumps({**head, "choices": [choice]}, separators=(",", ":")).encode()


def test_each_choice_of_a_stream_ends_with_what_heads_say_of_it():
    """The first ends before it has a token, of which vLLM says nothing, the second in the middle, the third by itself."""
    halts = [{"head": "watch", "token": 0}, {"head": "watch", "token": 1}, None]
    replies = [{"probes": {"watch": {"tokens": number}}, "halted": halt} for number, halt in enumerate(halts)]
    prompt = {"probes": {"guard": BAD}, "halted": None}
    scores = Scores("tiny")
    scores.add("chatcmpl-1", 3)
    scores.prompts = [prompt]
    said = [scores.stream(chunk(index, role="assistant")) for index in range(3)]
    texts = [chunk(1, content='"finish_reason":1'), chunk(2, content="b")]
    assert [scores.stream(text) for text in texts] == texts
    scores.prompts = [{**prompt, "halted": halts[0], "replies": replies}]
    said += [
        scores.stream(chunk(1, "content_filter")),
        scores.stream(chunk(2, "length")),
        scores.stream(b"data: [DONE]"),
    ]
    events = [json.loads(line[6:]) for part in said for line in part.decode().split("\n\n") if line[6:7] == "{"]
    assert [event["choices"][0]["index"] for event in events] == [0, 1, 2, 1, 2, 0]
    assert [event["choices"][0]["finish_reason"] for event in events[3:]] == [
        "content_filter",
        "length",
        "content_filter",
    ]
    assert [event["kv_transfer_params"] for event in events] == [prompt] * 3 + scores.prompts * 3
    assert events[-1]["choices"][0]["stop_reason"] == "watch" and events[-1]["id"] == "chatcmpl-1"
    assert said[-1].endswith(b"\n\ndata: [DONE]")


def test_which_reply_was_halted():
    prompt, reply = {"head": "guard", "token": None}, {"head": "watch", "token": 3}
    said = {"probes": {"guard": BAD}, "halted": None}
    assert halt_of({**said, "halted": prompt}, 1) == prompt, "of a prompt all"
    replies = [*({"probes": {"watch": {}}, "halted": halt} for halt in (None, reply)), None]
    known = {**said, "halted": reply, "replies": replies}
    assert [halt_of(known, index, "watch") for index in range(4)] == [
        None,
        reply,
        {"head": "watch"},
        {"head": "watch"},
    ]
    assert [halt_of(known, index, "a stop string") for index in range(4)] == [None, reply, None, None]


def test_structured_decisions_are_off():
    """vLLM answers /v1/systemone for classes of some names. A halted prompt would have no probabilities to answer with."""
    assert READ_STRATEGIES and not READ_STRATEGIES.keys() & {PREFIX + name for name in ARCHITECTURES}


def test_what_the_header_says():
    label = 'très "bad"; 50 %'
    probes = {
        "guard": {"label": label, "score": 0.98, "scores": {"fine": 0.02, label: 0.98}},
        "topics": {"label": ["a", "b"], "score": [0.9, 0.7], "scores": {"a": 0.9, "b": 0.7, "c": 1e-6}},
        "none": {"label": [], "score": [], "scores": {"a": 1e-6}},
        "size": {"logits": [-1.5], "score": -1.5},
        "both": {"scores": {"x": 1.0, "y": 2.25}},
        "mute": {"error": "no turn"},
    }
    value = Scores("m", prompts=[{"probes": probes}]).header
    assert value.isascii() and value.isprintable()
    guard, rest = value.split(", ", 1)
    assert rest == "topics=(a;p=0.9 b;p=0.7), none=(), size=-1.5, both=(1 2.25), mute;error"
    assert unquote(guard) == f"guard={label};p=0.98" and " " not in guard and guard.count(";") == 1
    hidden = {"guard": {"label": "bad"}, "topics": {"label": ["a"]}, "size": {}}
    assert Scores("m", prompts=[{"probes": hidden}]).header == "guard=bad, topics=(a)"
    assert Scores("m", prompts=[{"probes": {"size": {}}}]).header is None
    assert Scores("m", prompts=[{"probes": hidden}] * 2).header is None
    assert Scores("m", prompts=[{"probes": {"guard": {"label": "x" * 9000}}}]).header is None
