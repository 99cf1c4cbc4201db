from llama_probe.hub.markdown import block, cell, code, line, table, word


def test_a_table():
    assert list(table(["system", "ms"], [["base", "1.5"]])) == ["| system | ms |", "|---|---:|", "| base | 1.5 |", ""]


def test_a_cell_holds_what_would_end_it():
    assert cell("a | b\n c") == r"a \| b c"


def test_a_sentence_goes_on_behind_what_would_begin_something():
    assert line("lm\n\n# Title\n") == "lm # Title"


def test_code_is_read_as_it_is():
    assert code("<b>*x*|") == "`<b>*x*|`" and code("a\n```\nb") == "````a ``` b````"
    assert code("a`b") == "``a`b``" and code("`") == "`` ` ``" and code("") == "`  `"


def test_a_block_ends_where_its_text_does():
    assert block("a\nb") == "```\na\nb\n```" and block("```") == "````\n```\n````"


def test_a_name_in_a_sentence_is_code_where_it_is_more_than_a_name():
    assert word("me/lm-1.5_b") == "me/lm-1.5_b" and word("32, 4") == "32, 4"
    assert word("<b>lm") == "`<b>lm`" and word("[lm](x)") == "`[lm](x)`"
