"""The `llama-probe` command."""

import io
import os
import sys
from typing import Annotated

import typer

from ..errors import ProbeError
from ..files import DISK_FULL, is_disk_full, package_version
from ..training.allocator import keep_freed_memory
from .benchmark import benchmark
from .console import printable
from .evaluate import evaluate
from .export import export
from .heads import inspect
from .options import Command, option_names
from .plot import plot
from .reproduce import reproduce
from .serve import classify, demo, generate
from .share import pull, push
from .sweep import sweep
from .train import train


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Probe heads on frozen language models: a label and a text from the same forward pass.",
)
for command in (
    demo,
    generate,
    classify,
    train,
    sweep,
    reproduce,
    evaluate,
    benchmark,
    plot,
    inspect,
    push,
    pull,
    export,
):
    app.command(cls=Command)(command)


# Those that know how to divide their work among the processes that torchrun starts.
_DIVIDED = ("train", "sweep", "evaluate", "classify")


# Those that go through batch after batch of hidden states.
_MANY_BATCHES = (*_DIVIDED, "reproduce")


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
    if context.invoked_subcommand in _MANY_BATCHES:
        keep_freed_memory()
    if "LOCAL_RANK" not in os.environ or context.invoked_subcommand in _DIVIDED:
        return  # and torch need not be imported to know
    from ..distributed import launched

    if launched():
        raise ProbeError(
            f"{context.invoked_subcommand} runs in one process: start it without torchrun (which is for "
            f"{', '.join(_DIVIDED)})"
        )


# Which extra brings a package that only some commands need.
_EXTRAS = {
    "accelerate": "train",
    "datasets": "train",
    "evaluate": "train",
    "optuna": "train",
    "peft": "train",
    "pyarrow": "train",
    "scipy": "train",
    "sklearn": "train",
}


# What typer raises over a command line that it cannot read: a class of its own or click's, by its version.
_UsageError = typer.BadParameter.__base__


def main() -> None:
    """Entry point: errors that the user can mend become one line and exit status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a label that its encoding lacks is no reason to lose the others
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="llama-probe", standalone_mode=False) or 0)
    except ProbeError as error:
        _refuse(_as_typed(str(error)))
    except _UsageError as error:
        command = "llama-probe" if error.ctx is None else error.ctx.command_path
        _refuse(f"{error.format_message().rstrip('.')}; see {command} --help")
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        _refuse(f"this command needs {error.name}: pip install 'llama_probe[{extra}]'")
    except OSError as error:  # of a file or folder; what else fails shows where it did
        if is_disk_full(error) and error.filename is None:
            _refuse(f"a file cannot be written: {DISK_FULL}")
        if error.filename is None or error.strerror is None:
            raise
        _refuse(f"{error.filename}: {error.strerror}")
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)


def _as_typed(message: str) -> str:
    """Errors of the library that begin with one of its arguments, `name=value`, begin with the option that it came from."""
    name, sign, rest = message.partition("=")
    if (
        not name.isidentifier()
    ):  # most: what follows takes a while, in which torchrun may end a process that lost another
        return message
    command = typer.main.get_command(app).commands.get("".join(sys.argv[1:2]))
    option = None if command is None else option_names(command).get(name)
    return message if option is None else f"{option}{sign}{rest}"


def _refuse(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    teller = "llama-probe" if rank == "0" else f"llama-probe (rank {rank})"
    print(f"{teller}: {printable(' '.join(message.split()))}", file=sys.stderr, flush=True)
    sys.exit(2)
