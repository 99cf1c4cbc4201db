"""Options that several commands have, and what makes a command of a function."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..backbone.loading import DtypeName, name_of_backbone
from ..errors import ProbeError
from ..files import short_path
from ..heads import import_kinds
from ..hub.folder import read_config_values
from ..hub.resolve import resolve_head


BACKBONE = "'demo' (SmolLM2-135M-Instruct from PyPI), a folder, a GGUF file, or a Hub id."
PROBE = "A head folder, a Hub id (user/repo@revision:subfolder) or an alias."

Backbone = Annotated[str, typer.Option(help=BACKBONE)]
HeadsBackbone = Annotated[str | None, typer.Option(help=f"{BACKBONE} Default: the head's own.")]
Dtype = Annotated[DtypeName, typer.Option(help="dtype of the backbone.")]
Probe = Annotated[str, typer.Option(help=PROBE)]
Probes = Annotated[list[str], typer.Option(help=f"{PROBE} Repeatable.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a head on the Hub.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the code file of a head whose kind is not part of this package. Read it first.",
    ),
]
TextColumn = Annotated[str, typer.Option(help="Column of the texts.")]
LabelColumn = Annotated[str, typer.Option(help="Column of the labels.")]
PromptColumn = Annotated[
    str | None,
    typer.Option(help="Column of the prompts, where the texts are the replies to them; for heads that read replies."),
]
DataDir = Annotated[
    Path | None, typer.Option(help="Local copies of the data sets, read instead of the Hub: DIR/NAME/SPLIT.jsonl.gz.")
]
MaxText = Annotated[
    int,
    typer.Option(min=1, help="Characters of the longest text; a file may have 512 times as many. Guards the memory."),
]
Benign = Annotated[
    bool,
    typer.Option("--benign", help="The rows need no label column: none of them has the label that the head flags."),
]

# The result of a command as JSON values, and a function that prints it for people; None on a rank that prints nothing.
Result = tuple[Any, Callable[[], object]] | None


def backbone_of(probe: str, backbone: str | None) -> str:
    """Return the backbone that was given, or else the one that a head records."""
    if backbone is not None:
        return backbone
    config = read_config_values(resolve_head(probe, only_config=True))
    return name_of_backbone(config.get("base_model_name_or_path"))


def check_revision(head: str, revision: str | None) -> None:
    """Raise `ProbeError` if `--revision` is beside a folder, or a head that names a revision itself."""
    if revision is not None and (os.path.isdir(head) or "@" in head):
        raise ProbeError(f"--revision {revision} is for a head on the Hub that names no revision, not for {head}")


def _import_files(paths: Sequence[Path] | None) -> None:
    for path in paths or ():
        try:
            import_kinds(path)
        except ProbeError:
            raise
        except Exception as error:
            raise ProbeError(f"--import {path}: {type(error).__name__}: {error}") from error


_Import = Annotated[
    list[Path] | None,
    typer.Option(
        "--import",
        metavar="FILE.py",
        callback=_import_files,
        help="A Python file that registers a kind of head of your own. Repeatable.",
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print machine-readable results on standard output.")]


def as_command(function: Callable[..., Result], own_kinds: bool = False) -> Callable[..., None]:
    """Return `function` for typer, with the option `--json`, and with `--import` if `own_kinds`.

    Its result is printed. All that it prints itself goes to standard error.
    """
    signature = inspect.signature(function, eval_str=True)
    further = {"as_json": (_Json, False)} | ({"imports": (_Import, None)} if own_kinds else {})
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        for name, (annotation, default) in further.items()
    ]

    def run(as_json: bool, imports: None = None, **given: Any) -> None:
        try:
            if script := sys.modules.get("llama_probe_command"):
                script.listen()
            with contextlib.redirect_stdout(sys.stderr):
                result = function(**given)
            if result is not None:
                values, show = result
                print(json.dumps(values, default=list)) if as_json else show()  # demo yields its replies one by one
        except KeyboardInterrupt:
            # `classify` has no output, unless it reads files.
            if "resume" in given and given["output"] and os.environ.get("RANK", "0") == "0":
                print("stopped: the same command with --resume continues", file=sys.stderr)
            raise

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *parameters])
    return run


def command_line() -> str:
    """Return the command as a line for a shell, without folders of this machine and without `--resume`."""
    hidden = {"--output", "--data-dir"}
    words, skip = ["llama-probe"], False
    for word in sys.argv[1:]:
        if skip or word == "--resume":
            skip = False
        elif word.partition("=")[0] in hidden:
            skip = "=" not in word
        else:
            name, equals, value = word.rpartition("=")  # --train=rows.csv, or a field of --set
            words.append(name + equals + short_path(value))
    return shlex.join(words)
