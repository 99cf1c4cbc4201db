"""A server on two ranks whose guard follows replies, asked by the clients of OpenAI and Anthropic: nobody sees a flagged token."""

import asyncio
import itertools
from urllib.request import urlopen

import anthropic
import httpx
import openai
import psutil
import pytest
from conftest import make_lm
from http_server import ask, serving
from tiny_engine import HEADS, REPLY_HEADS, SIZES, TinyServing, make_serving
from transformers import AutoTokenizer


NEW, LONG, END = 12, 60, " Sorry."
EXTRA = {"extra_body": {"ignore_eos": True}}
SCORES = {"extra_body": {"ignore_eos": True, "kv_transfer_params": {"token_scores": True}}}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyServing:
    heads = {"watch": REPLY_HEADS["watch"], "tone": HEADS["tone"]}
    return make_serving(tmp_path_factory.mktemp("replies"), make_lm(**SIZES), heads)


@pytest.fixture(scope="module")
def replies(tiny, chats) -> dict[str, tuple[list[int], list[float]]]:
    """By text the reply of transformers, and what `watch` gives `bad` after each token of it."""
    found = {}
    for text, ids in chats.items():
        output = tiny.reference(ids, NEW + 1)
        scores = output.probe_token_logits["watch"][0].softmax(dim=-1)[:, 1]
        found[text] = output.sequences[0, len(ids) : len(ids) + NEW].tolist(), scores.tolist()
    return found


@pytest.fixture(scope="module")
def threshold(replies) -> float:
    """At which some replies are halted, one before its first token; far from all scores."""
    highest = sorted(max(scores) for _, scores in replies.values())
    every = sorted(score for _, scores in replies.values() for score in scores)
    low, high = highest[len(highest) // 3], highest[-1]
    inside = [score for score in every if low < score <= high]
    return max(itertools.pairwise(inside), key=lambda pair: pair[1] - pair[0])[0] + 1e-4


@pytest.fixture(scope="module")
def expected(tiny, chats, threshold) -> dict[str, tuple[str, int | None]]:
    """By text what a client sees of the LM, and the token that halted it."""
    found = {text: without_flagged(tiny, ids, threshold, NEW) for text, ids in chats.items()}
    assert {halt is None for _, halt in found.values()} == {True, False} and any(shown for shown, _ in found.values())
    return found


@pytest.fixture(scope="module")
def url(tiny, threshold, tmp_path_factory):
    probes = [word for name in tiny.heads for word in ("--probe", f"{name}={tiny.heads[name]}")]
    rule = f'watch={{"label": "bad", "threshold": {threshold}}}'
    options = "--served-model-name tiny --dtype float32 --max-model-len 512 --max-num-seqs 8 --enforce-eager -tp 2"
    arguments = [str(tiny.backbone), *probes, "--halt-on", rule, "--halt-reply", END, *options.split()]
    with serving(arguments, tmp_path_factory.mktemp("server") / "log") as url:
        yield url


def lm_text(text: str) -> str:
    """What the LM has written of a text, without half a character at its end, which vLLM does not send."""
    return text.removesuffix(END).rstrip("\ufffd")


def without_flagged(tiny, ids: list[int], threshold: float, new: int) -> tuple[str, int | None]:
    """What a client may see of a reply of transformers, and the token that halted it."""
    output = tiny.reference(ids, new + 1)
    scores = output.probe_token_logits["watch"][0, :new].softmax(dim=-1)[:, 1]
    halt = next((token for token, score in enumerate(scores) if score >= threshold), None)
    reply = output.sequences[0, len(ids) : len(ids) + new][:halt]
    return lm_text(AutoTokenizer.from_pretrained(tiny.backbone).decode(reply, skip_special_tokens=True)), halt


def test_whole_replies_and_streams(client, tiny, chats, replies, expected):
    for text, (shown, halt) in expected.items():
        response = ask(client, text, max_tokens=NEW, **SCORES)
        (choice,) = response.choices
        reason = "length" if halt is None else "content_filter"
        assert lm_text(choice.message.content) == shown
        assert choice.message.content.endswith(END) == (halt is not None)
        assert (choice.finish_reason, response.usage.completion_tokens) == (reason, NEW if halt is None else halt)
        (reply,) = response.kv_transfer_params["replies"]
        assert (reply["halted"] and reply["halted"]["token"]) == halt
        assert reply["probes"]["watch"]["tokens"] == (NEW if halt is None else halt + 1)
        tiny.check_tokens(chats[text], replies[text][0], reply, reply["probes"]["watch"]["tokens"])
        chunks = list(ask(client, text, max_tokens=NEW, stream=True, **SCORES))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == [reason]
        assert list(chunks[0].kv_transfer_params["probes"]) == ["tone"]
        assert chunks[-1].kv_transfer_params["replies"] == response.kv_transfer_params["replies"]


def test_several_choices(client, chats, expected):
    texts = [text for text in chats if expected[text][1] is not None][:1] + [
        text for text in chats if expected[text][1] is None
    ][:1]
    options = {"max_tokens": NEW, "temperature": 0.0, **EXTRA}
    whole = client.completions.create(model="tiny", prompt=[chats[text] for text in texts], **options)
    for text, choice in zip(texts, whole.choices, strict=True):
        shown, halt = expected[text]
        assert lm_text(choice.text) == shown and choice.text.endswith(END) == (halt is not None)
        assert choice.finish_reason == ("length" if halt is None else "content_filter")
        assert bool(choice.kv_transfer_params["halted"]) == (halt is not None)
    sampled = client.completions.create(model="tiny", prompt=chats[texts[0]], n=3, **options | {"temperature": 1.0})
    said = sampled.kv_transfer_params["replies"]
    assert len(said) == 3
    for choice, reply in zip(sampled.choices, said, strict=True):
        assert (choice.finish_reason == "content_filter") == bool(reply["halted"]) == choice.text.endswith(END)


def test_other_routes(url, client, expected):
    with anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="none", timeout=250, max_retries=0) as messages:
        for text, (shown, halt) in list(expected.items())[:3]:
            response = client.responses.create(
                model="tiny", input=text, temperature=0.0, max_output_tokens=NEW, **EXTRA
            )
            assert (response.status == "incomplete") and (halt is None) == (
                response.incomplete_details.reason == "max_output_tokens"
            )
            assert halt is None or response.incomplete_details.reason == "content_filter"
            chat = [{"role": "user", "content": text}]
            greedy = {"extra_body": {"temperature": 0.0, "ignore_eos": True}}
            options = {"model": "tiny", "max_tokens": NEW, "messages": chat, **greedy}
            whole = messages.messages.create(**options)
            with messages.messages.stream(**options) as stream:
                streamed = stream.get_final_message()
            for message in (whole, streamed):
                assert (message.stop_reason == "refusal") == (halt is not None)
                text = "".join(block.text for block in message.content)
                assert lm_text(text) == shown and text.endswith(END) == (halt is not None)


def test_metrics(url, client, expected):
    ask(client, next(text for text, (_, halt) in expected.items() if halt is not None), max_tokens=NEW, **EXTRA)
    with urlopen(url.removesuffix("v1") + "metrics", timeout=250) as response:
        lines = dict(line.rsplit(" ", 1) for line in response.read().decode().splitlines() if line[:1] != "#")
    for name in ("halted_replies", "flagged_replies", "reply_tokens"):
        assert float(lines[f'llama_probe_{name}_total{{probe="watch"}}']) > 0
    assert float(lines['llama_probe_halted_total{probe="watch"}']) == 0


def test_kill_9_of_the_engine_lets_no_unscored_token_through(url, tiny, chats, threshold):
    """Streams end with an error, and so does the server, which no other test can ask afterwards."""
    processes = psutil.Process().children(recursive=True)
    alive = [process for process in processes if process.status() != psutil.STATUS_ZOMBIE]  # of earlier servers
    engine = next(process for process in alive if "EngineCore" in " ".join(process.cmdline()))
    server = engine.parent()

    async def stream(client, text):
        seen = ""
        try:
            async for chunk in await ask(client, text, max_tokens=LONG, stream=True, **EXTRA):
                seen += chunk.choices[0].delta.content or ""
                if seen and engine.is_running():
                    engine.kill()
        except (openai.APIError, httpx.HTTPError):
            return seen, True
        return seen, False

    async def all_streams():
        async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=100, max_retries=0) as client:
            return await asyncio.gather(*(stream(client, text) for text in chats))

    cut = []
    for (text, ids), (seen, is_cut) in zip(chats.items(), asyncio.run(all_streams()), strict=True):
        shown, _ = without_flagged(tiny, ids, threshold, LONG)
        assert shown.startswith(lm_text(seen)), text
        assert is_cut or lm_text(seen) == shown, "what had ended before is whole"
        cut.append(is_cut)
    assert any(cut)
    server.wait(timeout=100)
