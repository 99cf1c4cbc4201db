"""A server that hides its scores, and says a text in place of a halted reply."""

import anthropic
import openai
import pytest
from http_server import ask, guarded, serving


@pytest.fixture(scope="module")
def hiding(tiny, flagged, tmp_path_factory):
    options = "--hide-scores --halt-reply 'I cannot help.' --api-key none"
    arguments = guarded(tiny, ["guard", "topics", "size"], flagged["threshold"], options)
    with serving(arguments, tmp_path_factory.mktemp("hiding") / "log") as url:
        yield url


def test_scores_are_hidden_and_halted_requests_get_a_reply(hiding, chats, flagged):
    reply = "I cannot help."
    text = next(text for text in chats if flagged[text])
    other = next(text for text in chats if not flagged[text])
    with openai.OpenAI(base_url=hiding, api_key="none", timeout=250, max_retries=0) as client:
        whole = ask(client.with_raw_response, text)
        response = whole.parse()
        said = response.kv_transfer_params
        labels = {name: probe["label"] for name, probe in said["probes"].items() if name != "size"}
        expected = f"guard={labels['guard']}, topics=({' '.join(labels['topics'])})"
        assert whole.headers["x-llama-probe"] == expected
        assert said["halted"] == {"head": "guard", "label": "bad"} and said["probes"]["size"] == {}
        assert all(set(probe) <= {"label", "flagged"} for probe in said["probes"].values())
        (choice,) = response.choices
        assert (choice.message.content, choice.finish_reason) == (reply, "content_filter")
        assert response.usage.completion_tokens == 0
        chunks = list(ask(client, text, stream=True))
        assert chunks[0].kv_transfer_params == said
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == reply
        assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, "content_filter"]
        texts = list(client.completions.create(model="tiny", prompt=chats[text], stream=True))
        (choice,) = (chunk.choices[0] for chunk in texts)
        assert (choice.text, choice.finish_reason) == (reply, "content_filter")
        assert texts[0].kv_transfer_params["halted"] == said["halted"]
        written = client.responses.create(model="tiny", input=text)
        assert (written.output_text, written.status) == (reply, "incomplete")
        events = list(client.responses.create(model="tiny", input=text, stream=True))
        assert (events[-1].response.output_text, events[-1].type) == (reply, "response.incomplete")
        assert ask(client, other).kv_transfer_params["halted"] is None
    with anthropic.Anthropic(base_url=hiding.removesuffix("/v1"), api_key="none", timeout=250) as client:
        options = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": text}]}
        with client.messages.stream(**options) as stream:
            streamed = stream.get_final_message()
        for message in (client.messages.create(**options), streamed):
            assert (message.content[0].text, message.stop_reason) == (reply, "refusal")


def test_labels_are_for_those_with_the_key(hiding):
    with openai.OpenAI(base_url=hiding, api_key="other", timeout=250, max_retries=0) as client:
        for path, body in (("/moderations", {"input": 7}), ("/../classify", {"input": "a"})):
            with pytest.raises(openai.AuthenticationError):
                client.post(path, cast_to=dict, body=body)
