"""The `llama-probe` command."""

import sys

import typer

from ..errors import ProbeError
from .benchmark import benchmark
from .evaluate import evaluate
from .export import export
from .heads import inspect
from .plot import plot
from .reproduce import reproduce
from .serve import classify, demo, generate
from .share import pull, push
from .sweep import sweep
from .train import train


app = typer.Typer(
    no_args_is_help=True,
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
    app.command()(command)


# Which extra brings a package that only some commands need.
_EXTRAS = {
    "accelerate": "train",
    "datasets": "train",
    "evaluate": "train",
    "optuna": "train",
    "peft": "train",
    "scipy": "train",
    "sklearn": "train",
}


def main() -> None:
    """Entry point: errors that the user can mend become one line and exit status 2."""
    try:
        app()
    except ProbeError as error:
        print(f"llama-probe: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        print(f"llama-probe: this command needs {error.name}: pip install 'llama_probe[{extra}]'", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
