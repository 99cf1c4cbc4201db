"""Text for the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rich import markup
from rich.console import Console
from rich.table import Table

from ..files import JSON


# Control characters, except those that Rich handles (line breaks, tabs), and marks that change the text direction.
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Escape control characters, because names and rows from elsewhere could control the terminal."""
    return _CONTROLS.sub(lambda control: control[0].encode("unicode_escape").decode(), text)


def escape(text: str) -> str:
    """Escape control characters and Rich markup."""
    return markup.escape(printable(text))


def print_text(text: str | Table) -> None:
    """Print a text between tables as it is, or a table. `:fire:` is no emoji."""
    Console(emoji=False).print(escape(text) if isinstance(text, str) else text)


def cell(value: object, interval: Sequence[float] | None = None) -> str:
    """Return the text of a cell: None as `-`, numbers in three digits, an interval below, runs as their median."""
    if isinstance(value, dict):
        return cell(value["median"], value["quartiles"])
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
        rows: values for `cell`, whose texts are escaped.
        left: this many columns are aligned to the left, the others to the right.
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
    """Return mean and standard deviation of several runs as a text, or the value of a single run."""
    return f"{summary['mean']:.3f}" + (f" ± {summary['std']:.3f}" if summary["std"] else "")


def print_records(title: str | None, records: Mapping[str, JSON], left: int = 1) -> None:
    """Print a row for each record, by its name, and a column for each value; `intervals` are below the values."""
    flat = {name: _flat(record) for name, record in records.items()}
    columns = list(next(iter(flat.values()), {}))
    rows = [
        (name, *(cell(values.get(column), records[name].get("intervals", {}).get(column)) for column in columns))
        for name, values in flat.items()
    ]
    print_table(title, ("", *columns), rows, left)


def print_values(title: str, values: JSON, path: str = "") -> None:
    """Print tables of JSON values: the plain ones, columns of dicts with the same keys, and groups of records."""
    intervals = values.get("intervals", {})
    plain = [(name, cell(value, intervals.get(name))) for name, value in values.items() if _is_plain(value)]
    print_table(title, ("", "value"), plain)
    columns: dict[tuple[str, ...], JSON] = {}
    for name, part in values.items():
        if _is_plain(part) or not part or name == "intervals":
            continue
        if isinstance(part, list):
            part = {str(number): record for number, record in enumerate(part, 1)}
        if all(map(_is_plain, part.values())):
            columns.setdefault(tuple(part), {})[name] = part
        elif all(isinstance(record, dict) and any(map(_is_plain, record.values())) for record in part.values()):
            print_records(path + name, part)
            for key, record in part.items():
                for inside, table in record.items():
                    if isinstance(table, dict) and not all(map(_is_plain, table.values())):
                        print_records(f"{path}{name}: {key}: {inside}", table)
        else:
            print_values(path + name, part, f"{path}{name}: ")
    for keys, parts in columns.items():
        records = {key: {name: part[key] for name, part in parts.items()} for key in keys}
        print_records(path + ", ".join(parts), records)


def _is_plain(value: object) -> bool:
    return not isinstance(value, dict) and not (isinstance(value, list) and value and isinstance(value[0], dict))


def _flat(record: JSON) -> JSON:
    """Return the plain values in a record, and those of the dicts in it that hold nothing else."""
    values = {name: value for name, value in record.items() if _is_plain(value)}
    for name, inner in record.items():
        if isinstance(inner, dict) and name != "intervals" and all(map(_is_plain, inner.values())):
            values |= {key: value for key, value in inner.items() if key not in values}
    return values
