"""docs/troubleshooting.md: each mistake gives the one line that the page quotes."""

import re
import shlex

import pytest
from command_line import refuse
from conftest import make_lm, make_probe, make_tokenizer, save_head
from repository import ROOT
from training_runs import write

from llama_probe import ProbeError
from llama_probe.data.prompts import PromptFormat


PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
IMPORTS = """
import torch
from llama_probe import *
from transformers import AutoModelForCausalLM, GenerationConfig, TrainingArguments, pipeline
"""
MISTAKES = re.findall(r"^\| `(.*)` \| (.*) \|$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("desk")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lm, tokenizer = make_lm(vocab_size=260), make_tokenizer()
        lm.save_pretrained("backbone")
        tokenizer.save_pretrained("backbone")
        fields = PromptFormat(tokenizer).config_fields() | {"id2label": {0: "fine", 1: "rude"}, "flagged": ["rude"]}
        save_head(make_probe(base_model_name_or_path="backbone", **fields), "guard")
        save_head(make_probe(base_model_name_or_path="backbone", id2label={0: "cold", 1: "warm"}), "tone")
        save_head(make_probe(hidden_size=64), "larger")
        (folder / "checkpoint").mkdir()
        (folder / "checkpoint" / "training_args.bin").touch()
        texts = [f"{word} {number}" for number in range(20) for word in ("good", "bad")]
        rows = [(text, text.split()[0]) for text in texts]
        write(folder / "rows.jsonl", [{"text": text, "label": label} for text, label in rows])
        inputs = tokenizer(texts[:2], return_tensors="pt", padding=True)
        names = {"name": "backbone", "lm": lm, "tokenizer": tokenizer}
        names |= {"texts": texts[:2], "rows": rows, "inputs": inputs}
        exec(IMPORTS, names)
        yield names | {"model": names["AutoModelForCausalLM"].from_pretrained("backbone", probe="guard")}


@pytest.mark.parametrize("code, quoted", MISTAKES, ids=[code[:40] for code, _ in MISTAKES])
def test_a_mistake(desk, code, quoted):
    if code.startswith("llama-probe"):
        message = refuse(*shlex.split(code.replace("--backbone name", "--backbone backbone"))[1:])
    else:
        with pytest.raises((ProbeError, KeyError)) as caught:
            eval(code, dict(desk))
        message = str(caught.value)
    assert quoted in message and "\n" not in message.strip()
