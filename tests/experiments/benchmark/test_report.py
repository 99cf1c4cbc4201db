"""Table, notes and files of a benchmark, from a report made by hand."""

import copy
import json

import pytest

from llama_probe.experiments.benchmark.report import (
    benchmark_plot,
    by_load,
    columns,
    markdown,
    notes,
    write_benchmark,
)


def make_row(system, kind, ratio=None, paper=None, **changes):
    spread = None if ratio is None else {"median": ratio, "quartiles": [ratio - 0.01, ratio + 0.01], "runs": 3}
    values = {
        "system": system, "kind": kind, "batch_size": 1, "tokens": 64, "new_tokens": 1,
        "latency_ms": {"median": 8.0, "p95": 9.5}, "step_ms": None, "prompts_per_second": 125.0,
        "tokens_per_second": 8125.0, "ratio": spread, "step_ratio": None, "operations": 10, "operations_ratio": 1.0125,
        "weights_mb": 1.0, "peak_memory_mb": 1234.56, "above_base_mb": 0.04, "paper_ratio": paper,
    }  # fmt: skip
    return {**values, **changes}


@pytest.fixture
def report():
    rows = [make_row("base", "base"), make_row("base again", "base", 1.002), make_row("mha", "heads", 1.05, 1.5236)]
    rows += [make_row("guard x", "guard", 9.0), make_row("naive mha", "naive", 1.08)]
    return {
        "environment": {"device": "cpu", "threads": 2},
        "settings": {"pairs": 3, "random_weights": False, "compile": False},
        "backbone": {"name": "tiny", "num_parameters": 134_500_000, "dtype": "float32"},
        "rows": [*rows, *({**row, "tokens": 512, "paper_ratio": None} for row in rows)],
    }


def test_a_table_for_each_load(report):
    tables = by_load(report)
    assert list(tables) == ["batch 1, 64 tokens, 1 new", "batch 1, 512 tokens, 1 new"]
    header, lines = columns(tables["batch 1, 64 tokens, 1 new"])
    assert dict(zip(header, lines[2], strict=True)) == {
        "system": "mha", "ms": "8.00", "p95": "9.50", "prompts/s": "125", "tokens/s": "8,125",
        "ratio [quartiles]": "1.050x [1.040, 1.060]", "peak MB": "1,234.6", "above base": "0.0", "operations": "1.0125x",
        "paper": "1.52x",
    }  # fmt: skip
    assert lines[0][5] == lines[0][-1] == "-"
    assert "paper" not in columns(tables["batch 1, 512 tokens, 1 new"])[0]
    text = markdown(report)
    assert "| mha | 8.00 | 9.50 | 125 | 8,125 | 1.050x [1.040, 1.060] | 1,234.6 | 0.0 | 1.0125x | 1.52x |" in text
    assert text.count("| system |") == 2 and notes(report)[0] in text


def test_further_tokens_and_unknown_memory():
    step = {
        "step_ms": {"median": 2.0, "p95": 3.0},
        "step_ratio": {"median": 1.01, "quartiles": [1.0, 1.02], "runs": 3},
    }
    header, (line,) = columns([make_row("mha", "heads", 1.05, **step, peak_memory_mb=None, above_base_mb=None)])
    cells = dict(zip(header, line, strict=True))
    assert cells["ms a further token"] == "2.00" and cells["its ratio [quartiles]"] == "1.010x [1.000, 1.020]"
    assert cells["peak MB"] == cells["above base"] == "-"


def test_files(report, tmp_path):
    written = write_benchmark(tmp_path / "out", report)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["benchmark.json", "benchmark.png"]
    assert json.loads(written[0].read_text()) == report
    first = written[1].read_bytes()
    assert first.startswith(b"\x89PNG") and write_benchmark(tmp_path / "out", report)[1].read_bytes() == first
    changed = copy.deepcopy(report)
    changed["rows"][2]["ratio"]["median"] = 1.2
    assert write_benchmark(tmp_path / "out", changed)[1].read_bytes() != first


def test_the_plot_has_a_point_a_system_and_a_band_of_noise(report):
    panels = benchmark_plot(report).axes
    assert [axes.get_title() for axes in panels] == list(by_load(report))
    names = [label.get_text() for label in panels[0].get_yticklabels()]
    assert names == ["base again", "mha", "guard x", "naive mha"]
    points = {
        marker: [line.get_xdata()[0] for line in panels[0].lines if line.get_marker() == marker] for marker in "ox"
    }
    assert points == {"o": [1.002, 1.05, 9.0, 1.08], "x": [1.5236]}
    (band,) = panels[0].patches
    assert band.get_x() == pytest.approx(0.992) and band.get_width() == pytest.approx(0.02)
    assert panels[0].get_xscale() == "log", "a guard takes many times as long"
