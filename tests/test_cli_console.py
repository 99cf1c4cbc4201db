"""What commands print for people."""

import pytest
from rich.table import Table

from llama_probe.cli.console import print_table


@pytest.mark.parametrize("width", [20, 80])
def test_nothing_of_a_cell_is_cut(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    table = Table("backbone", "F1")
    table.add_row("HuggingFaceTB/SmolLM2-135M-Instruct", "0.123 ± 0.456")
    print_table(table)
    printed = capsys.readouterr().out
    assert "…" not in printed and max(map(len, printed.splitlines())) <= width
    first = "".join(line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│"))
    assert first == "HuggingFaceTB/SmolLM2-135M-Instruct"
