"""A server on two ranks with a guard, asked by the clients of OpenAI and Anthropic."""

import asyncio
import http.client
import json
import time
import urllib.error
import urllib.request

import anthropic
import openai
import pytest
from http_server import HEADERS, ask, guarded, judging, post, serving
from tiny_engine import HEADS

from llama_probe.vllm.payloads import Scores


LONG = "far too long " * 2000
CHAT = [{"role": "user", "content": LONG}]
# A body with a prompt above the server's 512 tokens, by route.
ROUTES = {
    "v1/chat/completions": {"messages": CHAT},
    "v1/chat/completions/batch": {"messages": [CHAT]},
    "v1/completions": {"prompt": LONG},
    "v1/responses": {"input": LONG},
    "v1/messages": {"messages": CHAT, "max_tokens": 4},
    "v1/moderations": {"input": LONG},
    "classify": {"input": LONG, "probe": "tone"},
    "generative_scoring": {"query": LONG, "items": ["a"], "label_token_ids": [40, 41]},
    "invocations": {"messages": CHAT},
}
MALFORMED = {
    "empty": b"",
    "cut off": b'{"model": "tiny", "messages": [',
    "no object": b"[1]",
    "null": b"null",
    "no UTF-8": b'{"model": "tiny", "input": "\xff"}',
    "nothing asked": b'{"model": "tiny"}',
    "wrong types": b'{"model": "tiny", "messages": 7, "prompt": {"a": 1}, "input": 7, "query": 7, "items": 7}',
    "nested": b"[" * 100_000,
    "an unknown head": rb'{"model": "tiny", "prompt": "a", "kv\u005ftransfer_params": {"probes": ["nowhere"]}}',
}


def status(url: str, path: str, body: bytes) -> int:
    request = urllib.request.Request(url.removesuffix("v1") + path, body, HEADERS)
    try:
        return urllib.request.urlopen(request, timeout=250).status
    except urllib.error.HTTPError as error:
        return error.code


def metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url.removesuffix("v1") + "metrics", timeout=250) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


@pytest.fixture(scope="module")
def band(tiny, chats, flagged) -> list[float]:
    """Scores of `guard` in which a judge decides: the last chat that is not flagged, and the first that is."""
    scores = {text: float(tiny.reference(ids).probe_probabilities["guard"][0, 1]) for text, ids in chats.items()}
    low, high = (
        nearest(score for text, score in scores.items() if flagged[text] is flag)
        for nearest, flag in ((max, False), (min, True))
    )
    return [low - 1e-4, high + 1e-4]


@pytest.fixture(scope="module")
def judge(chats, flagged):
    """Knows which chats are flagged. Its URL, and the texts that it was asked about."""
    with judging(lambda asked: any(flagged[text] and text.split()[0] in asked for text in chats)) as judge:
        yield judge


@pytest.fixture(scope="module")
def url(tiny, band, judge, tmp_path_factory):
    options = '--tensor-parallel-size 2 --max-num-batched-tokens 64 --api-key none --compilation-config \'{"backend": "eager"}\''
    options += f" --judge {judge[0]} --unsure guard={band[0]}:{band[1]}"
    arguments = guarded(tiny, list(HEADS), band[1], options)  # from its end on nobody is asked
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
        with serving(arguments, tmp_path_factory.mktemp("server") / "log") as url:
            yield url


def test_complete_responses(client, tiny, chats, flagged):
    for text, ids in chats.items():
        response = ask(client, text, extra_body={"ignore_eos": True})
        tiny.check(response.kv_transfer_params["probes"], ids)
        (choice,) = response.choices
        if flagged[text]:
            assert not choice.message.content and response.usage.completion_tokens == 0
            assert (choice.finish_reason, choice.stop_reason) == ("content_filter", "guard")
            assert response.kv_transfer_params["halted"]["head"] == "guard"
        else:
            assert response.usage.completion_tokens == 4 and choice.finish_reason == "length"
            assert response.kv_transfer_params["halted"] is None
    text, ids = next(iter(chats.items()))
    response = ask(client, text, extra_body={"kv_transfer_params": {"probes": ["size"]}})
    tiny.check(response.kv_transfer_params["probes"], ids, ("guard", "size"))


def test_a_judge_is_asked_once_a_prompt(url, client, chats, flagged, judge):
    asked = []
    for text in chats:
        for options in ({}, {"n": 2, "temperature": 1.0, "logprobs": True}, {"stream": True}):
            judge[1].clear()
            response = ask(client, text, extra_body={"ignore_eos": True}, **options)
            known = (next(iter(response)) if "stream" in options else response).kv_transfer_params
            assert len(judge[1]) == ("judged" in known) and "unsure" not in known
            if judge[1]:
                assert text.strip() in judge[1][0] and (known["judged"]["guard"] == "halted") == flagged[text]
                asked.append(flagged[text])
    assert {*asked} == {False, True}
    lines = [name for name in metrics(url) if name.startswith("llama_probe_judged_total")]
    assert len(lines) == 2


@pytest.mark.parametrize("copies", [1, 2])
def test_streams_of_chats_at_the_same_time(url, tiny, chats, flagged, copies):
    async def stream(client, text):
        options = {"n": copies, "temperature": copies - 1, "extra_body": {"ignore_eos": True}}
        return [chunk async for chunk in await ask(client, text, stream=True, **options)]

    async def all_streams():
        async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=250, max_retries=0) as client:
            return await asyncio.gather(*(stream(client, text) for text in chats))

    for (text, ids), chunks in zip(chats.items(), asyncio.run(all_streams()), strict=True):
        first = {chunk.choices[0].index: chunk for chunk in reversed(chunks)}
        assert sorted(first) == list(range(copies))
        for chunk in first.values():
            tiny.check(chunk.kv_transfer_params["probes"], ids)
            assert not chunk.choices[0].delta.content
        later = [chunk for chunk in chunks if chunk not in first.values()]
        if flagged[text]:
            assert len(later) == copies
            assert all(chunk.choices[0].finish_reason == "content_filter" for chunk in later)
            assert all(chunk.choices[0].stop_reason == "guard" for chunk in later)
        else:
            assert [chunk.choices[0].finish_reason for chunk in later].count("length") == copies


def test_responses(client, tiny, chats, flagged):
    options = {"model": "tiny", "temperature": 0.0, "max_output_tokens": 16}
    for text, ids in chats.items():
        whole = client.responses.create(input=text, **options)
        events = list(client.responses.create(input=text, stream=True, **options))
        later = next(iter(client.responses.create(input=text, stream=True, background=True, **options))).response
        assert events[0].type == "response.created"
        tiny.check(whole.kv_transfer_params["probes"], ids)
        tiny.check(events[0].response.kv_transfer_params["probes"], ids)
        stored = client.responses.retrieve(whole.id)
        replayed = list(client.responses.retrieve(later.id, stream=True))[-1]
        for response in (whole, events[-1].response, stored, replayed.response):
            if flagged[text]:
                assert (response.status, response.incomplete_details.reason) == ("incomplete", "content_filter")
                assert response.output_text == "" and response.kv_transfer_params["halted"]["head"] == "guard"
            else:
                assert response.incomplete_details is None or response.incomplete_details.reason == "max_output_tokens"
        for last in (events[-1], replayed):
            assert last.type == ("response.incomplete" if flagged[text] else "response.completed")


def test_messages(url, tiny, chats, flagged):
    with anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="none", timeout=250, max_retries=0) as client:
        for text, ids in chats.items():
            options = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": text}]}
            whole = client.messages.create(**options)
            with client.messages.stream(**options) as stream:
                first = next(iter(stream))
                streamed = stream.get_final_message()
            assert first.type == "message_start"
            tiny.check(first.message.kv_transfer_params["probes"], ids)
            tiny.check(whole.kv_transfer_params["probes"], ids)
            for message in (whole, streamed):
                assert (message.stop_reason == "refusal") == flagged[text]
                assert not flagged[text] or (message.stop_sequence is None and message.usage.output_tokens == 0)


def test_the_header_in_other_clients(monkeypatch, url, client, chats):
    """As docs/scaling.md shows."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # its import asks GitHub for prices
    import litellm
    from langchain_openai import ChatOpenAI

    text = next(iter(chats))
    raw = ask(client.with_raw_response, text)
    said = raw.headers["x-llama-probe"]
    assert said == Scores("tiny", prompts=[raw.parse().kv_transfer_params]).header
    messages = [{"role": "user", "content": text}]
    options = {"api_base": url, "api_key": "none", "temperature": 0.0, "max_tokens": 4}
    for stream in (False, True):
        response = litellm.completion("hosted_vllm/tiny", messages, stream=stream, **options)
        assert response._hidden_params["additional_headers"]["llm_provider-x-llama-probe"] == said
    chat = ChatOpenAI(model="tiny", base_url=url, api_key="none", max_tokens=4, include_response_headers=True)
    assert chat.invoke(text).response_metadata["headers"]["x-llama-probe"] == said
    assert next(chat.stream(text)).response_metadata["headers"]["x-llama-probe"] == said


@pytest.mark.parametrize("path", sorted(ROUTES.keys() - {"generative_scoring"}))  # vLLM cuts its prompts
def test_prompts_that_are_too_long(url, path):
    assert status(url, path, json.dumps({"model": "tiny", **ROUTES[path]}).encode()) == 400


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_bodies(url, kind):
    found = {path: status(url, path, MALFORMED[kind]) for path in ROUTES}
    assert found == dict.fromkeys(ROUTES, 400)


def test_clients_that_go_away(url, client, chats, flagged):
    text = min((text for text in chats if not flagged[text]), key=lambda text: len(chats[text]))
    asked = {"max_tokens": 500 - len(chats[text]), "ignore_eos": True}
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": text}], **asked})
    for _ in range(8):
        connection = http.client.HTTPConnection(url.split("/")[2])
        connection.request("POST", "/v1/chat/completions", body, HEADERS)
        connection.close()
        with ask(client, text, stream=True, max_tokens=asked["max_tokens"], extra_body={"ignore_eos": True}) as stream:
            next(iter(stream))

    def running() -> float:
        return sum(value for name, value in metrics(url).items() if name.startswith("vllm:num_requests_running"))

    end = time.monotonic() + 100
    while ask(client, text).choices and running():  # a step counts what runs
        assert time.monotonic() < end, "requests of clients that are gone still run"
        time.sleep(0.2)


def test_moderations(client, tiny, chats, flagged):
    said = client.moderations.create(input=list(chats), model="tiny")
    assert said.id.startswith("modr-") and said.model == "tiny"
    for (text, ids), result in zip(chats.items(), said.results, strict=True):
        reference, scores = tiny.reference(ids), result.category_scores.to_dict()
        expected = {"guard/bad": reference.probe_probabilities["guard"][0, 1]}
        expected |= {f"topics/LABEL_{i}": score for i, score in enumerate(reference.probe_probabilities["topics"][0])}
        expected["mood/LABEL_1"] = reference.probe_probabilities["mood"][0, 1]
        assert scores == pytest.approx({name: float(score) for name, score in expected.items()}, abs=1e-5)
        # The server's threshold decides, not the head's own.
        assert result.categories.to_dict()["guard/bad"] == flagged[text]
        assert result.flagged == any(result.categories.to_dict().values())
    (alone,) = client.moderations.create(input=list(chats)[1]).results
    assert alone.category_scores.to_dict() == pytest.approx(said.results[1].category_scores.to_dict(), abs=1e-5)
    with pytest.raises(openai.NotFoundError, match="other"):
        client.moderations.create(input="a", model="other")
    with pytest.raises(openai.BadRequestError, match="context length"):
        client.moderations.create(input="far too long " * 200)


def test_metrics(url, client, chats, flagged):
    before = metrics(url)
    client.completions.create(model="tiny", prompt=list(chats.values()), n=2, temperature=1.0, max_tokens=2)
    grown = {name: value - before.get(name, 0) for name, value in metrics(url).items() if "_total" in name}
    scored = {name: value for name, value in grown.items() if name.startswith("llama_probe_scored_total")}
    assert scored == {f'llama_probe_scored_total{{probe="{name}"}}': len(chats) for name in HEADS}
    for head, halted in (("guard", sum(flagged[text] for text in chats)), ("tone", 0)):
        assert grown[f'llama_probe_halted_total{{probe="{head}"}}'] == halted
        assert grown[f'llama_probe_flagged_total{{probe="{head}"}}'] == halted


def test_the_next_token_of_a_halted_prompt_has_no_score(url, chats, flagged):
    for text, ids in chats.items():
        body = {"query": ids[:-1], "items": [ids[-1:]], "label_token_ids": [40, 41]}
        if not flagged[text]:
            with post(url.removesuffix("v1") + "generative_scoring", body) as response:
                assert 0 < json.load(response)["data"][0]["score"] < 1
            continue
        with pytest.raises(urllib.error.HTTPError) as error:
            post(url.removesuffix("v1") + "generative_scoring", body)
        assert error.value.code == 400 and "guard halts this prompt" in error.value.read().decode()


def test_streams_of_texts(client, tiny, chats, flagged):
    prompts = list(chats.values())
    options = {"max_tokens": 3, "temperature": 0.0, "extra_body": {"ignore_eos": True}}
    chunks = list(client.completions.create(model="tiny", prompt=prompts, stream=True, **options))
    first = {chunk.choices[0].index: chunk for chunk in reversed(chunks)}
    for index, (text, ids) in enumerate(chats.items()):
        tiny.check(first[index].kv_transfer_params["probes"], ids)
        own = [chunk for chunk in chunks if chunk.choices[0].index == index]
        assert own[-1].choices[0].finish_reason == ("content_filter" if flagged[text] else "length")
        assert len(own) <= (1 if flagged[text] else 3)  # vLLM may join chunks that wait for their reader
        assert (own[0].choices[0].text == "") or not flagged[text]
        assert (own[0].id, own[0].model) == (chunks[0].id, "tiny")
    complete = client.completions.create(model="tiny", prompt=prompts[0], **options)
    tiny.check(complete.kv_transfer_params["probes"], prompts[0])


def test_complete_responses_to_several_prompts(client, tiny, chats, flagged):
    options = {"max_tokens": 3, "temperature": 0.0, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(model="tiny", prompt=list(chats.values()), **options)
    messages = [[{"role": "user", "content": text}] for text in chats]
    body = {"model": "tiny", "messages": messages, "max_tokens": 3}
    batch = client.post("/chat/completions/batch", cast_to=dict, body=body)
    for response in (whole.model_dump(), batch):
        assert response["kv_transfer_params"] is None and len(response["choices"]) == len(chats)
        for choice, (text, ids) in zip(response["choices"], chats.items(), strict=True):
            said = choice["kv_transfer_params"]
            tiny.check(said["probes"], ids)
            assert (choice["stop_reason"] == "guard") == flagged[text] == (said["halted"] is not None)
            assert (choice["finish_reason"] == "content_filter") == flagged[text]
    prompts = list(chats.values())[:2]
    twice = client.completions.create(model="tiny", prompt=prompts, n=2, **options | {"temperature": 1.0})
    for choice in twice.choices:
        tiny.check(choice.kv_transfer_params["probes"], prompts[choice.index // 2])


def test_replies_that_a_text_ends_have_scores(client, tiny, chats, flagged):
    text = next(text for text in chats if not flagged[text])
    said = ask(client, text, max_tokens=12, extra_body={"ignore_eos": True}).choices[0].message.content
    response = ask(client, text, max_tokens=12, stop=[said[2:4]], extra_body={"ignore_eos": True})
    assert response.choices[0].finish_reason == "stop" and response.choices[0].message.content == said[:2]
    tiny.check(response.kv_transfer_params["probes"], chats[text])


def test_beams_are_refused_beside_a_guard(client):
    with pytest.raises(openai.BadRequestError, match="beam search does not go with heads that halt"):
        ask(client, "alpha", n=2, extra_body={"use_beam_search": True})


def test_labels_are_for_those_with_the_key(url):
    with openai.OpenAI(base_url=url, api_key="other", timeout=250, max_retries=0) as client:
        for path, body in (("/moderations", {"input": 7}), ("/../classify", {"input": "a"})):
            with pytest.raises(openai.AuthenticationError):
                client.post(path, cast_to=dict, body=body)
