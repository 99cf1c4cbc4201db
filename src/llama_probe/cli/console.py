"""Text for the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rich import markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..files import JSON


# Control characters, without those that Rich handles (line breaks, tabs), and marks that change the direction of text.
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Escape control characters, with which names and rows from elsewhere could control the terminal."""
    return _CONTROLS.sub(lambda control: control[0].encode("unicode_escape").decode(), text)


def escape(text: str) -> str:
    """Escape control characters and Rich markup."""
    return markup.escape(printable(text))


def print_text(text: str | Table) -> None:
    """Print a table, or a text as it is: neither markup nor names of emojis mean anything."""
    Console(emoji=False).print(escape(text) if isinstance(text, str) else text)


def print_marked(title: str, text: str, start: int, end: int, around: int = 80) -> None:
    """Print a part of a text on a few lines, with what stands around it: the part in another style, and between » and «.

    Args:
        start, end: the first character of the part, and one past the last.
        around: characters before and behind the part.
    """
    before = _on_one_line(text[max(0, start - around) : start])
    behind = _on_one_line(text[end : end + around])
    quote = Text(f"{title}: ", style="dim")
    quote.append(("…" if start > around else "") + before, style="not dim")
    quote.append(f"»{_on_one_line(text[start:end])}«", style="not dim bold reverse")
    quote.append(behind + ("…" if end + around < len(text) else ""), style="not dim")
    Console(emoji=False).print(quote)


def _on_one_line(text: str) -> str:
    return printable(re.sub(r"\s+", " ", text))


def cell(value: object, interval: Sequence[float] | None = None) -> str:
    """Return the text of a cell: None as `-`, floats with three digits, the interval of a value below it."""
    if interval is not None and value is not None:
        return f"{cell(value)}\n{cell(interval)}"
    if value is None or isinstance(value, str):
        return "-" if value is None else value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3f}" if 0.001 <= abs(value) < 1000 or not value else f"{value:.3g}"
    return f"[{', '.join(map(cell, value))}]"


def print_table(
    title: str | None,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    left: int = 1,
    show_lines: bool = False,
) -> None:
    """Print a table, if it has rows. Long cells continue on the next line, so that a narrow terminal or a log cuts nothing.

    Args:
        rows: values for `cell`.
        left: number of columns, from the first, that are aligned to the left. All other columns are aligned to the right.
    """
    if not rows:
        return
    table = Table(title=title and escape(title), show_lines=show_lines)
    for number, name in enumerate(columns):
        table.add_column(escape(name), justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, map(cell, row)))
    print_text(table)


def with_spread(summary: dict[str, float]) -> str:
    """Return the mean of several runs with its standard deviation, or the value of a single run."""
    return f"{summary['mean']:.3f}" + (f" ± {summary['std']:.3f}" if summary["std"] else "")


def print_records(title: str, records: Mapping[str, JSON]) -> None:
    """Print a row for each record and a column for each value, with the interval of a value below it."""
    flat = {name: _flat(record) for name, record in records.items()}
    columns = list(next(iter(flat.values()), {}))
    rows = [
        (name, *(cell(values.get(column), records[name].get("intervals", {}).get(column)) for column in columns))
        for name, values in flat.items()
    ]
    print_table(title, ("", *columns), rows)


def print_values(title: str, values: JSON, path: str = "") -> None:
    """Print a table of the plain values in JSON, then tables of the dicts and lists in it, each below its path."""
    intervals = values.get("intervals", {})
    plain = [(name, cell(value, intervals.get(name))) for name, value in values.items() if _is_plain(value)]
    print_table(title, ("", "value"), plain)
    for name, part in values.items():
        if _is_plain(part) or not part or name == "intervals":
            continue
        if isinstance(part, list):
            part = {str(number): record for number, record in enumerate(part, 1)}
        place = path + name
        if not all(isinstance(record, dict) and any(map(_is_plain, record.values())) for record in part.values()):
            print_values(place, part, f"{place}: ")
            continue
        print_records(place, part)
        for key, record in part.items():
            for inside, table in record.items():
                if isinstance(table, dict) and not all(map(_is_plain, table.values())):
                    print_records(f"{place}: {key}: {inside}", table)


def _is_plain(value: object) -> bool:
    return not isinstance(value, dict) and not (isinstance(value, list) and value and isinstance(value[0], dict))


def _flat(record: JSON) -> JSON:
    """Return the plain values in a record, with those of inner dicts that hold only plain values."""
    values = {name: value for name, value in record.items() if _is_plain(value)}
    for name, inner in record.items():
        if isinstance(inner, dict) and name != "intervals" and all(map(_is_plain, inner.values())):
            values |= {key: value for key, value in inner.items() if key not in values}
    return values
