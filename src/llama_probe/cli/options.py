"""Make commands of functions, with the options that several commands share.

A keyword-only parameter of a function becomes an option, and a positional-only parameter an argument. A parameter whose type is a
dataclass becomes an option for each field. The help of an option is its line in the docstring, or in `_SHARED`.
`Annotated[type, COUNT]` passes settings to typer.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from ..data.row_sources import ROWS_HELP
from ..files import short_path
from ..heads import import_head_types


# Settings of an option: `names`, `min`, `max` and `metavar` as typer takes them, and `help` that follows the docstring's.
COUNT = {"min": 1}
BACKBONE = {"help": "'demo' (SmolLM2-135M-Instruct from PyPI), a folder, a GGUF file, or a Hub id."}
PROBE = {"help": "A folder, a Hub id (user/repo@revision:subfolder) or an alias."}
ROWS = {"help": f"Rows: {ROWS_HELP}."}

# Help of options that several commands have. The docstring of a command comes first.
_SHARED = {
    "backbone": "default: the head's own.",
    "benign": "the rows need no label column: none of them has the label that the head flags.",
    "data": "labelled rows to measure the head on.",
    "data_dir": "local copies of the data sets, read instead of the Hub: DIR/NAME/SPLIT.jsonl.gz.",
    "dtype": "dtype of the backbone. auto: that of the checkpoint, or float32 on a processor without instructions for it.",
    "import_": "a Python file that registers a head type of your own.",
    "json": "print machine-readable results on standard output.",
    "label_column": "column of the labels.",
    "max_length": "tokens of the longest text; what comes behind is not read. Default: no limit for a head with windows, for other heads "
    "the longest text that they have learned from.",
    "max_text": "characters of the longest text; a file may have 512 times as many. Guards the memory.",
    "max_new_tokens": "tokens of each reply.",
    "probe": "the head.",
    "prompt_column": "column of the prompts, where the texts are the replies to them; for heads that read replies.",
    "prompts": "default: lines of standard input.",
    "abstain_at": "novelty above which a prompt gets no label, from 0 to 1, such as 0.99; see calibrate --novelty-data.",
    "revision": "branch, tag or commit of a head on the Hub that names none.",
    "text_column": "column of the texts.",
}

# The result of a command as JSON values, and a function that prints the result; None on a rank that prints nothing.
Result = tuple[object, Callable[[], object]] | None

# A parameter in the section of a docstring that lists them.
_PARAMETER = re.compile(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", re.MULTILINE)


@dataclass
class _Common:
    """Options that each command has."""

    json: bool = False
    import_: list[Path] | None = None


def as_command(function: Callable[..., Result]) -> Callable[..., None]:
    """Return a function for typer with the options of `function` and of `_Common`, which prints the result.

    While `function` runs, its own prints go to standard error.
    """

    def run(**values: object) -> None:
        common = _call(_Common, values)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                for path in common.import_ or []:
                    import_head_types(path)
                result = _call(function, values)
        except KeyboardInterrupt:
            # `classify` has an output only if it reads files.
            if values.get("output") and "resume" in values and os.environ.get("RANK", "0") == "0":
                print("stopped: the same command with --resume continues", file=sys.stderr)
            raise
        if result is None:
            return
        values_of_result, print_result = result
        if common.json:
            print(json.dumps(values_of_result))
        else:
            print_result()

    run.__name__ = function.__name__
    run.__doc__ = (inspect.getdoc(function) or "").partition("\n\nArgs:")[0]
    run.__signature__ = inspect.Signature([*_options(function), *_options(_Common)])
    return run


def _options(documented: Callable) -> Iterator[inspect.Parameter]:
    """Yield the parameters of a function, or the fields of a dataclass, as typer takes them."""
    own_texts = dict(_PARAMETER.findall(inspect.getdoc(documented) or ""))  # none with python -OO
    for name, parameter in inspect.signature(documented, eval_str=True).parameters.items():
        if is_dataclass(parameter.annotation):
            yield from _options(parameter.annotation)
        else:
            yield _option(parameter, own_texts.get(name) or _SHARED.get(name, name))


def _option(parameter: inspect.Parameter, text: str) -> inspect.Parameter:
    """Return an option of typer, or an argument for a positional parameter, with this text as its help."""
    annotation = parameter.annotation
    settings = {}
    if get_origin(annotation) is Annotated:
        annotation, settings = get_args(annotation)
    is_argument = parameter.kind is parameter.POSITIONAL_ONLY
    sentences = [" ".join(text.split()), settings.get("help", "")]
    if not is_argument and list in map(get_origin, (annotation, *get_args(annotation))):
        sentences.append("Repeatable.")
    text = " ".join(filter(None, sentences))
    given = {"help": text[0].upper() + text[1:]}
    given |= {key: value for key, value in settings.items() if key in ("min", "max", "metavar")}
    if is_argument:
        option = typer.Argument(**given)
    else:
        names = settings.get("names", f"--{parameter.name.rstrip('_').replace('_', '-')}")
        option = typer.Option(names, **given)
    return parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=Annotated[annotation, option])


def _call(function: Callable, values: dict[str, object]) -> Any:
    """Call a function, or create a dataclass, with the values of its options by name."""
    positional: list[object] = []
    by_name: dict[str, object] = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        is_group = is_dataclass(parameter.annotation)
        value = _call(parameter.annotation, values) if is_group else values[name]
        if parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(value)
        else:
            by_name[name] = value
    return function(*positional, **by_name)


def command_line() -> str:
    """Return the command as a line for a shell, without `--resume` and without folders of this machine."""
    words = ["llama-probe"]
    is_hidden = False  # the value of an option that is left out
    for word in sys.argv[1:]:
        if is_hidden or word == "--resume":
            is_hidden = False
        elif word.partition("=")[0] in ("--output", "--data-dir"):
            is_hidden = "=" not in word
        else:
            name, equals, value = word.rpartition("=")  # --train=rows.csv, or a field of --set
            words.append(name + equals + short_path(value))
    return shlex.join(words)
