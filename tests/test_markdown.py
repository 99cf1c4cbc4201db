from llama_probe.markdown import cell, table


def test_a_table():
    assert list(table(["system", "ms"], [["base", "1.5"]])) == ["| system | ms |", "|---|---:|", "| base | 1.5 |", ""]


def test_a_cell_holds_what_would_end_it():
    assert cell("a | b\n c") == r"a \| b c"
