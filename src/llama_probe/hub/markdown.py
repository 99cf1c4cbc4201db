"""Parts of the Markdown that reports are written in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence


def line(text: str) -> str:
    """A text of the user's, as it stands in a sentence: on one line, so that it begins nothing of its own."""
    return " ".join(text.split())


def cell(text: str) -> str:
    """A text of the user's, as it stands in a cell: on one line, and with no bar that ends it."""
    return line(text).replace("|", "\\|")


def code(text: str) -> str:
    """A text of the user's as code in a sentence, to be read as it is: between more backticks than it has in a row."""
    text = line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if not text or text[0] == "`" or text[-1] == "`" else ""
    return f"{fence}{space}{text}{space}{fence}"


def block(text: str) -> str:
    """A text of the user's as a block of code: between more backticks than it has in a row."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def word(text: str) -> str:
    """A name of somebody else's in a sentence: as code where it has more in it than letters, digits and the like, such as HTML."""
    return line(text) if re.fullmatch(r"[\w.,:/+% -]*", text) else code(text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table; all columns but the first are numbers."""
    yield f"| {' | '.join(header)} |"
    yield f"|---|{'---:|' * (len(header) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""
