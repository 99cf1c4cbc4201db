"""A guard is never the wrong way round: the label to flag is named, whatever the order of the labels."""

import pytest
from command_line import call, refuse, succeed, train
from training_runs import write

from llama_probe import ProbeModel
from llama_probe.heads.configuration import read_config


pytestmark = pytest.mark.usefixtures("no_plots")

# What is to be flagged comes first in the alphabet, and last.
ORDERS = {"first": ("awful", "fine"), "last": ("zany", "fine")}
TRAINING = {"num_train_epochs": 20, "learning_rate": 0.03, "novelty": False}
PROMPTS = ("BAD!! number 7", "kind number 8")


@pytest.fixture
def guard(backbone_folder, tmp_path):
    """Train a head on texts whose first word gives the label away. Return the words that name it, and what was printed."""

    def guard(bad, good, *words):
        rows = [{"text": f"{('BAD!!', 'kind')[i % 2]} number {i}", "label": (bad, good)[i % 2]} for i in range(100)]
        rows, output = write(tmp_path / "rows.jsonl", rows), tmp_path / "guard"
        printed = train(backbone_folder, rows, output, *words, training=TRAINING)
        return ("--probe", output, "--backbone", backbone_folder), printed

    return guard


def benign(path, *words):
    """Write 30 rows without labels that begin with these words, in turn."""
    return write(path, [{"text": f"{words[i % len(words)]} number {i}"} for i in range(80, 110)])


@pytest.mark.parametrize("order", ORDERS)
def test_the_flagged_label_halts_calibrates_and_is_measured(guard, tmp_path, order):
    bad, good = ORDERS[order]
    served, printed = guard(bad, good, "--flag", bad)
    assert f"flagged: {bad}" in printed and f"It flags `{bad}`" in (tmp_path / "guard" / "README.md").read_text()
    config = read_config(tmp_path / "guard")
    assert config.flagged == [bad] and list(config.id2label.values()) == sorted((bad, good))
    args = ("generate", *PROMPTS, *served, "--max-new-tokens", 1, "--halt-on", "guard")
    rows = succeed(*args, "--json")
    assert f"guard halts on '{bad}'" in call(*args).stderr
    assert [row["halted"] is not None for row in rows] == [True, False] and rows[0]["halted"]["label"] == bad
    kind = benign(tmp_path / "kind.jsonl", "kind")
    report = succeed("evaluate", *served, "--data", kind, "--benign", "--bootstrap", 0, "--json")
    assert report["flagged"]["label"] == bad and report["flagged"]["share"] == 0 and report["labels"][bad]["rows"] == 0
    refuse("calibrate", *served, "--benign", benign(tmp_path / "bad.jsonl", "BAD!!"), "--rate", 0.1)
    assert read_config(tmp_path / "guard").threshold == config.threshold, "nothing was written"


def test_a_head_that_flags_nothing_halts_and_calibrates_when_told_what(guard, tmp_path):
    served, printed = guard("awful", "fine")
    assert "flagged: no label; name one with --flag" in printed and read_config(tmp_path / "guard").flagged is None
    args = ("generate", *PROMPTS, *served, "--max-new-tokens", 1)
    assert "--halt-on guard:awful" in refuse(*args, "--halt-on", "guard")
    halted = [row["halted"] is not None for row in succeed(*args, "--halt-on", "guard:fine", "--json")]
    assert halted == [False, True]
    rows = benign(tmp_path / "benign.jsonl", "kind", "kind", "BAD!!")
    fit = ("calibrate", *served, "--benign", rows, "--rate", 0.4)
    assert "--flag awful" in refuse(*fit) and "--benign" in refuse("calibrate", *served, "--flag", "awful")
    assert "flagged=['bad']" in refuse(*fit, "--flag", "bad")
    succeed(*fit, "--flag", "awful")
    head = ProbeModel.from_pretrained(tmp_path / "guard")
    assert head.config.flagged == [head.results["thresholds_from"]["flagged"]] == ["awful"] and head.config.thresholds
