"""Text for the terminal."""

import pytest

from llama_probe.cli.console import escape, print_marked, print_table, print_text, print_values


@pytest.mark.parametrize("width", [20, 80])
def test_nothing_of_a_cell_is_cut(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(None, ("backbone", "F1"), [("HuggingFaceTB/SmolLM2-135M-Instruct", "0.123 ± 0.456")])
    printed = capsys.readouterr().out
    assert "…" not in printed and max(map(len, printed.splitlines())) <= width
    first = "".join(line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│"))
    assert first == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_part_of_a_text_is_marked_in_words_and_in_style(capsys, monkeypatch):
    text = "a" * 100 + " before\x1b[31m\n[b]the\n part[/b] behind " + "b" * 100
    start, end = text.index("[b]"), text.index("[/b]") + 4
    print_marked("head: bad", text, start, end, around=20)
    printed = capsys.readouterr().out
    assert printed.startswith("head: bad: …aaa") and printed.rstrip().endswith("bbb…")
    assert r" before\x1b[31m »[b]the part[/b]« behind bb" in printed.replace("\n", "")
    print_marked("head: bad", "all of it", 0, 9)
    assert capsys.readouterr().out == "head: bad: »all of it«\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_marked("head: bad", "all of it", 4, 6)
    assert "\x1b[1;7m»of«" in capsys.readouterr().out


def test_a_table_inside_a_record_is_printed_too(capsys):
    record = {"r_auc": 0.75, "intervals": {"r_auc": [0.7, 0.8]}, "thresholds": {"own": {"detected": 0.25}}}
    print_values("guard", {"replies": {"harm": record, "refusal": record}})
    printed = capsys.readouterr().out
    assert printed.count("0.750") == printed.count("0.250") == 2


def test_a_cell_controls_neither_the_terminal_nor_the_markup(capsys):
    print_table("[b]", ("prompt", ":fire:"), [("[red]a\x1b]0;title\x07\x9b31m\nb", ":x:")])
    print_text("[b] :smile:")
    printed = capsys.readouterr().out
    assert r"[red]a\x1b]0;title\x07\x9b31m" in printed and not {"\x1b", "\x07", "\x9b"} & set(printed)
    assert "[b]" in printed.splitlines()[0] and ":fire:" in printed and ":x:" in printed and "\n[b] :smile:" in printed
    assert escape("a\u202eb\u2069 שלום 👩\u200d💻") == r"a\u202eb\u2069 " + "שלום 👩\u200d💻"
