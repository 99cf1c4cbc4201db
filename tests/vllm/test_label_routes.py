"""Moderations and classifications, before a server of one route and an engine that says what it is told to."""

import asyncio
import json

import pytest
from fastapi.testclient import TestClient
from played_server import TOKENIZER, play, save_heads

from llama_probe.data.prompts import PromptFormat
from llama_probe.vllm.settings import ProbeSettings


MULTI = {"problem_type": "multi_label_classification", "threshold": [0.3, 0.9]}
KINDS = {
    "guard": {"id2label": {0: "fine", 1: "bad"}, "threshold": 0.25},
    "raw": {"id2label": {0: "no", 1: "yes"}, "flagged": ["yes"], "prompt_format": "raw"},
    "mood": {"id2label": {0: "sad", 1: "glad", 2: "calm"}},
    "topics": {"id2label": {0: "a", 1: "b"}, **MULTI},
    "size": {"num_labels": 1, "problem_type": "regression"},
    "watch": {"id2label": {0: "fine", 1: "bad"}, "flagged": ["bad"], "token_scope": "response", "max_length": 120},
}
LOGITS = {"guard": [0.9, 0.0], "raw": [2.0, 0.0], "mood": [0.0, 2.0, 1.0], "topics": [0.0, 2.0], "size": [1.5]}


@pytest.fixture
def serve(tmp_path):
    """A function that serves heads: `(client, engine)`."""

    def start(heads=tuple(LOGITS), logits=LOGITS, halt_on=None, hide_scores=False):
        folders = save_heads(tmp_path, {name: KINDS[name] for name in heads})
        settings = ProbeSettings(folders, halt_on, hide_scores=hide_scores)
        app, engine = play(settings, {name: logits[name] for name in heads}, root_path="/api")
        return TestClient(app, raise_server_exceptions=False), engine

    return start


def test_categories_are_the_labels_that_heads_flag(serve):
    client, engine = serve()
    said = client.post("/v1/moderations", json={"input": ["a", "b"], "model": "mine"}).json()
    assert (said["id"], said["model"], len(said["results"])) == ("modr-1", "mine", 2)
    assert set(said) == {"id", "model", "results"}
    for result in said["results"]:
        # A threshold of the head's own decides, not the largest score; `mood` and `size` have none.
        assert result["categories"] == {"guard/bad": True, "raw/yes": False, "topics/a": True, "topics/b": False}
        scores = {"guard/bad": 0.289, "raw/yes": 0.119, "topics/a": 0.5, "topics/b": 0.881}
        assert result["category_scores"] == pytest.approx(scores, abs=1e-3)
        assert result["flagged"] is True
    assert engine.body["kv_transfer_params"] == {"probes": ["guard", "raw", "topics"], "reply": False}
    assert engine.body["max_tokens"] == 1
    formats = [PromptFormat(TOKENIZER, kind) for kind in ("chat", "raw")]
    assert engine.prompts == [ids for prompts in formats for ids in prompts.encode(["a", "b"])]


def test_the_rules_of_halting_decide_what_is_flagged(serve):
    rules = {"guard": {"threshold": 0.6}, "mood": {"label": "glad"}, "size": {"threshold": 1.0}}
    client, _ = serve(["guard", "mood", "size"], halt_on=rules)
    (result,) = client.post("/v1/moderations", json={"input": "a"}).json()["results"]
    assert result["categories"] == {"guard/bad": False, "mood/glad": True, "size/LABEL_0": True}
    assert result["category_scores"]["size/LABEL_0"] == 1.5
    client, _ = serve(["guard"], logits={"guard": [9.0, -9.0]})
    (result,) = client.post("/v1/moderations", json={"input": "a"}).json()["results"]
    assert result["flagged"] is False


def test_hidden_scores_are_decisions(serve):
    client, _ = serve(hide_scores=True)
    (result,) = client.post("/v1/moderations", json={"input": "a"}).json()["results"]
    assert result["category_scores"] == {"guard/bad": 1.0, "raw/yes": 0.0, "topics/a": 1.0, "topics/b": 0.0}
    values = {"guard": [0.0, 1.0], "topics": [1.0, 0.0], "mood": [0.0, 1.0, 0.0], "size": []}
    for (head, probs), label in zip(values.items(), ("bad", "a", "glad", None), strict=True):
        (row,) = client.post("/classify", json={"input": "a", "probe": head}).json()["data"]
        assert (row["label"], row["probs"]) == (label, probs)


def test_content_parts_are_one_text(serve):
    client, engine = serve(["guard"])
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert len(client.post("/v1/moderations", json={"input": parts}).json()["results"]) == 1
    assert engine.prompts == PromptFormat(TOKENIZER).encode(["a\nb"])


def test_classification(serve):
    client, engine = serve()
    said = client.post("/classify", json={"input": ["a", "bc"], "probe": "mood"}).json()
    assert (said["object"], said["model"], [row["index"] for row in said["data"]]) == ("list", "tiny", [0, 1])
    for row in said["data"]:
        assert (row["label"], row["num_classes"]) == ("glad", 3)
        assert row["probs"] == pytest.approx([0.090, 0.665, 0.245], abs=1e-3)
    tokens = sum(map(len, engine.prompts))
    assert said["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    for head, label, probs in (("guard", "bad", [0.711, 0.289]), ("topics", "a", [0.5, 0.881]), ("size", None, [1.5])):
        (row,) = client.post(f"/classify?probe={head}", json={"input": "a"}).json()["data"]
        assert (row["label"], row["num_classes"]) == (label, len(probs))
        assert row["probs"] == pytest.approx(probs, abs=1e-3)


def test_classification_of_chats_and_tokens(serve):
    client, engine = serve(["guard"])
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    for body in ({"messages": chat}, {"input": [5, 6]}, {"input": [[5, 6], [7]]}):
        assert client.post("/classify", json=body).status_code == 200
    assert engine.prompts == [*PromptFormat(TOKENIZER).encode([chat]), [5, 6], [5, 6], [7]]


@pytest.mark.parametrize("path", ["/v1/moderations", "/classify?probe=guard"])
@pytest.mark.parametrize(
    "given",
    [None, [], 7, {}, ["a", 7], [{"type": "image_url", "image_url": {"url": "x"}}], [[]], [True], [[5, False]], "\udc80"],
    ids=repr,
)  # fmt: skip
def test_other_inputs_are_refused_before_the_engine_is_asked(serve, path, given):
    client, engine = serve(["guard"])
    for body in (json.dumps({"input": given}), "[1"):
        assert client.post(path, content=body, headers={"Content-Type": "application/json"}).status_code == 400
    assert engine.prompts == []


def test_which_head_classifies(serve):
    client, engine = serve(["guard", "mood"])
    for asked in ({}, {"probe": "nowhere"}, {"probe": ["guard"]}):
        response = client.post("/classify", json={"input": "a", **asked})
        assert response.status_code == 400 and "guard, mood" in response.json()["detail"]
    client, _ = serve(["mood"])
    assert client.post("/classify", json={"input": "a"}).status_code == 200
    response = client.post("/v1/moderations", json={"input": "a"})
    assert response.status_code == 400 and "halt_on" in response.json()["detail"]
    assert engine.prompts == []


def test_an_input_without_a_score_is_an_error(serve):
    for logits in ("no turn", [float("nan"), 0.0]):
        client, _ = serve(["guard"], logits={"guard": logits})
        for path in ("/v1/moderations", "/classify"):
            response = client.post(path, json={"input": "a"})
            assert response.status_code == 400
            assert "input 0 has no score of guard" in response.json()["error"]["message"]


class Gateway:
    """What litellm's client class posts with."""

    timeout = 5

    def __init__(self, client: TestClient):
        self.client, self.headers = client, []

    async def post(self, url, json, headers, timeout):
        self.headers.append(headers)
        return self.client.post(url.removeprefix("http://guard"), json=json, headers=headers)


@pytest.mark.parametrize("logits", [{"guard": [0.9, 0.0]}, {"guard": [9.0, -9.0]}], ids=["flagged", "fine"])
def test_the_guardrail_of_litellm(monkeypatch, serve, logits):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # its import asks GitHub for prices
    from litellm.proxy.guardrails.guardrail_hooks.generic_guardrail_api import GenericGuardrailAPI

    client, engine = serve(["guard"], logits=logits)
    guardrail = GenericGuardrailAPI(api_base="http://guard", api_key="key", async_handler=Gateway(client))
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}]
    encode = PromptFormat(TOKENIZER).encode

    def ask(kind, **inputs):
        return asyncio.run(guardrail.apply_guardrail(inputs, {"model": "gpt"}, kind))

    for inputs in ({"texts": ["s", "a"], "structured_messages": chat}, {"texts": ["a"]}):
        if logits["guard"][1] < 0:
            assert ask("request", **inputs)["texts"] == inputs["texts"]
            continue
        with pytest.raises(Exception, match="guard/bad"):
            ask("request", **inputs)
    plain = [chat[0], {"role": "user", "content": "a"}]
    assert engine.prompts == [*encode([plain]), *encode(["a"])]
    assert engine.body["model"] is None and engine.body["kv_transfer_params"]["reply"] is False
    assert engine.authorization == "Bearer key"
    for kind, inputs in (("response", {"texts": ["a"]}), ("request", {"texts": [], "images": ["x"]})):
        with pytest.raises(Exception, match="Generic Guardrail API failed"):
            ask(kind, **inputs)
    assert len(engine.prompts) == 2


@pytest.mark.parametrize("logits", [[0.0, 1.0], [1.0, 0.0]], ids=["flagged", "fine"])
def test_replies_for_a_gateway(serve, logits):
    """Each text is a reply to the chat. Where it begins goes with each prompt, whose beginning may be cut."""
    client, engine = serve(["guard", "watch"], logits={"guard": [9.0, -9.0], "watch": logits})
    chat = [{"role": "user", "content": "Is it? " * 10}]
    body = {"input_type": "response", "structured_messages": chat, "texts": ["Yes.", "No, and again no. " * 9]}
    said = client.post("/beta/litellm_basic_guardrail_api", json=body).json()
    is_bad = logits[1] > 0
    assert said == ({"action": "BLOCKED", "blocked_reason": "watch/bad"} if is_bad else {"action": "NONE"})
    replies = [[*chat, {"role": "assistant", "content": text}] for text in body["texts"]]
    encoded, masks = PromptFormat(TOKENIZER, max_length=120).encode_replies(replies)
    assert engine.prompts == encoded and engine.starts == [mask.index(True) for mask in masks]
    assert engine.starts[0] != engine.starts[1]
    for change in ({"structured_messages": None}, {"texts": []}, {"texts": [""]}, {"input_type": "other"}):
        assert client.post("/beta/litellm_basic_guardrail_api", json=body | change).status_code == 400
    client, other = serve(["guard"])
    assert client.post("/beta/litellm_basic_guardrail_api", json=body).status_code == 400
    assert len(engine.prompts) == 2 and other.prompts == []


def test_the_path_may_have_a_prefix(serve):
    client, _ = serve(["guard"])
    assert client.post("/api/v1/moderations", json={"input": "a"}).status_code == 200
    assert client.get("/v1/moderations").status_code == 404
