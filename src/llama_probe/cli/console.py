"""Text for the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich import markup
from rich.console import Console
from rich.table import Table
from rich.text import Text


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


def print_text(text: str) -> None:
    """Print a text between tables, as it is."""
    create_console().print(escape(text))


def print_table(
    title: str | None,
    columns: Iterable[str],
    rows: Iterable[Sequence[str | Text]],
    left: int = 1,
    show_lines: bool = False,
) -> None:
    """Print a table. Long cells continue on the next line, so that a narrow terminal or a log cuts nothing.

    Args:
        rows: cells; a `Text` may have a style, other texts are escaped.
        left: this many columns are aligned to the left, the others to the right.
    """
    table = Table(title=title and escape(title), show_lines=show_lines)
    for number, name in enumerate(columns):
        table.add_column(escape(name), justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) if isinstance(cell, str) else cell for cell in row))
    create_console().print(table)


def with_spread(summary: dict[str, float], form: str) -> str:
    """Return mean and standard deviation of several runs as a text, or the value of a single run."""
    return f"{summary['mean']:{form}}" + (f" ± {summary['std']:{form}}" if summary["std"] else "")
