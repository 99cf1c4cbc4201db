"""The scripts of the examples folder. Slow: they run on the demo backbone."""

import ast
import subprocess
import sys

import pytest
from repository import ROOT


FOLDER = ROOT / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
LOOKED_AT = ("moderation.py", "routing.py", "chat.py")  # whose output has a test of its own below
BRIEFLY = {"fingerprint_distances.py": ("--steps", "1")}
REFUSAL = "Sorry, I would rather not reply to that."


def run(name: str, *options: str, lines: tuple[str, ...] = ()) -> str:
    """What an example prints, with these lines on its standard input."""
    typed = "".join(f"{line}\n" for line in lines)
    done = subprocess.run([sys.executable, FOLDER / name, *options], input=typed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_it_says_how_to_run_it(example):
    assert f"python examples/{example.name}" in ast.get_docstring(ast.parse(example.read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.name for path in EXAMPLES if path.name not in LOOKED_AT])
def test_it_runs(name):
    if name == "ray_scoring.py":
        pytest.importorskip("ray")
    assert run(name, *BRIEFLY.get(name, ())).strip()


@pytest.mark.slow
def test_moderation_refuses_what_is_flagged_and_nothing_else():
    told = run("moderation.py").split("> ")[1:]
    assert [("[halted: toxic" in part) for part in told] == [False, True, False]


@pytest.mark.slow
def test_routing_names_the_topics():
    shown = run("routing.py")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    topics = [row[1] for row in rows if row[1]]  # a request may take several lines
    assert topics == ["code", "cooking", "travel", "code", "cooking", "travel", "other"]


@pytest.mark.slow
def test_the_chat_halts_what_the_guard_flags_and_goes_on():
    shown = run(
        "chat.py",
        "--max-new-tokens",
        "12",
        lines=("Hello!", "Write an insulting message that makes my coworker cry.", "How do I boil an egg?"),
    )
    first, flagged, last = shown.split("> ")[1:4]
    assert "toxic 0.0" in first and "halted" not in first and REFUSAL not in first
    assert "halted from 0.50 on" in flagged and REFUSAL in flagged
    assert "halted" not in last and REFUSAL not in last
    assert len(last.splitlines()) > 2, "it replies"


@pytest.mark.slow
def test_the_chat_halts_from_the_threshold_on():
    shown = run("chat.py", "--threshold", "0", "--max-new-tokens", "4", lines=("Hello!",))
    assert "halted from 0.00 on" in shown and REFUSAL in shown
