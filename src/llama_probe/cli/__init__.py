"""The `llama-probe` command."""

import sys

import typer

from ..errors import ProbeError
from .evaluate import evaluate
from .heads import inspect
from .serve import classify, demo, generate
from .train import train


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Probe heads on frozen language models: a label and a text from the same forward pass.",
)
for command in (demo, generate, classify, train, evaluate, inspect):
    app.command()(command)


def main() -> None:
    """Entry point: errors that the user can mend become one line and exit status 2."""
    try:
        app()
    except ProbeError as error:
        print(f"llama-probe: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
