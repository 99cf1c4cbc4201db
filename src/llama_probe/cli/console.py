"""What commands print for people."""

from __future__ import annotations

import re

from rich.console import Console
from rich.markup import escape
from rich.table import Table


# All but tab and line feed: a reply or a row of a data set could else move the cursor or name the terminal.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def plain(text: str) -> str:
    """A text of a user, a model or a data set, for a console or a table: no markup, and nothing that steers a terminal."""
    return escape(_CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text))


def create_console(stderr: bool = False) -> Console:
    """What commands print to. Texts and labels are printed as they are, where rich would make a picture of `:fire:`."""
    return Console(stderr=stderr, emoji=False)


def print_table(table: Table) -> None:
    """Prints a table. In a narrow terminal, or in a log, which counts as one, long cells go on below: what was cut is lost there."""
    for column in table.columns:
        column.overflow = "fold"
    create_console().print(table)
