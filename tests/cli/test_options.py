"""Options of the commands, their help, and the command line that a card repeats."""

import shlex
import subprocess
import sys

import pytest
from command_line import succeed

from llama_probe import cli
from llama_probe.cli.options import command_line


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_shows_every_option(name):
    command, entry = cli.load_command(name), cli.COMMANDS[name]
    options = [param for param in command.params if param.param_type_name == "option"]
    assert len(options) <= 22 and all(param.help for param in command.params)
    assert command.help.partition("\n")[0] == entry.summary
    shown = succeed(name, "--help")
    assert all(param.opts[0] in shown for param in options) and all(line in shown for line in entry.examples)


@pytest.mark.parametrize("line", [line for entry in cli.COMMANDS.values() for line in entry.examples])
def test_the_examples_are_lines_that_the_commands_take(line):
    program, name, *words = shlex.split(line.partition(" <")[0])
    context = cli.load_command(name).make_context(name, words)
    assert program == "llama-probe" and not context.args


def test_little_is_imported_before_a_command_is_known_and_allowed():
    """Of all lines in one process, since what is imported stays."""
    code = """
import llama_probe_command as c, shlex, sys
heavy = {'transformers.modeling_utils', 'datasets', 'sklearn', 'scipy', 'matplotlib'}
for number, line in enumerate(sys.stdin):
    sys.argv = shlex.split(line)
    try: c.main()
    except SystemExit: print((heavy | {'torch'} if number < 3 else heavy) & set(sys.modules), file=sys.stderr)
import llama_probe; assert llama_probe.ProbeConfig and llama_probe.__version__"""
    ends = ["--help", "--version", "trian"]
    refused = ["train --train=x --output=x --probe-type=x", "classify x --probe=x", "drift --input=x --probe=x"]
    refused += ["calibrate --benign=x --probe=x", "plot x --output=x", "export x --probe=x", "benchmark --probe=x"]
    lines = "\n".join(f"llama-probe {line}" for line in ends + refused)
    done = subprocess.run([sys.executable, "-c", code], input=lines, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("set()\n") == 10, done.stderr
    assert done.stderr.count("llama-probe: ") == 8


def test_the_command_is_a_line_for_a_shell(monkeypatch):
    first, places = ["llama-probe", "train", "imdb:train"], ["--output", "a b", "--resume", "--data-dir=c"]
    settings = ["--set", "card.limits=[Short texts.]", "--flag", "don't; $HOME * costs"]
    monkeypatch.setattr(sys, "argv", [*first, *places, *settings])
    assert shlex.split(command_line()) == first + settings
