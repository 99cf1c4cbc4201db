"""A guard is never the wrong way round: the label to flag is named, whatever the order of the labels."""

import pytest
from command_line import call, refuse, succeed, train
from conftest import read_head
from training_runs import write


pytestmark = pytest.mark.usefixtures("no_plots")
TRAINING = {"num_train_epochs": 20, "learning_rate": 0.03, "novelty": False}
PROMPTS = ("BAD!! number 7", "kind number 8")


@pytest.fixture
def guard(backbone_folder, tmp_path):
    """Train a head on texts whose first word is the label. Return the words that name it, and what was printed."""

    def guard(bad, good, *words):
        rows = [{"text": f"{('BAD!!', 'kind')[i % 2]} number {i}", "label": (bad, good)[i % 2]} for i in range(100)]
        rows, output = write(tmp_path / "rows.jsonl", rows), tmp_path / "guard"
        printed = train(backbone_folder, rows, output, *words, training=TRAINING)
        return ("--probe", output, "--backbone", backbone_folder), printed

    return guard


def benign(path, *words):
    """Write 30 rows without labels that begin with these words, in turn."""
    return write(path, [{"text": f"{words[i % len(words)]} number {i}"} for i in range(80, 110)])


def halted(served, rule):
    """Return which of `PROMPTS` a rule halts."""
    rows = succeed("generate", *PROMPTS, *served, "--max-new-tokens", 1, "--halt-on", rule, "--json")
    return [row["halted"] and row["halted"]["label"] for row in rows]


def test_the_flagged_label_halts_and_calibrates(guard, tmp_path):
    served, printed = guard("zany", "fine", "--flagged", "zany")
    assert "flagged: zany" in printed and "It flags `zany`" in (tmp_path / "guard" / "README.md").read_text()
    config = read_head(tmp_path / "guard").config
    assert config.flagged == ["zany"] and list(config.id2label.values()) == ["fine", "zany"]
    assert halted(served, "guard") == ["zany", None]
    words = ("generate", *PROMPTS, *served, "--max-new-tokens", 1, "--halt-on", "guard", "--halt-reply", "No.")
    shown = call(*words)
    assert "guard halts on 'zany'" in shown.stderr and shown.stdout.count("halted: No.") == 1
    refuse("calibrate", *served, "--benign", benign(tmp_path / "bad.jsonl", "BAD!!"), "--rate", 0.1)
    assert read_head(tmp_path / "guard").config.threshold == config.threshold, "nothing was written"


def test_a_head_that_flags_nothing_halts_and_calibrates_when_told_what(guard, tmp_path):
    """The label that is then flagged comes first in the alphabet."""
    served, printed = guard("awful", "fine")
    assert "flagged: no label; name one with --flagged" in printed
    assert read_head(tmp_path / "guard").config.flagged is None
    assert "--halt-on guard:awful" in refuse("generate", "x", *served, "--halt-on", "guard")
    assert halted(served, "guard:fine") == [None, "fine"]
    rows = benign(tmp_path / "benign.jsonl", "kind", "kind", "BAD!!")
    fit = ("calibrate", *served, "--benign", rows, "--rate", 0.4)
    assert "--flagged awful" in refuse(*fit) and "--benign" in refuse("calibrate", *served, "--flagged", "awful")
    assert "flagged=['bad']" in refuse(*fit, "--flagged", "bad")
    succeed(*fit, "--flagged", "awful")
    head = read_head(tmp_path / "guard")
    assert head.config.flagged == [head.results["thresholds_from"]["flagged"]] == ["awful"] and head.config.thresholds
    assert halted(served, "guard") == ["awful", None]
