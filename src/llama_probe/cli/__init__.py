"""The `llama-probe` command."""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..distributed import launched
from ..errors import ProbeError
from ..files import DISK_FULL, is_disk_full, package_version
from ..training.allocator import keep_freed_memory
from .console import printable
from .options import Command, as_command


# The module of each command, and its line in `llama-probe --help`.
COMMANDS = {
    "demo": ("demo", "Reply to a handful of prompts with text and labels, on a small model that runs on any CPU."),
    "generate": ("serve", "Reply to prompts, with the labels of each head from the same pass."),
    "classify": ("serve", "Label prompts, or the rows of files (--input), without a reply."),
    "train": ("train", "Train a head on labelled rows and write its folder: config, weights, results and card."),
    "sweep": ("sweep", "Search kinds and hyper-parameters; all configurations share each pass of the backbone."),
    "reproduce": ("reproduce", "Write the tables of arXiv 2601.13288 for a backbone; a stopped run resumes."),
    "evaluate": ("evaluate", "Score a head on labelled rows, with its saved temperature and threshold."),
    "calibrate": (
        "calibrate",
        "Fit thresholds of a head on rows that it should flag seldom, or how unlike its training data a prompt is.",
    ),
    "drift": ("drift", "Compare a log of served prompts with the rows that a head was trained on."),
    "benchmark": ("benchmark", "Measure what heads cost while the model serves, next to the plain model."),
    "plot": ("plot", "Draw what a head looked at in texts, and how well it does."),
    "inspect": ("heads", "Show a head, check it against a backbone, or list the bundled heads."),
    "push": ("share", "Upload a head folder to the Hub in one commit."),
    "pull": ("share", "Copy a head from the Hub into a folder."),
    "export": ("export", "Write a Hub repository that runs backbone and heads without this package."),
}

# Commands that divide their work among the processes of torchrun.
_DIVIDED = ("train", "sweep", "evaluate", "calibrate", "classify")

# Commands that process many batches of hidden states.
_MANY_BATCHES = (*_DIVIDED, "reproduce", "drift")

# Commands that load heads, so that --import can register a kind for them.
_OWN_KINDS = (
    *("train", "sweep", "evaluate", "calibrate", "drift", "generate", "classify", "inspect", "export", "push", "plot"),
)

# The extra that brings an optional package.
EXTRAS = {
    "accelerate": "train",
    "datasets": "train",
    "evaluate": "train",
    "optuna": "train",
    "peft": "train",
    "pyarrow": "train",
    "scipy": "train",
    "sklearn": "train",
}

# The base of typer's errors about a command line: its own class or click's, depending on its version.
_UsageError = typer.BadParameter.__base__


def load_command(name: str) -> Any:
    """Import the module of a command and return its typer command."""
    module = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
    single = typer.Typer(add_completion=False)
    single.command(name, cls=Command)(as_command(getattr(module, name), own_kinds=name in _OWN_KINDS))
    return typer.main.get_command(single)


class _Commands(TyperGroup):
    """Commands that are imported when they run, because they need different optional packages."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and load_command(name), rest


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Probe heads on frozen language models: text and labels from the same forward pass.",
)
for _name, (_, _summary) in COMMANDS.items():
    app.command(_name, help=_summary)(lambda: None)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"llama-probe {package_version()}")
        raise typer.Exit


@app.callback()
def _prepare_process(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    name = context.invoked_subcommand
    if name in _MANY_BATCHES:
        keep_freed_memory()
    if name not in _DIVIDED and launched():
        raise ProbeError(f"{name} runs in one process: start it without torchrun (for {', '.join(_DIVIDED)} only)")


def main() -> None:
    """Run a command. Errors that the user can mend become one line and exit status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # escape letters that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="llama-probe", standalone_mode=False) or 0)
    except ProbeError as error:
        _refuse(str(error))
    except _UsageError as error:
        command = "llama-probe" if error.ctx is None else error.ctx.command_path
        _refuse(f"{error.format_message().rstrip('.')}; see {command} --help")
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        _refuse(f"this command needs {error.name}: pip install 'llama_probe[{extra}]'")
    except OSError as error:
        if is_disk_full(error) and error.filename is None:
            _refuse(f"a file cannot be written: {DISK_FULL}")
        if error.filename is None or error.strerror is None:
            raise
        _refuse(f"{str(error.filename)[:300]}: {error.strerror}")
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)


def _refuse(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    program = "llama-probe" if rank == "0" else f"llama-probe (rank {rank})"
    print(f"{program}: {printable(' '.join(message.split()))}", file=sys.stderr, flush=True)
    sys.exit(2)
