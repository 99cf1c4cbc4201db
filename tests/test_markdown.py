from llama_probe.markdown import table


def test_a_table():
    assert list(table(["system", "ms"], [["base", "1.5"]])) == ["| system | ms |", "|---|---:|", "| base | 1.5 |", ""]
