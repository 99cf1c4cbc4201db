"""The scripts of the examples folder. Slow: they run on the demo backbone."""

import ast
import contextlib
import io
import json
import runpy
import subprocess
import sys

import pytest
from repository import ROOT

from llama_probe import ProbeError
from llama_probe.backbone import loading


FOLDER = ROOT / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py"))
CHECKED = ("moderation.py", "routing.py", "chat.py")  # their output has a test below
ALONE = ("quickstart.py", "ray_scoring.py")  # these import the package for its effect, or start a cluster
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
def tables(copies, tmp_path, monkeypatch):
    """A function that writes the tables of the paper into `tmp_path / "out"` from a few rows, and returns `tables.md`."""
    monkeypatch.syspath_prepend(FOLDER / "paper")

    def write(backbone, *options: str) -> str:
        places = ("--backbone", str(backbone), "--data-dir", str(copies), "--output", str(tmp_path / "out"))
        assert "tables written" in run("paper/tables.py", *places, "--epochs", "1", "--shots", "1", *options)
        return (tmp_path / "out" / "tables.md").read_text()

    return write


def test_the_tables_of_the_paper_resume(tables, backbone_folder, tmp_path):
    options = ("--data", "toxicchat", "--max-length", "64", "--seeds", "2")
    text = tables(backbone_folder, "--methods", "tfidf,gate", "--only", "main,ood,layers", *options)
    assert "| `tfidf` |" in text and "| `gate` | 258 |" in text and "mha (paper only)" in text
    assert text.count("±") == 1 + 4 + 3 and "| method | xstest |" in text and "## Layer weights on toxicchat" in text
    changed = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.json")}
    again = tables(backbone_folder, "--methods", "gate,pooling", "--only", "main,few-labels,downcast", *options)
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
    options = ("--data", "toxicchat", "--seeds", "1", "--max-rows", "16", "--trials", "1")
    text = tables("demo", "--methods", "tfidf,muli,mha", "--only", "main,sensitivity", *options)
    assert "| `mha` | 1,328,258 |" in text and "| `muli` |" in text and "## Sensitivity on toxicchat" in text


def test_a_guard_that_reads_first_is_timed(backbone_folder):
    options = ("--backbone", str(backbone_folder), "--guard", str(backbone_folder), "--tokens", "8", "--pairs", "1")
    lines = run("paper/serving.py", *options, "--kind", "gate").splitlines()
    assert lines[0].startswith("gate: ") and "(paper: 1.17)" in lines[0] and lines[1].startswith("guard ")


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_says_how_to_run_it(name):
    assert f"python examples/{name}" in ast.get_docstring(ast.parse((FOLDER / name).read_text()))


def notebook() -> list[str]:
    """Return the code cells of the notebook."""
    cells = json.loads((FOLDER / "train_a_head.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells), "it is stored without outputs"
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_notebook(folder, monkeypatch) -> dict:
    monkeypatch.chdir(folder)
    names = {"__name__": "__main__"}
    for number, cell in enumerate(notebook()):
        exec(compile(cell, f"cell {number}", "exec"), names)
    return names


def test_the_notebook_runs(backbone_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "demo_backbone", lambda: backbone_folder)
    names = run_notebook(tmp_path, monkeypatch)
    assert names["figure"].axes and (tmp_path / "topic" / "probe_config.json").is_file()


@pytest.mark.slow
def test_the_head_of_the_notebook_is_right(tmp_path, monkeypatch):
    names = run_notebook(tmp_path, monkeypatch)
    assert names["accuracy"] > 0.9 and names["labels"] == ["cooking", "travel", "code"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - {*CHECKED, *ALONE}))
def test_it_runs(name):
    assert run(name, *(["--steps", "1"] if name == "fingerprint_distances.py" else [])).strip()


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_it_runs_in_a_process_of_its_own(name):
    if name == "ray_scoring.py":
        pytest.importorskip("ray")
    done = subprocess.run([sys.executable, FOLDER / name], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


@pytest.mark.slow
def test_moderation_declines_the_flagged_prompt_alone():
    assert [("[halted: harmful" in part) for part in run("moderation.py").split("> ")[1:]] == [False, True, False]


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
