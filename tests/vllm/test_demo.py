"""The command lines of the README and of docs/ that serve with vLLM, on the demo backbone, asked as a user would."""

import itertools
import re
import shlex

import anthropic
import pytest
import torch
from http_server import ask, serving
from repository import ROOT
from transformers import AutoTokenizer

from llama_probe import LlamaForProbedGeneration, ProbeConfig
from llama_probe.backbone.loading import demo_backbone
from llama_probe.cli.demo import HEADS, PROMPTS
from llama_probe.vllm.halting_words import read_halting


LINE = re.compile(r"^ *python -m llama_probe\.vllm \S+ (.*)$", re.MULTILINE)
REPLY = "I cannot help."
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def words() -> list[str]:
    """The options of all lines together, and the heads of `llama-probe demo`."""
    pages = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    lines = [shlex.split(line) for page in pages for line in LINE.findall(page.read_text())]
    assert lines
    options = [pair for line in lines for pair in zip(line[::2], line[1::2], strict=True)]
    options += [("--probe", head) for head in HEADS]
    return list(itertools.chain.from_iterable(dict.fromkeys(options)))


@pytest.fixture(scope="module")
def url(words, tmp_path_factory):
    options = "--dtype float32 --enforce-eager --max-model-len 512 --served-model-name tiny"
    arguments = ["demo", *words, "--halt-reply", REPLY, *options.split()]
    with serving(arguments, tmp_path_factory.mktemp("demo") / "log") as url:
        yield url


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_backbone())


def test_labels_and_replies_are_those_of_transformers(client, words, tokenizer):
    heads, halting = (
        [word for option, word in itertools.pairwise(words) if option == name] for name in ("--probe", "--halt-on")
    )
    model = LlamaForProbedGeneration.from_pretrained(demo_backbone(), probe=heads, dtype=torch.float32)
    thresholds = {
        head: rule.get("threshold", ProbeConfig.from_pretrained(head).threshold)
        for head, rule in read_halting(halting).items()
    }
    halted = 0
    for text in PROMPTS:
        chat = [{"role": "user", "content": text}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        expected = model.generate(**inputs, max_new_tokens=8, do_sample=False, tokenizer=tokenizer)
        found = expected.probe_probabilities
        flagged = any(float(found[head][0, 1]) >= threshold for head, threshold in thresholds.items())
        response = ask(client, text, max_tokens=8)
        said = response.kv_transfer_params
        for name in heads:
            logits = torch.tensor(said["probes"][name]["logits"])
            torch.testing.assert_close(logits, expected.probe_logits[name][0], rtol=0, atol=1e-3)
            assert said["probes"][name]["label"] == expected.probe_labels[name][0]
        assert (said["halted"] is not None) == flagged
        halted += flagged
        assert response.choices[0].message.content.strip() == (REPLY if flagged else expected.texts[0].strip())
    assert 0 < halted < len(PROMPTS)


def test_halted_requests_get_a_reply(url, client, tokenizer):
    text = PROMPTS[4]
    response = ask(client, text)
    said, (choice,) = response.kv_transfer_params, response.choices
    assert (choice.message.content, choice.finish_reason) == (REPLY, "content_filter")
    assert response.usage.completion_tokens == 0 and said["halted"]["head"] == "safety"
    chunks = list(ask(client, text, stream=True))
    assert chunks[0].kv_transfer_params == said
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == REPLY
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, "content_filter"]
    chat = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    (chunk,) = client.completions.create(model="tiny", prompt=ids, stream=True)
    assert (chunk.choices[0].text, chunk.choices[0].finish_reason) == (REPLY, "content_filter")
    assert chunk.kv_transfer_params["halted"] == said["halted"]
    written = client.responses.create(model="tiny", input=text)
    assert (written.output_text, written.status) == (REPLY, "incomplete")
    last = list(client.responses.create(model="tiny", input=text, stream=True))[-1]
    assert (last.response.output_text, last.type) == (REPLY, "response.incomplete")
    with anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="none", timeout=250) as messages:
        options = {"model": "tiny", "max_tokens": 4, "messages": chat}
        with messages.messages.stream(**options) as stream:
            streamed = stream.get_final_message()
        for message in (messages.messages.create(**options), streamed):
            assert (message.content[0].text, message.stop_reason) == (REPLY, "refusal")
