"""The command lines of the README and of docs/ that serve with vLLM: each starts a server, with a tiny model and head."""

import json
import re
import shlex
import shutil

import pytest
from http_server import post, serving
from repository import ROOT


LINE = re.compile(r"^ *python -m llama_probe\.vllm \S+ (.*)$", re.MULTILINE)


def command_lines() -> set[str]:
    """What follows the name of the model; each once."""
    return {
        line for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) for line in LINE.findall(page.read_text())
    }


def test_there_is_one():
    assert command_lines()


@pytest.mark.parametrize("line", sorted(command_lines()))
def test_it_serves(line, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (name,) = re.findall(r"--probe (\S+)", line)
    shutil.copytree(tiny.heads["guard"], name)
    small = "--dtype float32 --enforce-eager --max-model-len 256 --max-num-batched-tokens 256 --max-num-seqs 2"
    arguments = [str(tiny.backbone), *shlex.split(line), *small.split()]
    with serving(arguments, tmp_path / "log") as url:
        body = {"model": str(tiny.backbone), "prompt": [1, 30, 31, 40, 41], "max_tokens": 2}
        with post(f"{url}/completions", body) as response:
            said = json.load(response)["kv_transfer_params"]
    assert list(said["probes"]) == [name] and "halted" in said
