"""Options of the commands, their help, and the command line that a card repeats."""

import shlex
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


def test_the_command_is_a_line_for_a_shell(monkeypatch):
    first, places = ["llama-probe", "train", "imdb:train"], ["--output", "a b", "--resume", "--data-dir=c"]
    settings = ["--set", "card.limits=[Short texts.]", "--flagged", "don't; $HOME * costs"]
    monkeypatch.setattr(sys, "argv", [*first, *places, *settings])
    assert shlex.split(command_line()) == first + settings
