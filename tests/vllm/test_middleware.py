"""The middleware before a played server and an engine that says what it is told to, and parts of its answers."""

import json
import math
from importlib import import_module
from urllib.parse import unquote

import pytest
from fastapi import HTTPException
from fastapi.testclient import TestClient
from played_server import play, save_heads
from vllm import CompletionOutput, RequestOutput, SamplingParams
from vllm.version import __version__

from llama_probe.compatibility import minor
from llama_probe.vllm.compatibility import ARCHITECTURES, PREFIX
from llama_probe.vllm.payloads import Scores
from llama_probe.vllm.results import prompt_result
from llama_probe.vllm.settings import ProbeSettings


BAD = {"label": "bad", "score": 0.981234, "scores": {"fine": 0.018766, "bad": 0.981234}}


@pytest.fixture
def serve(tmp_path):
    """A function that serves an engine which says this of each prompt: `(client, engine)`."""

    def start(known: dict):
        heads = save_heads(tmp_path, {"guard": {}, "tone": {}, "watch": {"token_scope": "response"}})
        settings = ProbeSettings(heads, {name: {"label": "LABEL_1"} for name in ("guard", "watch")})
        app, engine = play(settings, {"guard": [0.0, 0.0], "tone": [0.0, 0.0]})
        engine.known = known

        @app.get("/v1/responses/1")
        async def stored():
            return {"object": "response", "status": "completed", "kv_transfer_params": engine.known}

        return TestClient(app, raise_server_exceptions=False), engine

    return start


class TestRequests:
    def test_for_unknown_heads_are_refused_before_the_engine_is_asked(self, serve):
        client, engine = serve({"probes": {"guard": BAD}})
        asked = "guard", {"guard": 1}, ["guard", "nowhere"], [["guard"]], True, ["x" * 1000]
        bodies = [json.dumps({"kv_transfer_params": {"probes": heads}}) for heads in asked]
        for body in (*bodies, bodies[2].encode("utf-16"), bodies[2].replace("_", r"\u005f", 1)):
            pieces = (bytes([byte]) for byte in (body.encode() if isinstance(body, str) else body))
            response = client.post("/v1/completions", content=pieces)
            assert response.status_code == 400 and "guard, tone" in response.json()["detail"]
            assert len(response.json()["detail"]) < 400
        assert engine.prompts == []

    def test_of_other_kinds_reach_the_server_as_they_are(self, serve):
        client, engine = serve({"probes": {"guard": BAD}, "halted": None})
        asked = None, {"probes": None}, [1], {"probes": []}, {"probes": ["tone"]}
        for body in ({}, "kv_transfer_params", *({"kv_transfer_params": params} for params in asked)):
            response = client.post("/v1/completions", json=body)
            assert response.status_code == 200 and engine.body == body
            assert response.json()["choices"][0]["finish_reason"] == "length"


def test_no_request_is_answered_without_the_judge(tmp_path):
    bands = {"judge": {"url": "http://127.0.0.1:9/v1/moderations"}, "unsure": {"guard": [0.1, 0.9]}}
    settings = ProbeSettings(save_heads(tmp_path, {"guard": {}}), {"guard": {"label": "LABEL_1"}}, **bands)
    app, engine = play(settings, {"guard": [0.0, 0.0]})
    engine.get_tokenizer = None
    client = TestClient(app, raise_server_exceptions=False)
    assert [client.post("/v1/completions", json={}).status_code for _ in range(2)] == [500, 500]


def test_halted_choice_with_a_tool_call_says_so():
    """vLLM overwrites the finish reason of a whole reply with a tool call. In a batch of one chat it has no scores."""
    scores = Scores(prompts=[{"probes": {}, "halted": None}], copies=2, halted={0})
    choices = [{"index": index, "finish_reason": "tool_calls", "stop_reason": None} for index in range(2)]
    said = json.loads(scores.complete(json.dumps({"choices": choices}).encode())[1])
    assert [choice["finish_reason"] for choice in said["choices"]] == ["content_filter", "tool_calls"]
    assert said["kv_transfer_params"] == scores.last


def test_stored_response_says_that_it_was_halted(serve):
    for halted, status in ((None, "completed"), ({"head": "guard"}, "incomplete")):
        client, engine = serve({"probes": {"guard": BAD}, "halted": halted})
        assert client.get("/v1/responses/1").json()["status"] == status and engine.prompts == []


def test_halted_prompt_tells_no_probabilities_of_its_tokens(serve):
    """Else those of the prompt with a token more would tell the reply, one token a request."""
    for halted, told in ((None, {"7": -1.0}), ({"head": "guard"}, None), ({"head": "watch", "token": 3}, {"7": -1.0})):
        client, engine = serve({"probes": {"guard": BAD}, "halted": halted})
        (choice,) = client.post("/v1/completions", json={"prompt": [5, 6]}).json()["choices"]
        assert choice["prompt_logprobs"] == [told] * 2
    asked = {"kv_transfer_params": {"probes": [], "reply": False}}
    status = client.post("/v1/completions", json={"prompt": [5, 6], **asked}).status_code
    assert status == 400, "no guard would read it"
    with pytest.raises(HTTPException, match="reply"):  # of a route that takes sampling parameters as they are
        engine.generate([5, 6], SamplingParams(extra_args=asked), "1")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("is_told", [True, False], ids=["told", "by another engine"])
def test_each_choice_of_a_stream_ends_with_what_heads_say_of_it(serve, path, is_told):
    """One is halted before it has a token, of which vLLM says nothing, one behind it, and one ends by itself.

    vLLM joins outputs of data-parallel engines, and keeps what the last one says of replies: then the reason to stop tells.
    """
    last = prompt = {"probes": {"guard": BAD}, "halted": None}
    if is_told:
        halts = [{"head": "watch", "token": 0}, {"head": "watch", "token": 1}, None]
        last = {**prompt, "halted": halts[0], "replies": [{"probes": {}, "halted": halt} for halt in halts]}
    client, engine = serve(prompt)

    async def generate(ids, params, request_id):
        begun = [CompletionOutput(index, '"finish_reason":1', [1], None, None) for index in (1, 2)]
        yield RequestOutput("1", None, ids, None, begun, False, kv_transfer_params=prompt)
        yield RequestOutput("1", None, ids, None, begun, False, kv_transfer_params=prompt)
        reasons = enumerate(["watch", "watch", "guard"])
        ended = [
            CompletionOutput(i, "", [], None, None, finish_reason="stop", stop_reason=word) for i, word in reasons
        ]
        yield RequestOutput("1", None, ids, None, ended, True, kv_transfer_params=last)

    engine.generate = generate
    *events, done, _ = client.post(path, json={"stream": True, "n": 3}).text.split("\n\n")
    events = [json.loads(event.removeprefix("data: ")) for event in events]
    for index, reason in enumerate(["content_filter", "content_filter", "stop"]):
        *begun, end = (event for event in events if event["choices"][0]["index"] == index)
        assert [event.get("kv_transfer_params") for event in begun] == [prompt, None, None][: len(begun)]
        assert end.get("kv_transfer_params") == (last if is_told or not begun else None)
        assert end["choices"][0]["finish_reason"] == reason
    assert done == "data: [DONE]"


def test_structured_decisions_are_off():
    """vLLM answers /v1/systemone or /v1/decisions for classes of some names, and a halted prompt has no probabilities for it."""
    folder = "openai.decisions" if minor(__version__) >= (0, 33) else "generate.structured_decisions"
    strategies = import_module(f"vllm.entrypoints.{folder}.strategies").READ_STRATEGIES
    assert strategies and not strategies.keys() & {PREFIX + name for name in ARCHITECTURES}


def header(probes: dict, prompts: int = 1) -> str | None:
    return Scores(prompts=[{"probes": probes}] * prompts).header


def test_header_has_labels_in_ascii():
    label = 'très "bad"; 50 %'
    probes = {
        "guard": {"label": label, "score": 0.98, "scores": {"fine": 0.02, label: 0.98}},
        "topics": {"label": ["a", "b"], "score": [0.9, 0.7], "scores": {"a": 0.9, "b": 0.7, "c": 1e-6}},
        "none": {"label": [], "score": [], "scores": {"a": 1e-6}},
        "size": {"logits": [-1.5], "score": -1.5},
        "both": {"scores": {"x": 1.0, "y": 2.25}},
        "mute": {"error": "no turn"},
    }
    value = header(probes)
    assert value.isascii() and value.isprintable()
    guard, rest = value.split(", ", 1)
    assert rest == "topics=(a;p=0.9 b;p=0.7), none=(), size=-1.5, both=(1 2.25), mute;error"
    assert unquote(guard) == f"guard={label};p=0.98" and " " not in guard and guard.count(";") == 1
    hidden = {"guard": {"label": "bad"}, "topics": {"label": ["a"]}, "size": {}}
    assert header(hidden) == "guard=bad, topics=(a)"
    assert header({"size": {}}) is header(hidden, prompts=2) is header({"guard": {"label": "x" * 9000}}) is None


def test_judge_gets_what_no_guard_halts(tmp_path):
    heads = save_heads(tmp_path, {name: {"id2label": {0: "fine", 1: "bad"}} for name in ("guard", "other")})
    rules = {name: {"label": "bad", "threshold": 0.75} for name in heads}

    def said(guard: float, other: float = 0.1, hide: bool = False) -> dict:
        settings = ProbeSettings(heads, rules, hide_scores=hide, unsure={"guard": [0.2, 0.9]})
        scores = {"guard": guard, "other": other}
        return prompt_result(settings, {name: [0.0, math.log(p / (1 - p))] for name, p in scores.items()})

    for score in (0.2001, 0.5, 0.8):  # whatever the threshold says
        (halt,) = said(score)["unsure"]
        assert said(score)["halted"] is None and halt["score"] == pytest.approx(score)
        assert said(score, hide=True)["unsure"] == [{"head": "guard", "label": "bad"}]
        assert said(score, 0.8)["halted"]["head"] == "other" and "unsure" not in said(score, 0.8)
    assert said(0.9001)["halted"]["head"] == "guard" and said(0.1)["halted"] is None
    assert "unsure" not in said(0.9001) and "unsure" not in said(0.1)
