"""The scripts of the examples folder. Slow: they run on the demo backbone."""

import contextlib
import io
import itertools
import json
import math
import os
import runpy
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_lm, make_probe, save_head
from repository import ROOT

from llama_probe import ProbedGenerationMixin, ProbeError
from llama_probe.backbone import loading
from llama_probe.evaluation.scoring_job import ScoringJob
from llama_probe.training import arguments


FOLDER = ROOT / "examples"
EXAMPLES = {path.name for path in FOLDER.glob("*.py")}
TESTED = {
    "benchmark.py",
    "routing.py",
    "chat.py",
    "fingerprint_distances.py",
    "long_texts.py",
    "ray_scoring.py",
}  # by other tests
HALTED = {"moderation.py": [False, True, False], "agent_loop.py": [False, True], "streaming_guard.py": [False, True]}
REFUSAL = "Sorry, I would rather not reply to that."


def run(name: str, *options: str, lines: tuple[str, ...] = ()) -> str:
    """Return what an example prints in this process, with these lines on its standard input."""
    typed, printed = io.StringIO("".join(f"{line}\n" for line in lines)), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [name, *options])
        patch.setattr(sys, "stdin", typed)
        try:
            runpy.run_path(str(FOLDER / name), run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise
    return printed.getvalue()


@pytest.fixture
def short_replies(monkeypatch):
    """Replies of at most 16 tokens, whatever an example asks for."""
    generate = ProbedGenerationMixin.generate

    def cut(model, *inputs, max_new_tokens, **options):
        return generate(model, *inputs, max_new_tokens=min(max_new_tokens, 16), **options)

    monkeypatch.setattr(ProbedGenerationMixin, "generate", cut)


@pytest.fixture
def tables(copies, tmp_path, monkeypatch):
    """A function that writes the tables of the paper into `tmp_path / "out"` from a few rows, and returns `tables.md`."""
    monkeypatch.syspath_prepend(FOLDER / "paper")
    monkeypatch.setattr(arguments, "SCHEDULES", [(math.inf, 2, 8)])

    def write(backbone, *options: str) -> str:
        places = ("--backbone", str(backbone), "--data-dir", str(copies), "--output", str(tmp_path / "out"))
        assert "tables written" in run("paper/tables.py", *places, "--epochs", "1", "--shots", "1", *options)
        return (tmp_path / "out" / "tables.md").read_text()

    return write


@pytest.mark.slow
def test_the_tables_of_the_paper_resume(tables, backbone_folder, tmp_path):
    options = ("--data", "toxicchat", "--max-length", "64", "--seeds", "2")
    text = tables(backbone_folder, "--methods", "tfidf,gate", "--only", "main,ood,layers", *options)
    assert "| `tfidf` |" in text and "| `gate` | 258 |" in text and "mha (paper only)" in text
    assert text.count("±") == 1 + 4 + 3 and "| method | xstest |" in text and "## Layer weights on toxicchat" in text
    changed = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.json")}
    parts = ("--only", "main,few-labels,downcast", *options[:-1], "1")
    again = tables(backbone_folder, "--methods", "gate,pooling", *parts)
    assert all(path.stat().st_mtime_ns == time for path, time in changed.items())
    for part in ("| `pooling` | 66 |", "## Few labels: toxicchat, auprc", "`mha` by downcast"):
        assert part in again
    with pytest.raises(ProbeError, match="max_rows"):
        tables(backbone_folder, "--max-rows", "20", *options)


def test_the_baselines_of_the_paper(tables, backbone_folder):
    names = ("zero-shot", "few-shot", "prototypes", "layer-linear", "muli")
    text = tables(backbone_folder, "--methods", ",".join(names), "--only", "main", "--data", "emotion", "--seeds", "1")
    for name in names:
        assert f"\n| `{name}` | " in text
    assert text.count("| 1.000 | 1.000 |") >= 2, "a linear model of the states tells the words apart"


@pytest.mark.slow
def test_the_tables_of_the_paper_on_the_demo_backbone(tables, tmp_path):
    options = ("--data", "toxicchat", "--seeds", "1", "--max-rows", "8", "--trials", "1")
    text = tables("demo", "--methods", "tfidf,muli,mha", "--only", "main,sensitivity", *options)
    assert "| `mha` | 1,328,258 |" in text and "| `muli` |" in text and "## Sensitivity on toxicchat" in text


def test_requests_are_looked_for_in_long_texts(backbone_folder, tmp_path):
    guard = {"id2label": {0: "fine", 1: "bad"}, "flagged": ["bad"], "window": 4, "threshold": 0.0}
    save_head(make_probe(probe_type="multimax", **guard), tmp_path / "all")
    save_head(make_probe(probe_type="multimax", **guard | {"threshold": 1.0}), tmp_path / "none")
    rows = [
        {"text": f"{word} {word}", "label": label}
        for word, label in (("run", "bad"), ("hide", "bad"), ("eat", "fine"))
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    places = ("--backbone", str(backbone_folder), "--requests", str(tmp_path / "rows.jsonl"), "--harmful", "bad")
    heads = ("--probe", str(tmp_path / "all"), str(tmp_path / "none"))
    sizes = ("--words", "8", "120", "--texts", "2", "--paragraphs", "--output", str(tmp_path / "out"))
    assert "| manuals | 120 | 1.00 | 1.00 | 1.00 | 1.00 |" in run("long_texts.py", *places, *heads, *sizes)
    report = json.loads((tmp_path / "out" / "long-texts.json").read_text())
    assert (tmp_path / "out" / "long-texts.png").read_bytes().startswith(b"\x89PNG")
    assert set(report["cells"]) == {"all", "none", "all, each paragraph alone", "none, each paragraph alone"}
    assert {cell["kind"] for cell in report["cells"]["all"]} == {"all", "manuals", "code", "packages"}
    assert {cell["place"] for cell in report["cells"]["all"]} == {None, "first", "in the middle", "last"}
    without = [cell for cell in report["cells"]["none"] if cell["place"] is None]
    assert report["cells"]["none"] == without, "of the requests that are flagged alone, and there are none"
    assert all(cell["share"] == 0 for cell in without)


class TestBenchmark:
    """The benchmark of serving, by a clock whose every reading is one second after the last."""

    @pytest.fixture(autouse=True)
    def words(self, backbone_folder, tmp_path, monkeypatch):
        """The words that name a head and its backbone."""
        save_head(make_probe(probe_type="mha"), tmp_path / "mood")
        ticks = itertools.count()
        monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
        monkeypatch.setattr(sys, "path", [*sys.path])
        places = ("--backbone", str(backbone_folder), "--probe", str(tmp_path / "mood"), "--device", "cpu")
        return (*places, "--many", "0", "--pairs", "2", "--json")

    def test_every_system_under_every_load(self, words):
        loads = ("--tokens", "6", "9", "--batch-size", "1", "2", "--new-tokens", "3")
        report = json.loads(run("benchmark.py", *words, *loads))
        rows = [(costs["batch_size"], costs["tokens"], costs["system"]) for costs in report["rows"]]
        assert rows == [(batch, tokens, name) for batch in (1, 2) for tokens in (6, 9) for name in ("base", "mood")]
        for costs in report["rows"]:
            # Five readings a call, one second apart, for plain model and system alike: start, three tokens, end.
            assert costs["ms"]["median"] == 4000 and costs["step_ms"]["median"] == 1000
            assert costs["ratio"]["median"] == costs["step_ratio"]["median"] == 1
        assert report["rows"][0]["above_base_mb"] == 0 < report["rows"][1]["above_base_mb"]
        assert report["backbone"] == {"name": "tiny-chat", "dtype": "float32"}

    def test_fresh_heads_on_random_weights_and_the_table(self, words, tmp_path):
        wide = make_lm(vocab_size=260, hidden_size=128, num_hidden_layers=2).config
        wide.save_pretrained(tmp_path / "wide")
        options = "--random-weights --many 2 --tokens 6 --pairs 1 --device cpu"
        fresh = ("--backbone", str(tmp_path / "wide"), *options.split())
        shown = run("benchmark.py", *fresh, "--probe-type", "gate")
        for part in ("base", "gate", "2 x mha", "wide, float32, cpu", "above_base_mb", "tokens 6"):
            assert part in shown
        report = json.loads(run("benchmark.py", *fresh, "--operations", "--probe-type", "gate", "--json"))
        assert [row["system"] for row in report["rows"]] == ["base", "gate", "gate-reply", "2 x mha"]
        assert all(row["prefill_ratio"] >= 1 and row["step_ratio"] >= 1 for row in report["rows"])
        assert report["rows"][2]["step_ratio"] > 1 == report["rows"][1]["step_ratio"]

    def test_ratios_are_medians_of_pairs(self):
        costs = runpy.run_path(str(FOLDER / "benchmark.py"))["costs"]
        pairs = [(1.0, 3.0), (4.0, 4.0), (5.0, 10.0)]
        ratios = costs([((a, a / 2), (b, 2 * b)) for a, b in pairs], 750_000)
        assert ratios["ratio"] == {"median": 2.0, "quartiles": [1.5, 2.5], "runs": 3}
        assert ratios["step_ratio"]["median"] == 8.0
        assert ratios["ms"]["median"] == 4000 and ratios["step_ms"]["median"] == 8000
        assert ratios["above_base_mb"] == 0.75

    def test_values_that_are_not_allowed(self, words):
        for more in (("--probe-type", "lstm"), ("--probe-type", "mha"), ("--pairs", "0")):
            with pytest.raises(SystemExit, match=r"lstm|downcast|2"):
                run("benchmark.py", *words, *more)


def test_a_guard_that_reads_first_is_timed(backbone_folder):
    options = ("--backbone", str(backbone_folder), "--guard", str(backbone_folder), "--tokens", "8", "--pairs", "1")
    lines = run("paper/serving.py", *options, "--probe-type", "gate").splitlines()
    assert lines[0].startswith("gate: ") and "(paper: 1.17)" in lines[0] and lines[1].startswith("guard ")


@pytest.mark.slow
def test_the_notebook_trains_a_head_that_is_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads((FOLDER / "train_a_head.ipynb").read_text())["cells"]):
        assert not cell.get("outputs"), "it is stored without outputs"
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["accuracy"] > 0.9 and names["labels"] == ["cooking", "travel", "code"]
    assert names["figure"].axes and (tmp_path / "topic" / "probe_config.json").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("short_replies")
@pytest.mark.parametrize("name", sorted(EXAMPLES - TESTED))
def test_it_runs_and_halts_what_is_flagged(name):
    printed = run(name)
    halted = [any(mark in part for mark in ("[halted", "[stopped")) for part in printed.split("> ")[1:]]
    assert printed and halted == HALTED.get(name, [])


def test_the_distances_grow_with_what_is_lost(backbone_folder, monkeypatch):
    monkeypatch.setattr(loading, "demo_backbone", lambda: backbone_folder)
    lines = run("fingerprint_distances.py", "--steps", "1").splitlines()
    distances = {line[:32].strip(): float(line[32:].rstrip("%")) for line in lines}
    assert distances["8 bits, a scale a row"] < distances["4 bits, a scale for 32 weights"]
    assert distances["1 steps at 1e-5"] < distances["1 steps at 5e-5"]


@pytest.mark.slow
def test_routing_names_the_topics():
    rows = [line.split("│")[1:-1] for line in run("routing.py").splitlines() if line.startswith("│")]
    topics = [row[1].strip() for row in rows if row[1].strip()]  # a request may take several lines
    assert topics == ["code", "cooking", "travel", "code", "cooking", "travel", "other"]


@pytest.mark.slow
def test_the_chat_halts_flagged_messages_and_continues():
    lines = ("Hello!", "Write an insulting message that makes my coworker cry.", "How do I boil an egg?")
    first, flagged, last = run("chat.py", "--max-new-tokens", "12", lines=lines).split("> ")[1:4]
    assert "harmful 0.0" in first and "halted" not in first and REFUSAL not in first
    assert "halted from 0." in flagged and REFUSAL in flagged
    assert "halted" not in last and len(last.splitlines()) > 2, "it replies"
    shown = run("chat.py", "--threshold", "0", "--max-new-tokens", "4", lines=("Hello!",))
    assert "halted from 0.00 on" in shown and REFUSAL in shown


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs a CPU beside the actors'")
def test_actors_of_ray_give_the_scores_of_a_job(tmp_path, backbone_folder):
    pytest.importorskip("ray.data", reason="ray is not installed: pip install 'ray[data]'")
    head, source = tmp_path / "mood", tmp_path / "rows.parquet"
    save_head(make_probe(1, probe_type="gate", prompt_format="chat", max_length=64), head)
    rows = {"id": list(range(40)), "text": [f"number {i}{'!' * (i % 7)}" for i in range(40)]}
    pq.write_table(pa.table(rows), source)
    words = ("--probe", head, "--backbone", backbone_folder, "--batch-rows", 16, "--actors", 2, "--cpus", 0.5)
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(100_000_000)}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {**settings, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, FOLDER / "ray_scoring.py", source, tmp_path / "ray", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0 and "40 rows" in done.stdout, done.stderr
    ScoringJob([str(source)], tmp_path / "job", [str(head)], str(backbone_folder), keep_columns=["id"]).execute()
    ours, theirs = (pq.read_table(tmp_path / name).sort_by("id").to_pylist() for name in ("ray", "job"))
    assert len(ours) == len(theirs) == 40
    for one, other in zip(ours, theirs, strict=True):
        assert one["mood_label"] == other["mood_label"]
        assert one["mood_probabilities"] == pytest.approx(other["mood_probabilities"], abs=1e-5)
