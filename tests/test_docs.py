"""The pages of docs/: every block of code runs, in order, with the tiny backbone in place of the one that they name."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import refuse
from conftest import make_lm, make_probe, make_tokenizer, save_head, with_novelty
from repository import ROOT
from torch.distributed.run import parse_args
from training_runs import write

from llama_probe import ProbeConfig, ProbeError, ProbeModel
from llama_probe.backbone import loading as backbones
from llama_probe.cli import app
from llama_probe.data.prompts import PromptFormat


DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
TRAINING = ("training.md", "tutorial-classifier.md")  # each trains several heads
WRITTEN = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *DOCS.rglob("*.md")))
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# What the pages speak of as bundled: folders of these names come first.
HEADS = {
    "safety": ("multimax", ("harmless", "harmful")),
    "safety-categories": ("multimax", ("violence", "hate", "sexual", "self-harm", "crime", "privacy")),
    "toxicchat-mha": ("mha", ("non-toxic", "toxic")),
    "toxicchat-gate": ("gate", ("non-toxic", "toxic")),
    "sst2-mha": ("mha", ("negative", "positive")),
    "my-guard": ("multimax", ("harmless", "harmful")),  # with windows
    "emotion-mha": ("mha", ("sadness", "joy", "love", "anger", "fear", "surprise")),
}


@pytest.fixture
def desk(backbone_folder, tmp_path, monkeypatch, hub, no_plots):
    """A folder to work in, with heads for the tiny backbone, and a Hub."""
    _, tokenizer = backbones.load_backbone(str(backbone_folder), device="cpu")
    fields = PromptFormat(tokenizer).config_fields()
    for seed, (name, (head_type, labels)) in enumerate(HEADS.items()):
        probe = make_probe(
            seed, probe_type=head_type, id2label=dict(enumerate(labels)), base_model_name_or_path=str(backbone_folder),
            token_scope="last_user", window=16 if name == "my-guard" else 0, **({"thresholds": {"fpr-0.5%": 0.9}} if len(labels) == 2 else {}),
            problem_type=f"{'multi' if name == 'safety-categories' else 'single'}_label_classification", **fields,
        )  # fmt: skip
        save_head(with_novelty(probe) if name == "emotion-mha" else probe, tmp_path / name)
    rows = [json.dumps({"id": i, "text": f"Is number {i} lucky?", "label": ("no", "yes")[i % 2]}) for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", hub.add_user("user"))
    monkeypatch.setattr(backbones, "demo_backbone", lambda: backbone_folder)
    monkeypatch.setattr(backbones, "_DEMO_TARGET", backbones.backbone_target(str(backbone_folder)))
    monkeypatch.setattr(backbones, "DEMO_MODEL_ID", str(backbone_folder))
    return tmp_path


def run_shell(block: str, backbone: Path) -> None:
    for line in block.strip().splitlines():
        program, *words = shlex.split(line)
        if program == "pip" or words[:2] == ["-m", "llama_probe.vllm"]:  # tests/vllm/test_demo.py runs these
            continue
        if program == "python" and words[0] == "examples/benchmark.py":
            sys.argv = [*words, "--backbone", str(backbone)]
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
            continue
        if program == "torchrun":  # in this process; test_distributed.py starts several
            settings = parse_args(words)
            assert settings.module and settings.training_script == "llama_probe.cli"
            program, words = "llama-probe", [*settings.training_script_args, "--backbone", str(backbone)]
        assert program == "llama-probe", line
        sys.argv = ["llama-probe", *words]  # which the card of a head quotes
        app(words, standalone_mode=False)


def run_python(block: str, page: str, backbone: Path, names: dict) -> None:
    exec(compile(block.replace(MODEL, str(backbone)), page, "exec"), names)


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow) if page in TRAINING else page for page in PAGES]
)
def test_the_blocks_run(page, desk, backbone_folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    names = {"__name__": "__main__"}
    for language, block in BLOCK.findall((DOCS / page).read_text()):
        if language == "sh":
            run_shell(block, backbone_folder)
        else:
            assert language == "python", f"{page} has a block of {language or 'no language'}"
            run_python(block, page, backbone_folder, names)


def test_the_blocks_of_the_readme_run(desk, backbone_folder):
    names = {"__name__": "__main__"}
    for language, block in BLOCK.findall((ROOT / "README.md").read_text()):
        if language == "python":
            run_python(block, "README.md", backbone_folder, names)
    assert len(names["out"].texts) == 1 and set(names["out"].probe_labels) == {"safety"}


def test_the_commands_of_the_readme_train_a_head_and_use_it(desk, backbone_folder):
    rows = [f"{'what a lovely' if i % 2 else 'such a rude'} day {i},{'good' if i % 2 else 'rude'}" for i in range(40)]
    (desk / "rows.csv").write_text("\n".join(["text,label", *rows]))
    section = (ROOT / "README.md").read_text().split("## Train a head")[1].split("\n## ")[0]
    commands = re.findall(r"^    (llama-probe .*)$", section, re.MULTILINE)
    assert len(commands) == 2
    run_shell("\n".join(commands).replace("Qwen/Qwen2.5-1.5B-Instruct", str(backbone_folder)), backbone_folder)
    assert ProbeConfig.from_pretrained("my-head").flagged == ["rude"]


def test_a_head_type_as_the_page_writes_it_runs_where_the_model_is():
    """The meta device stands for a GPU: it takes no tensor that was made elsewhere."""
    exec(BLOCK.findall((DOCS / "head-types.md").read_text())[0][1], {"__name__": "__main__"})
    with torch.device("meta"):
        probe = ProbeModel(ProbeConfig(probe_type="mean-max", hidden_size=16, num_hidden_layers=2))
    found = probe(hidden_states=torch.empty(4, 3, 10, 16, device="meta"))
    assert found.logits.device.type == "meta"


@pytest.mark.parametrize("page", WRITTEN)
def test_the_links_lead_somewhere(page):
    page = ROOT / page
    for target in LINK.findall(page.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_the_tables_are_those_of_the_measurements():
    """As `python docs/tables.py --write` writes them."""
    script = runpy.run_path(str(DOCS / "tables.py"))
    pages = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *DOCS.glob("*.md"))}
    shown = [name for page in pages.values() for _, name, _ in script["MARKED"].findall(page)]
    assert sorted(set(shown)) == sorted(script["TABLES"]), "a table of the script that no page shows"
    # In a fresh process, because other tests register head types, which the help of options lists.
    found = subprocess.run([sys.executable, DOCS / "tables.py"], capture_output=True, text=True)
    assert found.returncode == 0, f"stale, python docs/tables.py --write: {found.stdout}{found.stderr[-500:]}"


def test_the_table_of_a_report_of_long_texts(tmp_path, monkeypatch):
    cells = [
        {"kind": "all", "words": 300, "place": place, "texts": 4, "share": share, "interval": [0.1, 0.9]}
        for place, share in (("first", 0.25), ("in the middle", 0.5), ("last", 0.75), (None, 0.0))
    ]
    alone = {"safety": {"share": 1.0, "interval": [0.6, 1.0]}}
    report = {"tokens": 1200, "seconds": {"whole": 3.0}, "alone": alone, "cells": {"safety": cells}}
    (tmp_path / "long-texts.json").write_text(json.dumps(report))
    script = runpy.run_path(str(DOCS / "tables.py"))
    make = script["TABLES"]["long-texts"]
    monkeypatch.setitem(make.__globals__, "LONG_TEXTS", tmp_path / "long-texts.json")
    shares = " | ".join(f"{share:.2f} [0.10, 0.90]" for share in (0.25, 0.5, 0.75, 0.0))
    assert f"| safety | 300 words | {shares} |" in make() and "1,200 tokens" in make()


def test_every_page_is_on_the_first():
    listed = {link for link in LINK.findall((DOCS / "README.md").read_text()) if not link.startswith("../")}
    assert listed == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} - {"README.md"}


def test_every_folder_is_on_the_map():
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Where things are")[1].split("\n## ")[0]
    named = re.findall(r"^\| `([\w/]+)` \|", section, re.MULTILINE)
    package = ROOT / "src" / "llama_probe"
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    assert sorted(named) == sorted(modules | {f"{path.parent.name}/" for path in package.glob("*/__init__.py")})


IMPORTS = """
import torch
from llama_probe import *
from transformers import AutoModelForCausalLM, GenerationConfig, TrainingArguments, pipeline
"""
MISTAKES = re.findall(r"^\| `(.*)` \| (.*) \|$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
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
def test_a_mistake_gives_the_line_that_the_page_quotes(mistaken, code, quoted):
    if code.startswith("llama-probe"):
        message = refuse(*shlex.split(code.replace("--backbone name", "--backbone backbone"))[1:])
    else:
        with pytest.raises((ProbeError, KeyError)) as caught:
            eval(code, dict(mistaken))
        message = str(caught.value)
    assert quoted in message and "\n" not in message.strip()
