"""Options that several commands share."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..data.known import BENCHMARKS, find_benchmark
from ..errors import ProbeError


Backbone = Annotated[str, typer.Option(help="'demo' (SmolLM2-135M-Instruct from PyPI), a folder, or a Hub id.")]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Local copies of the data sets known by name, read instead of the Hub: DIR/NAME/SPLIT.jsonl.gz."
    ),
]
Dtype = Annotated[str, typer.Option(help="dtype of the backbone: auto, float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable results on standard output.")]
Probe = Annotated[str, typer.Option(help="A head folder, a Hub id (user/repo@revision:subfolder) or an alias.")]
Probes = Annotated[list[str], typer.Option("--probe", help="A head folder, a Hub id or an alias; may be given again.")]
PromptColumn = Annotated[
    str | None,
    typer.Option(help="Column of the prompts, where the texts are the replies to them; for heads that read replies."),
]
Split = Annotated[
    str | None,
    typer.Option(help="Split of a named or Hub data set, or of a folder.", show_default="test"),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a head on the Hub.")]

# What a data argument may be, for its help.
DATA = (
    f"a data set by name or NAME:SPLIT ({', '.join(BENCHMARKS)}), a csv, jsonl(.gz) or parquet file, a folder, or a Hub data set, "
    "ID@REVISION:CONFIGURATION:SPLIT or less of it"
)


# Arguments of the library that options go by other names for.
RENAMED = {
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "seeds": "seed",
    "resamples": "bootstrap",
    "probe_type": "kind",
}


class Command(TyperCommand):
    """A command that takes each option once, but for those that may be given again: of two values the first would be lost in silence."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for param in given:
            if given.count(param) > 1 and not param.multiple and not param.is_eager:
                name = "/".join([*param.opts, *param.secondary_opts])
                listed = ", its values with commas" if "with commas" in (param.help or "") else ""
                ctx.fail(f"{name} is given twice: give it once{listed}")
        return super().parse_args(ctx, args)


def option_names(command: Any) -> dict[str, str]:
    """The options of a typer command by the arguments that they are passed on as; one that may be given again makes a list."""
    names = {}
    for param in command.params:
        if (option := param.opts[0]).startswith("--"):
            names |= {param.name: option} | ({f"{param.name}s": option} if param.multiple else {})
    return {long: names[short] for long, short in RENAMED.items() if short in names} | names


def split_of(data: str, split: str | None) -> str:
    """The split to read of a data argument: `test` where `split` is left out.

    Raises:
        ProbeError: the argument has no splits to choose from, or names one itself.
    """
    if split is None:
        return "test"
    if Path(data).is_file():
        raise ProbeError(f"--split {split}: {data} is a file, all of which is read; leave --split out")
    from ..data.tables import TablePlace

    known = find_benchmark(data)
    if (TablePlace.parse(data).split if known is None else known[1]) is not None:
        raise ProbeError(f"--split {split}: {data} names a split already; leave one out")
    return split


def hub_options(head: str, revision: str | None) -> Any:
    """`HubOptions` for one head.

    Raises:
        ProbeError: what names the head names another revision.
    """
    from ..hub.transport import HubOptions, HubReference

    reference = HubReference.parse(head)
    if revision is not None and reference is not None and reference.revision not in (None, revision):
        raise ProbeError(f"--revision {revision}: {head} names a revision already; leave one out")
    return HubOptions(revision)


def command_line() -> str:
    """The command as it was typed, as a line for a shell, without folders of this machine, and as if nothing had interrupted it."""
    hidden = {"--output", "--cache-dir", "--data-dir"}
    words, skip = ["llama-probe"], False
    for word in sys.argv[1:]:
        if skip:
            skip = False
        elif word == "--resume":
            continue
        elif word.partition("=")[0] in hidden:
            skip = "=" not in word
        else:
            shown = "/".join(Path(word).parts[-2:]) if "/" in word and Path(word).exists() else word
            words.append(shown)
    return shlex.join(words)
