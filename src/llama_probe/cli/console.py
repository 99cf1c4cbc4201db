"""What commands print for people."""

from __future__ import annotations

import re

from rich import markup
from rich.console import Console
from rich.table import Table


# Those that Rich passes on: all but line breaks, tabs and what it leaves out by itself. With the last two ranges a prompt would
# turn the order of the cells beside it.
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """A text with its control characters spelled out: names and rows of somebody else's could write to the terminal with them."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def escape(text: str) -> str:
    """A text as it stands, for what Rich prints: no part of it is markup, or a control character."""
    return markup.escape(printable(text))


def create_console(stderr: bool = False) -> Console:
    """What commands print to. Texts and labels are printed as they are, where Rich would make a picture of `:fire:`."""
    return Console(stderr=stderr, emoji=False)


def print_table(table: Table) -> None:
    """Prints a table. In a narrow terminal, or in a log, which counts as one, long cells go on below: what was cut is lost there."""
    for column in table.columns:
        column.overflow = "fold"
    create_console().print(table)
