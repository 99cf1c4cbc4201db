"""Parts of the Markdown that reports are written in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def cell(text: str) -> str:
    """A text of the user's, as it stands in a cell: on one line, and with no bar that ends it."""
    return " ".join(text.split()).replace("|", "\\|")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table; all columns but the first are numbers."""
    yield f"| {' | '.join(header)} |"
    yield f"|---|{'---:|' * (len(header) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""
