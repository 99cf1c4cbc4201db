"""The command that a card repeats, and what becomes of errors."""

import shlex
import sys

import pytest
from command_line import call

from llama_probe import cli
from llama_probe.cli.options import command_line
from llama_probe.resolve import bundled_heads


@pytest.mark.parametrize(
    "words, line",
    [
        (["--train", "imdb:train", "--layers", "0,3", "--limit", "Short texts."], "--train imdb:train --layers 0,3 --limit 'Short texts.'"),
        (["--system-prompt", "don't; $HOME * costs"], """--system-prompt 'don'"'"'t; $HOME * costs'"""),
        (["--label-names", "it's,b", "--limit", ""], """--label-names 'it'"'"'s,b' --limit ''"""),
        (["--output", "a b", "--resume", "--cache-dir=c", "--json"], "--json"),
    ],
)  # fmt: skip
def test_it_is_a_line_for_a_shell(monkeypatch, words, line):
    monkeypatch.setattr(sys, "argv", ["llama-probe", "train", *words])
    assert command_line() == f"llama-probe train {line}"


def test_the_lines_of_the_cards_are_quoted_so():
    for folder in bundled_heads().values():
        card = (folder / "README.md").read_text(encoding="utf-8")
        line = next(line for line in card.splitlines() if line.startswith("llama-probe train"))
        assert shlex.join(shlex.split(line)) == line


def test_files_that_the_system_refuses_are_one_line_and_status_2(monkeypatch):
    def app(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "/root/head")

    monkeypatch.setattr(cli, "app", app)
    done = call("inspect")
    assert done.returncode == 2 and done.stderr == "llama-probe: /root/head: Permission denied\n"


def test_names_of_somebody_elses_write_nothing_to_the_terminal(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 0, "k\\u001b[31m": 1}\n')
    done = call("evaluate", "--probe", "toxicchat-gate", "--data", tmp_path / "rows.jsonl", "--text-column", "other")
    assert done.returncode == 2 and "it has: text, label, k\\x1b[31m" in done.stderr and "\x1b" not in done.stderr
