"""The command lines of the README and of docs/ that serve with vLLM, on the demo backbone, asked as a user would."""

import itertools
import re
import shlex

import openai
import pytest
import torch
from http_server import serving
from repository import ROOT
from transformers import AutoTokenizer

from llama_probe import LlamaForProbedGeneration, ProbeConfig
from llama_probe.backbone.loading import demo_backbone
from llama_probe.cli.demo import HEADS, PROMPTS
from llama_probe.serving.halting_words import read_halting


LINE = re.compile(r"^ *python -m llama_probe\.vllm \S+ (.*)$", re.MULTILINE)


def command_lines() -> set[str]:
    """What follows the name of the model; each once."""
    return {
        line for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) for line in LINE.findall(page.read_text())
    }


def test_there_is_one():
    assert command_lines()


@pytest.mark.slow
@pytest.mark.parametrize("line", sorted(command_lines()))
def test_the_demo_over_http(line, tmp_path):
    """With the heads of `llama-probe demo` beside those of the line. The guard of the demo halts, too."""
    words = shlex.split(line)
    words += [word for head in HEADS if head not in words for word in ("--probe", head)]
    if "safety" not in shlex.split(line):
        words += ["--halt-on", 'safety={"threshold": 0.5}']
    heads, halting = (
        [word for option, word in itertools.pairwise(words) if option == name] for name in ("--probe", "--halt-on")
    )
    folder = demo_backbone()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForProbedGeneration.from_pretrained(folder, probe=heads, dtype=torch.float32)
    thresholds = {
        head: rule.get("threshold", ProbeConfig.from_pretrained(head).threshold)
        for head, rule in read_halting(halting).items()
    }
    options = "--dtype float32 --enforce-eager --max-model-len 512 --served-model-name demo"
    halted = 0
    with (
        serving(["demo", *words, *options.split()], tmp_path / "log") as url,
        openai.OpenAI(base_url=url, api_key="none", timeout=250) as client,
    ):
        for text in PROMPTS:
            chat = [{"role": "user", "content": text}]
            inputs = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            found = expected.probe_probabilities
            flagged = any(float(found[head][0, 1]) >= threshold for head, threshold in thresholds.items())
            response = client.chat.completions.create(model="demo", messages=chat, max_tokens=8, temperature=0.0)
            said = response.kv_transfer_params
            for name in heads:
                logits = torch.tensor(said["probes"][name]["logits"])
                torch.testing.assert_close(logits, expected.probe_logits[name][0], rtol=0, atol=1e-3)
                assert said["probes"][name]["label"] == expected.probe_labels[name][0]
            assert (said["halted"] is not None) == flagged
            halted += flagged
            new = expected.sequences[0, inputs["input_ids"].shape[1] :]
            reply = "" if flagged else tokenizer.decode(new, skip_special_tokens=True)
            assert (response.choices[0].message.content or "").strip() == reply.strip()
    assert 0 < halted < len(PROMPTS)
