"""Moderations and classifications, before a server of one route and an engine that says what it is told to."""

import json

import numpy as np
import pytest
from fastapi.testclient import TestClient
from played_server import LONGEST, TOKENIZER, play, save_heads
from prometheus_client import REGISTRY

from llama_probe.data.prompts import PromptFormat
from llama_probe.vllm.results import prompt_result
from llama_probe.vllm.settings import ProbeSettings


MODERATIONS, GUARDRAIL = "/v1/moderations", "/beta/litellm_basic_guardrail_api"
HEADS = {
    "guard": {"id2label": {0: "fine", 1: "bad"}, "threshold": 0.25},
    "raw": {"id2label": {0: "no", 1: "yes"}, "flagged": ["yes"], "prompt_format": "raw"},
    "mood": {"id2label": {0: "sad", 1: "glad", 2: "calm"}},
    "topics": {"id2label": {0: "a", 1: "b"}, "problem_type": "multi_label_classification", "threshold": [0.3, 0.9]},
    "size": {"num_labels": 1, "problem_type": "regression"},
    "windows": {"id2label": {0: "fine", 1: "bad"}, "threshold": 0.25, "window": 4, "max_length": 8},
    "watch": {"id2label": {0: "fine", 1: "bad"}, "flagged": ["bad"], "token_scope": "response", "max_length": 120},
}
LOGITS = {"guard": [0.9, 0.0], "raw": [2.0, 0.0], "mood": [0.0, 2.0, 1.0], "topics": [0.0, 2.0], "size": [1.5]}


def encode(*texts, kind: str = "chat") -> list[list[int]]:
    return PromptFormat(TOKENIZER, kind).encode(list(texts))


def counters(head: str) -> np.ndarray:
    names = (f"llama_probe_{n}_total" for n in ("scored", "flagged", "halted", "reply_tokens", "flagged_replies"))
    return np.array([REGISTRY.get_sample_value(name, {"probe": head}) or 0 for name in names])


@pytest.fixture
def serve(tmp_path):
    """A function that serves heads: a function that posts a body and returns the response, and the engine."""

    def start(heads=tuple(LOGITS), halt_on=None, hide_scores=False, **logits):
        folders = save_heads(tmp_path, {name: HEADS[name] for name in heads})
        settings = ProbeSettings(folders, halt_on, hide_scores=hide_scores)
        app, engine = play(settings, {name: {**LOGITS, **logits}[name] for name in heads}, root_path="/api")
        client = TestClient(app, raise_server_exceptions=False)

        def post(path: str, headers: dict | None = None, **body):
            content = {"Content-Type": "application/json", **(headers or {})}
            return client.post(path, content=json.dumps(body), headers=content)

        return post, engine

    return start


class TestModerations:
    def test_categories_are_the_labels_that_heads_flag(self, serve):
        post, engine = serve()
        said = post(MODERATIONS, input=["a", "b"], model="mine").json()
        assert (said["id"], said["model"], len(said["results"])) == ("modr-1", "mine", 2)
        assert set(said) == {"id", "model", "results"}
        for result in said["results"]:
            # A threshold of the head's own decides, not the largest score; `mood` and `size` have none.
            assert result["categories"] == {"guard/bad": True, "raw/yes": False, "topics/a": True, "topics/b": False}
            scores = {"guard/bad": 0.289, "raw/yes": 0.119, "topics/a": 0.5, "topics/b": 0.881}
            assert result["category_scores"] == pytest.approx(scores, abs=1e-3)
            assert result["flagged"] is True
        assert engine.body["max_tokens"] == 1
        assert engine.prompts == encode("a", "b") + encode("a", "b", kind="raw")
        heads = ["guard", "topics"], ["guard", "topics"], ["raw"], ["raw"]
        assert engine.asked == [{"probes": names, "reply": False, "reply_start": None} for names in heads]

    def test_rules_of_halting_decide_what_is_flagged(self, serve):
        rules = {"guard": {"threshold": 0.6}, "mood": {"label": "glad"}, "size": {"threshold": 1.0}}
        post, _ = serve(["guard", "mood", "size"], halt_on=rules)
        (result,) = post(MODERATIONS, input="a").json()["results"]
        assert result["categories"] == {"guard/bad": False, "mood/glad": True, "size/LABEL_0": True}
        assert result["category_scores"]["size/LABEL_0"] == 1.5
        post, _ = serve(["guard"], guard=[9.0, -9.0])
        assert post(MODERATIONS, input="a").json()["results"][0]["flagged"] is False

    def test_a_head_with_windows_says_where_it_flags_and_reads_a_text_whole(self, serve):
        text = "kind words and then bad ones"
        (ids,) = encode(text)
        first = len(ids) - len(encode("bad ones")[0]) + encode("bad ones")[0].index(TOKENIZER.encode("b")[0])
        post, engine = serve(["windows"], windows=[0.0, 2.0, first, first + 3, first, first + 3])
        (result,) = post(MODERATIONS, input=text).json()["results"]
        place = text.index("bad")
        assert result["category_passages"] == {"windows/bad": {"start": place, "end": place + 3, "text": "bad"}}
        assert engine.prompts == [ids]
        post, _ = serve(["windows"], windows=[2.0, 0.0, 0, 4, 0, 4])
        assert "category_passages" not in post(MODERATIONS, input=text).json()["results"][0]

    def test_flagged_text_is_not_counted_as_a_halted_prompt(self, serve):
        post, _ = serve(["guard"], halt_on={"guard": {}}, guard=[0.0, 9.0])
        before = counters("guard")
        assert post(MODERATIONS, input=["a", "b"]).json()["results"][1]["flagged"]
        assert post("/v1/completions").json()["choices"][0]["finish_reason"] == "content_filter"
        assert (counters("guard") - before).tolist() == [3, 3, 1, 0, 0]

    def test_content_parts_are_one_text(self, serve):
        post, engine = serve(["guard"])
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        assert len(post(MODERATIONS, input=parts).json()["results"]) == 1
        assert engine.prompts == encode("a\nb")


class TestClassify:
    def test_gives_one_head(self, serve):
        post, engine = serve()
        said = post("/classify", input=["a", "bc"], probe="mood").json()
        assert (said["object"], said["model"], [row["index"] for row in said["data"]]) == ("list", "tiny", [0, 1])
        for row in said["data"]:
            assert (row["label"], row["num_classes"]) == ("glad", 3)
            assert row["probs"] == pytest.approx([0.090, 0.665, 0.245], abs=1e-3)
        tokens = sum(map(len, engine.prompts))
        assert said["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
        of_heads = ("guard", "bad", [0.711, 0.289]), ("topics", "a", [0.5, 0.881]), ("size", None, [1.5])
        for head, label, probs in of_heads:
            (row,) = post(f"/classify?probe={head}", input="a").json()["data"]
            assert (row["label"], row["num_classes"]) == (label, len(probs))
            assert row["probs"] == pytest.approx(probs, abs=1e-3)

    def test_takes_chats_and_tokens(self, serve):
        post, engine = serve(["guard"])
        chat = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
        for body in ({"messages": chat}, {"input": [5, 6]}, {"input": [[5, 6], [7]]}):
            assert post("/classify", **body).status_code == 200
        assert engine.prompts == [*encode(chat), [5, 6], [5, 6], [7]]

    def test_takes_messages_as_clients_of_openai_send_them(self, monkeypatch, serve):
        """Content in parts, and arguments of tools as a text."""
        calls = "{% for c in m.tool_calls %}{% for k, v in c.function.arguments|items %}{{ k }}={{ v }}{% endfor %}{% endfor %}"
        monkeypatch.setattr(
            TOKENIZER, "chat_template", "{% for m in messages %}{{ m.content or '' }}" + calls + "|{% endfor %}"
        )
        post, engine = serve(["guard"])
        call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
        chat = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
        chat += [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "b"}]
        assert post("/classify", messages=chat).status_code == 200
        assert post(GUARDRAIL, input_type="request", structured_messages=chat).status_code == 200
        assert [TOKENIZER.decode(ids) for ids in engine.prompts] == ["a|x=1|b|"] * 2

    def test_needs_to_know_which_head(self, serve):
        post, engine = serve(["guard", "mood"])
        for asked in ({}, {"probe": "nowhere"}, {"probe": ["guard"]}):
            response = post("/classify", input="a", **asked)
            assert response.status_code == 400 and "guard, mood" in response.json()["detail"]
        assert engine.prompts == []
        post, _ = serve(["mood"])
        assert post("/classify", input="a").status_code == 200
        assert post(MODERATIONS, input="a").status_code == 400, "mood flags nothing"


def test_a_result_has_the_window_of_each_flagged_label(tmp_path):
    folders = save_heads(tmp_path, {"windows": HEADS["windows"]})
    settings = ProbeSettings(folders, {"windows": {"threshold": 0.1}})
    result = prompt_result(settings, {"windows": [2.0, 0.0, 1.0, 5.0, 3.0, 7.0]})  # fine, by the head's own threshold
    assert result["probes"]["windows"]["label"] == "fine"
    assert result["probes"]["windows"]["span"] == {"bad": [3, 7]} and result["halted"]["span"] == (3, 7)
    assert (
        "span"
        not in prompt_result(ProbeSettings(folders, hide_scores=True), {"windows": [0.0] * 6})["probes"]["windows"]
    )


def test_hidden_scores_are_decisions(serve):
    post, _ = serve(hide_scores=True)
    (result,) = post(MODERATIONS, input="a").json()["results"]
    assert result["category_scores"] == {"guard/bad": 1.0, "raw/yes": 0.0, "topics/a": 1.0, "topics/b": 0.0}
    values = {"guard": [0.0, 1.0], "topics": [1.0, 0.0], "mood": [0.0, 1.0, 0.0], "size": []}
    for (head, probs), label in zip(values.items(), ("bad", "a", "glad", None), strict=True):
        (row,) = post("/classify", input="a", probe=head).json()["data"]
        assert (row["label"], row["probs"]) == (label, probs)


@pytest.mark.parametrize("path", [MODERATIONS, "/classify?probe=guard"])
def test_other_inputs_are_refused_before_the_engine_is_asked(serve, path):
    post, engine = serve(["guard"])
    image = {"type": "image_url", "image_url": {"url": "x"}}
    for value in (None, [], 7, {}, ["a", 7], [image], [{"type": "text"}], [[]], [True], [[5, False]], "\udc80"):
        assert post(path, input=value).status_code == 400, value
    assert engine.prompts == []


def test_text_that_is_too_long_for_the_engine_is_refused_with_its_tokens(serve):
    post, engine = serve(["windows"], {"windows": {}}, windows=[2.0, 0.0, 1.0, 5.0, 3.0, 7.0])
    head = HEADS["windows"]["max_length"]
    text = "a " * LONGEST
    (ids,) = encode(text)
    assert len(ids) > LONGEST > head
    guarded = {"input_type": "request", "texts": ["b", text]}
    for path, body in (
        (MODERATIONS, {"input": ["b", text]}),
        ("/classify", {"input": ["b", text]}),
        (GUARDRAIL, guarded),
    ):
        response = post(path, **body)
        assert response.status_code == 400
        assert (
            f"input 1 has {len(ids)} tokens" in response.json()["detail"] and str(LONGEST) in response.json()["detail"]
        )
    assert engine.prompts == []
    most = [5] * LONGEST
    assert post("/classify", input=most).status_code == 200 and engine.prompts == [most], (
        "a text that fits is read whole"
    )
    assert post("/classify", input=[*most, 5]).status_code == 400


def test_input_without_a_score_is_an_error(serve):
    for logits in ("no turn", [float("nan"), 0.0]):
        post, _ = serve(["guard"], guard=logits)
        for path in (MODERATIONS, "/classify"):
            response = post(path, input="a")
            assert response.status_code == 400 and "input 0" in response.json()["error"]["message"]


def test_headers_of_other_middleware_stay(serve):
    post, _ = serve(("guard",))
    plain, said = post("/v1/completions"), post(MODERATIONS, input="a")
    assert said.headers["x-request-id"] == plain.headers["x-request-id"] == "7"
    assert int(said.headers["content-length"]) == len(said.content) != len(plain.content)


def test_path_may_have_a_prefix(serve):
    assert serve(["guard"])[0]("/api/v1/moderations", input="a").status_code == 200


class TestGuardrail:
    @pytest.mark.parametrize("is_flagged", [True, False])
    def test_blocks_a_request_that_is_flagged(self, serve, is_flagged):
        """Its messages are one chat, else each text alone. The gateway sends its key in a header of its own."""
        post, engine = serve(["guard"], guard=[0.9, 0.0] if is_flagged else [9.0, -9.0])
        blocked = {"action": "BLOCKED", "blocked_reason": "guard/bad"}
        chat = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}]
        for body in ({"texts": ["s", "a"], "structured_messages": chat}, {"texts": ["a"]}):
            answer = post(GUARDRAIL, {"x-api-key": "key"}, input_type="request", model="gpt", **body)
            assert answer.json() == (blocked if is_flagged else {"action": "NONE"})
        assert engine.prompts == encode([chat[0], {"role": "user", "content": "a"}]) + encode("a")
        assert engine.body["model"] is None and engine.asked[0]["reply"] is False
        assert engine.authorization == "Bearer key"
        for body in (
            {"input_type": "response", "texts": ["a"]},
            {"input_type": "request", "texts": [], "images": ["x"]},
        ):
            assert post(GUARDRAIL, **body).status_code == 400
        assert len(engine.prompts) == 2

    @pytest.mark.parametrize("is_flagged", [True, False])
    def test_scores_each_text_as_a_reply_to_the_chat(self, serve, is_flagged):
        """Where it begins goes with each prompt, whose beginning may be cut."""
        post, engine = serve(["guard", "watch"], guard=[9.0, -9.0], watch=[1.0 - is_flagged, 0.5])
        chat = [{"role": "user", "content": "Is it? " * 10}]
        body = {"input_type": "response", "structured_messages": chat, "texts": ["Yes.", "No, and again no. " * 9]}
        blocked, before = {"action": "BLOCKED", "blocked_reason": "watch/bad"}, counters("watch")
        assert post(GUARDRAIL, **body).json() == (blocked if is_flagged else {"action": "NONE"})
        assert (counters("watch") - before).tolist() == [0, 0, 0, 2, 2 * is_flagged]
        replies = [[*chat, {"role": "assistant", "content": text}] for text in body["texts"]]
        encoded, masks = PromptFormat(TOKENIZER, max_length=120).encode_replies(replies)
        starts = [asked["reply_start"] for asked in engine.asked]
        assert engine.prompts == encoded and starts == [mask.index(True) for mask in masks]
        assert starts[0] != starts[1]
        for change in ({"structured_messages": None}, {"texts": []}, {"texts": [""]}, {"input_type": "other"}):
            assert post(GUARDRAIL, **body | change).status_code == 400
        post, other = serve(["guard"])
        assert post(GUARDRAIL, **body).status_code == 400
        assert len(engine.prompts) == 2 and other.prompts == []
