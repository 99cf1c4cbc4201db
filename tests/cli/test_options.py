"""Options made from dataclasses, their help, and the command line that a card repeats."""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import typer
from command_line import call
from typer.testing import CliRunner

from llama_probe import ProbeError, cli
from llama_probe.cli.options import Command, Fields, as_command, command_line


@dataclass
class Settings:
    source: str = field(metadata={"help": "A source."})
    rate: float | None = field(default=None, metadata={"help": "A rate."})
    names: list[str] = field(default_factory=list, metadata={"help": "Names.", "option": "name"})
    sizes: tuple[int, ...] = (8, 16)
    folder: str | Path | None = field(default=None, metadata={"help": "A folder."})
    kept: bool = field(default=True, metadata={"help": "Keep it."})
    hidden: int = 3

    def __post_init__(self):
        if self.rate == 0:
            raise ProbeError("rate=0 and sizes=(8, 16) cannot be, with x-rate=1")


def run(*words):
    """Return the result of a command with these words, and what it got."""
    got = []

    def command(
        settings: Annotated[
            Settings, Fields("Panel", help={"sizes": "Sizes."}, names={"sizes": "size"}, defaults={"rate": 0.5})
        ],
        more: Annotated[
            dict, Fields("More", of=Settings, only="hidden", help={"hidden": "Hid."}, parse={"hidden": double})
        ],
        last: int = 1,
    ) -> None:
        """Do it."""
        got.extend((settings, more, last))

    app = typer.Typer()
    app.command(cls=Command)(as_command(command))
    return CliRunner().invoke(app, words), got


def double(text: int) -> int:
    return 2 * text


def test_fields_become_options():
    _, got = run("--source", "a", "--name", "x", "--name", "y", "--folder", "b", "--no-kept", "--last", "2")
    assert got == [Settings("a", 0.5, ["x", "y"], [8, 16], Path("b"), False), {"hidden": 6}, 2]
    _, got = run("--source", "a", "--rate", "2", "--size", "4", "--hidden", "5")
    assert got == [Settings("a", 2.0, [], [4], None, True), {"hidden": 10}, 1]


def test_help_has_a_panel_for_each_dataclass():
    shown = run("--help")[0].stdout
    for part in ("Panel", "More", "--name", "--size", "[default: 8, 16]", "--kept", "--no-kept", "[required]"):
        assert part in shown
    assert "--sizes" not in shown


def test_an_error_names_the_options():
    error = run("--source", "a", "--rate", "0")[0].exception
    assert str(error) == "--rate=0 and --size=(8, 16) cannot be, with x-rate=1"


def test_an_option_that_takes_one_value_is_given_once():
    assert "--rate is given twice" in run("--source", "a", "--rate", "1", "--rate=2")[0].stderr
    assert "--kept/--no-kept is given twice" in run("--source", "a", "--kept", "--no-kept")[0].stderr
    done = call("train", "--set", "a=1", "--set", "b=2", "--help-all", "--help")
    assert done.returncode == 0 and "--set" in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_shows_the_first_options_and_help_all_the_others(name):
    command, entry = cli.load_command(name), cli.COMMANDS[name]
    options = {param.name: param for param in command.params}
    assert set(entry.first) <= set(options), "they exist"
    assert all(param.help for param in command.params) and command.help.partition("\n")[0] == entry.summary
    shown, whole, short = (call(name, word).stdout for word in ("--help", "--help-all", "-h"))
    assert shown == short and all(line in shown for line in entry.examples)
    hidden = [param.opts[0] for param in command.params if param.hidden]
    assert len(options) - len(hidden) <= 16
    listed = re.findall(r"^│[* ]+(--[\w-]+) ", shown, re.MULTILINE)
    assert listed and not set(hidden) & set(listed) and all(f" {option} " in whole for option in hidden)
    assert ("more options" in shown) == bool(hidden) and "more options" not in whole


@pytest.mark.parametrize("line", [line for entry in cli.COMMANDS.values() for line in entry.examples])
def test_the_examples_are_lines_that_the_commands_take(line):
    program, name, *words = shlex.split(line.partition(" <")[0])
    command = cli.load_command(name)
    context = command.make_context(name, words)
    assert program == "llama-probe" and not context.args


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["trian"]])
def test_the_start_imports_no_torch(words):
    code = "import sys, llama_probe_command as c\ntry: c.main()\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stderr


def test_a_refusal_comes_before_the_model_classes():
    """Of several in one process, since what is imported stays."""
    code = """
import llama_probe_command as c, shlex, sys
heavy = {'transformers.modeling_utils', 'datasets', 'sklearn', 'scipy', 'matplotlib'}
for line in sys.stdin:
    sys.argv = shlex.split(line)
    try: c.main()
    except SystemExit: print(heavy & set(sys.modules))
import llama_probe; assert llama_probe.ProbeConfig and llama_probe.__version__"""
    lines = [
        "llama-probe train --train=x --output=x --probe-type=x",
        "llama-probe classify x --probe=x",
        "llama-probe drift --input=x --probe=x",
        "llama-probe calibrate --benign=x --probe=x",
        "llama-probe plot x --output=x",
        "llama-probe export x --probe=x",
        "llama-probe benchmark --probe=x",
    ]
    done = subprocess.run([sys.executable, "-c", code], input="\n".join(lines), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == len(lines) * "set()\n", done.stderr
    assert done.stderr.count("llama-probe: ") == len(lines)


@pytest.mark.parametrize(
    "words, line",
    [
        (["--train", "imdb:train", "--layers", "0,3", "--limit", "Short texts."], "--train imdb:train --layers 0,3 --limit 'Short texts.'"),
        (["--system-prompt", "don't; $HOME * costs"], """--system-prompt 'don'"'"'t; $HOME * costs'"""),
        (["--output", "a b", "--resume", "--cache-dir=c", "--json"], "--json"),
    ],
)  # fmt: skip
def test_the_command_is_a_line_for_a_shell(monkeypatch, words, line):
    monkeypatch.setattr(sys, "argv", ["llama-probe", "train", *words])
    assert command_line() == f"llama-probe train {line}"
