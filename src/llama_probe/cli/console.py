"""Text for the terminal."""

from __future__ import annotations

import re

from rich import markup
from rich.console import Console
from rich.table import Table


# Control characters, except those that Rich handles (line breaks, tabs), and marks that change the text direction.
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Escape control characters, because names and rows from elsewhere could control the terminal."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def escape(text: str) -> str:
    """Escape control characters and Rich markup."""
    return markup.escape(printable(text))


def create_console(stderr: bool = False) -> Console:
    """Return a console that prints `:fire:` as it is, not as an emoji."""
    return Console(stderr=stderr, emoji=False)


def print_table(table: Table) -> None:
    """Print a table. Long cells continue on the next line, so that a narrow terminal or a log cuts nothing."""
    for column in table.columns:
        column.overflow = "fold"
    create_console().print(table)
