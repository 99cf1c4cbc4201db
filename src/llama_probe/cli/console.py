"""What commands print for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def print_table(table: Table) -> None:
    """Prints a table. In a narrow terminal, or in a log, which counts as one, long cells go on below: what was cut is lost there."""
    for column in table.columns:
        column.overflow = "fold"
    Console().print(table)
