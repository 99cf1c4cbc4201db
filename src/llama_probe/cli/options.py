"""Options of the commands: shared ones, and those made from the fields of a dataclass.

A command takes a dataclass like any other argument. Every field with a `help` in its metadata becomes an option:

    def evaluate(columns: Annotated[dict[str, Any], Fields("Data", of=RowOptions)], ...): ...
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import inspect
import json
import os
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..backbone.loading import DtypeName, name_of_backbone
from ..errors import ProbeError
from ..heads import import_kinds
from ..hub.folder import read_config_values
from ..hub.resolve import resolve_head


# Titles in `--help` of options that several commands have, or that are not from a dataclass of one title.
PANELS = {
    name: panel
    for panel, names in {
        "Data": "max_rows max_text prompt_format system_prompt max_length data benign slice_column input keep_column text",
        "Selection and threshold": "metric patience threshold_rule max_false_positive_rate num_seeds rate",
        "Head": "probe probes imports trust_remote_code",
        "Card": "license base_model record tag",
        "Hub": "push private revision create_pr subfolder commit_message force_download",
        "Runtime": "backbone output dtype resume as_json chunk_rows",
    }.items()
    for name in names.split()
}

BACKBONE = "'demo' (SmolLM2-135M-Instruct from PyPI), a folder, a GGUF file, or a Hub id."
HEADS_BACKBONE = f"{BACKBONE} Default: the head's own."
PROBE = "A head folder, a Hub id (user/repo@revision:subfolder) or an alias."
PROBES = "A head folder, a Hub id or an alias. Repeatable."
TRUST_REMOTE_CODE = "Run the code file of a head whose kind is not part of this package. Read it first."
# Help of fields that mean the same in every dataclass.
_HELP = {"backbone": BACKBONE, "dtype": "dtype of the backbone."}

Backbone = Annotated[str, typer.Option(help=BACKBONE)]
Dtype = Annotated[DtypeName, typer.Option(help=_HELP["dtype"])]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a head on the Hub.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help=TRUST_REMOTE_CODE)]


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


Import = Annotated[
    list[Path] | None,
    typer.Option(
        "--import",
        metavar="FILE.py",
        callback=_import_files,
        help="A Python file that registers a kind of head of your own. Repeatable.",
    ),
]


def _show_all(context: typer.Context, wanted: bool) -> None:
    if wanted:
        for param in context.command.params:
            param.hidden = False
        context.command.epilog = None
        print(context.get_help())
        raise typer.Exit


HelpAll = Annotated[
    bool, typer.Option("--help-all", is_eager=True, callback=_show_all, help="Show all options and exit.")
]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable results on standard output.")]

# The results of a command as JSON values, and a function that prints them for people; None on a rank that prints nothing.
Result = tuple[Any, Callable[[], object]] | None


def _parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


@dataclass(frozen=True)
class Fields:
    """The options that a dataclass becomes, as metadata of a parameter.

    A field becomes an option if it has a help text. A list becomes a repeatable option.

    Attributes:
        panel: title of the options in `--help`.
        of: a dataclass. The parameter then gets a dict of its fields instead of an instance.
        only: names of fields, with spaces. Defaults to every field with a help text.
        help, names, defaults: by field, help text, option and default that differ from the dataclass and its metadata.
        parse: by field, a function that makes its value from what was typed. Its argument's type is the option's.
    """

    panel: str
    of: type | None = None
    only: str | None = None
    help: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    parse: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)

    def parameters(self, owner: type) -> dict[str, inspect.Parameter]:
        """Return a parameter for typer by the name of each field of `owner`."""
        hints = typing.get_type_hints(owner)
        found = {}
        for item in dataclasses.fields(owner):
            text = self.help.get(item.name) or item.metadata.get("help") or _HELP.get(item.name)
            if text is None or (self.only is not None and item.name not in self.only.split()):
                continue
            default = item.default if item.default_factory is MISSING else item.default_factory()
            default = self.defaults.get(item.name, default)
            if isinstance(default, (tuple, list, dict)):
                default = list(default)
            kind = _option_type(hints[item.name])
            if parse := self.parse.get(item.name):
                (kind,) = (part.annotation for part in inspect.signature(parse, eval_str=True).parameters.values())
            option = typer.Option(self._option(item), help=text, rich_help_panel=self.panel)
            default = inspect.Parameter.empty if default is MISSING else default
            found[item.name] = _parameter(item.name, Annotated[kind | None, option], default)
        return found

    def _option(self, item: dataclasses.Field) -> str:
        if name := self.names.get(item.name, item.metadata.get("option")):
            return f"--{name.lstrip('-').replace('_', '-')}"
        name = item.name.replace("_", "-")
        return f"--{name}/--no-{name}" if isinstance(item.default, bool) else f"--{name}"

    def build(self, owner: type, given: dict[str, Any]) -> Any:
        """Return the dataclass, or the dict of its fields, from the values of its options."""
        parsed = {name: parse(given[name]) for name, parse in self.parse.items() if given.get(name) is not None}
        values = given | parsed
        return values if self.of is not None else owner(**values)


def _option_type(hint: Any) -> Any:
    """Return the type that typer parses for a type hint, without `None`."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    parts = [part for part in (typing.get_args(hint) if union else [hint]) if part is not types.NoneType]
    if {os.PathLike, Path} & set(parts):
        return Path
    if typing.get_origin(parts[0]) in (list, tuple, collections.abc.Sequence):
        return list[typing.get_args(parts[0])[0]]
    return parts[0]


def as_command(function: Callable[..., Result], own_kinds: bool = False) -> Callable[..., None]:
    """Return `function` for typer: a parameter that is annotated with `Fields` becomes one option a field.

    Its result is printed, as JSON with `--json`. All that it prints itself goes to standard error. An error of the library that
    begins with a field, `max_rows=0 must be ...`, names the option instead.

    Args:
        own_kinds: add the option `--import`.
    """
    parameters, groups = [], {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        found = [item for item in getattr(parameter.annotation, "__metadata__", ()) if isinstance(item, Fields)]
        if found:
            owner = found[0].of or parameter.annotation.__origin__
            options = found[0].parameters(owner)
            groups[parameter.name] = (found[0], owner, options)
            parameters += options.values()
        else:
            parameters.append(_parameter(parameter.name, parameter.annotation, parameter.default))
    parameters.append(_parameter("as_json", Json, False))
    if own_kinds:
        parameters.append(_parameter("imports", Import))
    parameters.append(_parameter("help_all", HelpAll, False))

    options = {
        name: option.annotation.__metadata__[0].default.partition("/")[0]
        for _, _, members in groups.values()
        for name, option in members.items()
    }
    typed = re.compile(rf"(?<![-\w])({'|'.join(options) or '(?!)'})(=True\b|(?==))")
    resumes = any(parameter.name == "resume" for parameter in parameters)

    def run(as_json: bool, imports: Any = None, help_all: bool = False, **given: Any) -> None:
        try:
            for name, (fields, owner, members) in groups.items():
                given[name] = fields.build(owner, {member: given.pop(member) for member in members})
            if script := sys.modules.get("llama_probe_command"):
                script.listen()
            with contextlib.redirect_stdout(sys.stderr):
                result = function(**given)
            if result is not None:
                values, show = result
                print(json.dumps(values, default=list)) if as_json else show()  # demo yields its replies one by one
        except KeyboardInterrupt:
            # `classify` has no output, unless it reads files.
            if resumes and given.get("output", "in a group") and os.environ.get("RANK", "0") == "0":
                print("stopped: the same command with --resume continues", file=sys.stderr)
            raise
        except ProbeError as error:
            raise ProbeError(typed.sub(lambda found: options[found[1]], str(error))) from error

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = inspect.Signature(parameters)
    return run


class Command(TyperCommand):
    """A command that refuses an option that is given twice, unless the option is repeatable."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for param in given:
            if given.count(param) > 1 and not param.multiple and not param.is_eager:
                ctx.fail(f"{'/'.join([*param.opts, *param.secondary_opts])} is given twice: give it once")
        return super().parse_args(ctx, args)


def split_names(text: str) -> list[str]:
    """Return the names in a text with commas."""
    return [name.strip() for name in text.split(",")]


def command_line() -> str:
    """Return the command as a line for a shell, without folders of this machine and without `--resume`."""
    hidden = {"--output", "--cache-dir", "--data-dir"}
    words, skip = ["llama-probe"], False
    for word in sys.argv[1:]:
        if skip or word == "--resume":
            skip = False
        elif word.partition("=")[0] in hidden:
            skip = "=" not in word
        else:
            words.append(short_name(word) if "/" in word and os.path.exists(word) else word)
    return shlex.join(words)


def short_name(path: str) -> str:
    """Return the last two parts of a path: the others differ between machines."""
    return "/".join(Path(path).parts[-2:])
