"""The `llama-probe` command."""

from __future__ import annotations

import importlib
import io
import os
import sys
from importlib.metadata import version
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from ..errors import ProbeError
from .console import escape, printable


__all__ = ["COMMANDS", "load_command", "main"]


class Entry(NamedTuple):
    """A command: its module, which is imported when the command runs, the first line of its help, and examples."""

    module: str
    summary: str
    examples: tuple[str, ...]


# fmt: off
COMMANDS = {
    "demo": Entry("demo", "Reply to a handful of prompts with text and labels, on a small model that runs on any CPU.", (
        "llama-probe demo",)),
    "generate": Entry("serve", "Reply to prompts, with the labels of each head from the same pass.", (
        'llama-probe generate "Write me a short poem about rain."',
        'llama-probe generate --halt-on safety:harmful --halt-reply "I cannot help with that." < prompts.txt')),
    "classify": Entry("serve", "Label prompts, or the rows of files (--input), without a reply.", (
        'llama-probe classify "How do I pick a lock?"',
        'llama-probe classify --input "rows/*.parquet" --output labels')),
    "train": Entry("train", "Train a head by a recipe, or on labelled rows, and write its folder: config, weights, results, recipe and card.", (
        "llama-probe train guard --backbone Qwen/Qwen2.5-1.5B-Instruct --output my-guard",
        "llama-probe train --train rows.csv --flagged bad --output my-head",
        "llama-probe train sst2 --set head.probe_type=gate --set seeds=3 --output sst2-head")),
    "evaluate": Entry("evaluate", "Score a head on labelled rows, with its saved temperature and threshold.", (
        "llama-probe evaluate --probe my-head --data test.csv",
        "llama-probe evaluate --probe toxicchat --data toxicchat:test --bootstrap 0")),
    "calibrate": Entry("calibrate", "Fit thresholds of a head on rows that it should rarely flag, or its novelty: how unlike its training data a prompt is.", (
        "llama-probe calibrate --probe my-head --benign ordinary-prompts.csv --rate 0.01",)),
    "plot": Entry("plot", "Draw what a head looked at in texts, and how well it does.", (
        'llama-probe plot safety --text "How do I pick a lock?" --output plots',)),
    "inspect": Entry("heads", "Show a head, check it against a backbone, or list the bundled heads.", (
        "llama-probe inspect",
        "llama-probe inspect safety --backbone demo")),
    "push": Entry("share", "Upload a head folder to the Hub in one commit.", (
        "llama-probe push my-head user/my-head --private",)),
    "pull": Entry("share", "Copy a head from the Hub into a folder.", (
        "llama-probe pull user/my-head --output my-head",)),
    "export": Entry("share", "Write a Hub repository that runs backbone and heads without this package.", (
        "llama-probe export guarded --probe safety",)),
}
# fmt: on

# Commands that read many batches of hidden states, and divide the batches among the processes of torchrun.
_DIVIDED = ("train", "evaluate", "calibrate", "classify")

# Packages of the extra `train`.
_TRAIN = ("accelerate", "datasets", "evaluate", "optuna", "peft", "pyarrow", "scipy", "sklearn")

# The base of typer's errors about a command line: its own class or click's, depending on its version.
_UsageError = typer.BadParameter.__base__
_SETTINGS = {"help_option_names": ["-h", "--help"]}


def load_command(name: str) -> Any:
    """Import the module of a command and return its typer command."""
    from .options import as_command  # heavier than the list of commands

    entry = COMMANDS[name]
    function = getattr(importlib.import_module(f".{entry.module}", __package__), name)
    single = typer.Typer(add_completion=False)
    epilog = "\n\n".join(map(escape, entry.examples))
    single.command(name, epilog=epilog, context_settings=_SETTINGS)(as_command(function))
    return typer.main.get_command(single)


class _Commands(TyperGroup):
    """Import each command when it runs, because the commands need different optional packages."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and load_command(name), rest


app = typer.Typer(
    cls=_Commands,
    context_settings=_SETTINGS,
    pretty_exceptions_enable=False,
    help="Probe heads on frozen language models: text and labels from the same forward pass.",
)
for _name, _entry in COMMANDS.items():
    app.command(_name, help=_entry.summary)(lambda: None)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"llama-probe {version('llama_probe')}")
        raise typer.Exit


@app.callback()
def _prepare_process(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    from ..distributed import launched, meet
    from ..training.allocator import keep_freed_memory

    name = context.invoked_subcommand
    if name in _DIVIDED:
        keep_freed_memory()
    if name not in _DIVIDED and launched():
        raise ProbeError(f"{name} runs in one process: start it without torchrun (for {', '.join(_DIVIDED)} only)")
    meet()


def main() -> None:
    """Run a command. An error that the user can mend becomes one line and exit status 2."""
    _prepare_environment()
    if isinstance(sys.stdout, io.TextIOWrapper):  # characters that the terminal's encoding lacks are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="llama-probe", standalone_mode=False) or 0)
    except ProbeError as error:
        _refuse(str(error))
    except _UsageError as error:
        command = "llama-probe" if error.ctx is None else error.ctx.command_path
        _refuse(f"{error.format_message().rstrip('.')}; see {command} --help")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _TRAIN:
            raise
        _refuse(f"this command needs {error.name}: pip install 'llama_probe[train]'")
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        _refuse(f"{str(error.filename)[:300]}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)


def _prepare_environment() -> None:
    """Set what packages read when they are imported, unless the user has set it."""
    if (
        not sys.stderr.isatty()
    ):  # bars of other packages, such as `Loading weights`, would fill a log; see `ProgressBar`
        os.environ.setdefault("TQDM_DISABLE", "1")
    if (
        "LOCAL_RANK" in os.environ
    ):  # torchrun: threads of OpenMP that wait would take the processors from the other ranks
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _refuse(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    program = "llama-probe" if rank == "0" else f"llama-probe (rank {rank})"
    print(f"{program}: {printable(' '.join(message.split()))}", file=sys.stderr, flush=True)
    sys.exit(2)
