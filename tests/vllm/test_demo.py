"""The command lines of the README and of docs/ that serve with vLLM, on the demo backbone, asked as a user would."""

import itertools
import re
import shlex

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
    arguments = ["demo", *words, *options.split()]
    with serving(arguments, tmp_path_factory.mktemp("demo") / "log") as url:
        yield url


def test_documented_server_gives_labels_and_replies_of_transformers(client, words):
    heads = [word for option, word in itertools.pairwise(words) if option == "--probe"]
    rules = read_halting([word for option, word in itertools.pairwise(words) if option == "--halt-on"])
    tokenizer = AutoTokenizer.from_pretrained(demo_backbone())
    model = LlamaForProbedGeneration.from_pretrained(demo_backbone(), probe=heads, dtype=torch.float32)
    own = {head: ProbeConfig.from_pretrained(head).threshold for head in rules}
    thresholds, halted = {head: rule.get("threshold", own[head]) for head, rule in rules.items()}, 0
    for text in PROMPTS:
        chat = [{"role": "user", "content": text}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        expected = model.generate(**inputs, max_new_tokens=8, do_sample=False, tokenizer=tokenizer)
        scores = {head: float(expected.probe_probabilities[head][0, 1]) for head in thresholds}
        flagged = any(scores[head] >= threshold for head, threshold in thresholds.items())
        response = ask(client, text, max_tokens=8)
        said = response.kv_transfer_params
        for name in heads:
            logits = torch.tensor(said["probes"][name]["logits"])
            torch.testing.assert_close(logits, expected.probe_logits[name][0], rtol=0, atol=1e-3)
            assert said["probes"][name]["label"] == expected.probe_labels[name][0]
        assert (said["halted"] is not None) == flagged
        halted += flagged
        assert (response.choices[0].message.content or "").strip() == ("" if flagged else expected.texts[0].strip())
    assert 0 < halted < len(PROMPTS)
