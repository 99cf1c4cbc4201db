"""Table and notes of a benchmark, from a report made by hand."""

from llama_probe.experiments.benchmark.report import by_load, columns, notes


def make_row(system, ratio=None, paper=None, **changes):
    spread = None if ratio is None else {"median": ratio, "quartiles": [ratio - 0.01, ratio + 0.01], "runs": 3}
    values = {
        "system": system, "batch_size": 1, "tokens": 64, "new_tokens": 1, "ms": {"median": 8.0}, "step_ms": None,
        "ratio": spread, "step_ratio": None, "above_base_mb": 1234.56, "paper_ratio": paper,
    }  # fmt: skip
    return {**values, **changes}


def test_a_table_for_each_load():
    rows = [make_row("base"), make_row("base again", 1.002), make_row("mha", 1.05, 1.5236)]
    report = {
        "environment": {"device": "cpu", "threads": 2},
        "settings": {"pairs": 3, "random_weights": False, "compile": False},
        "backbone": {"name": "tiny", "num_parameters": 134_500_000, "dtype": "float32"},
        "rows": [*rows, *({**row, "tokens": 512, "paper_ratio": None} for row in rows)],
    }
    tables = by_load(report)
    assert list(tables) == ["batch 1, 64 tokens, 1 new", "batch 1, 512 tokens, 1 new"]
    header, lines = columns(tables["batch 1, 64 tokens, 1 new"])
    assert dict(zip(header, lines[2], strict=True)) == {
        "system": "mha", "ms": "8.00", "ratio [quartiles]": "1.050x [1.040, 1.060]", "MB above base": "1,234.6", "paper": "1.52x",
    }  # fmt: skip
    assert lines[0][2] == lines[0][-1] == "-"
    assert "paper" not in columns(tables["batch 1, 512 tokens, 1 new"])[0]
    assert "134 million" in notes(report)[0] and "Paper" in notes(report)[-1]


def test_further_tokens_and_unknown_memory():
    step = {"step_ms": {"median": 2.0}, "step_ratio": {"median": 1.01, "quartiles": [1.0, 1.02], "runs": 3}}
    header, (line,) = columns([make_row("mha", 1.05, **step, above_base_mb=None)])
    cells = dict(zip(header, line, strict=True))
    assert cells["ms a further token"] == "2.00" and cells["its ratio [quartiles]"] == "1.010x [1.000, 1.020]"
    assert cells["MB above base"] == "-"
