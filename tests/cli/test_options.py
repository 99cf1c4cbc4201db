"""Options of the commands, their help, and the command line that a card repeats."""

import shlex
import subprocess
import sys

import pytest
import typer
from command_line import succeed
from typer.testing import CliRunner

from llama_probe import cli
from llama_probe.cli.options import as_command, command_line


def test_a_command_prints_its_result_alone_on_standard_output():
    def command(*, last: int = 1):
        """Count.

        Args:
            last: number to count to.
        """
        print("on the way")
        return {"last": last}, lambda: print(f"last is {last}")

    app = typer.Typer()
    app.command()(as_command(command))
    shown, as_json = (CliRunner().invoke(app, ["--last", "2", *more]) for more in ([], ["--json"]))
    assert shown.stdout == "last is 2\n" and as_json.stdout == '{"last": 2}\n' and "on the way" in as_json.stderr


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
        (["--train", "imdb:train", "--set", "card.limits=[Short texts.]"], "--train imdb:train --set 'card.limits=[Short texts.]'"),
        (["--flag", "don't; $HOME * costs"], """--flag 'don'"'"'t; $HOME * costs'"""),
        (["--output", "a b", "--resume", "--data-dir=c", "--json"], "--json"),
    ],
)  # fmt: skip
def test_the_command_is_a_line_for_a_shell(monkeypatch, words, line):
    monkeypatch.setattr(sys, "argv", ["llama-probe", "train", *words])
    assert command_line() == f"llama-probe train {line}"
