"""A guard is never the wrong way round: the label to flag is named, whatever the order of the labels."""

import json

import pytest
from command_line import call, refuse, succeed

from llama_probe import ProbeModel
from llama_probe.heads.configuration import read_config


pytestmark = pytest.mark.usefixtures("no_plots")

# What is to be flagged comes first in the alphabet, and last.
ORDERS = {"first": ("awful", "fine"), "last": ("zany", "fine")}


@pytest.fixture(scope="module")
def train(backbone_folder, tmp_path_factory):
    """A command that trains a head on texts whose second word gives the label away, and returns its folder."""
    folder = tmp_path_factory.mktemp("flagged")

    def run(bad, good, *options):
        rows, output = folder / "rows.jsonl", folder / "-".join((bad, *map(str, options))) / "guard"
        lines = [{"text": f"{('BAD!!', 'kind')[i % 2]} number {i}", "label": (bad, good)[i % 2]} for i in range(100)]
        rows.write_text("\n".join(map(json.dumps, lines)))
        args = (
            "--backbone",
            backbone_folder,
            "--train",
            rows,
            "--output",
            output,
            "--probe-type",
            "gate",
            "--epochs",
            20,
        )
        rate = ("--learning-rate", 0.03, "--folds", 0, "--set", "training.novelty=false")
        return output, succeed("train", *args, *rate, *options)

    return run


PROMPTS = ("BAD!! number 7", "kind number 8")


@pytest.mark.parametrize("order", ORDERS)
def test_the_flagged_label_halts_calibrates_and_is_measured(train, backbone_folder, tmp_path, order):
    bad, good = ORDERS[order]
    head, printed = train(bad, good, "--flag", bad)
    assert f"flagged: {bad}" in printed and f"It flags `{bad}`" in (head / "README.md").read_text()
    config = read_config(head)
    assert config.flagged == [bad] and list(config.id2label.values()) == sorted((bad, good))
    served = ("--probe", head, "--backbone", backbone_folder)
    args = ("generate", *PROMPTS, "--probe", head, "--backbone", backbone_folder, "--max-new-tokens", 1)
    found = succeed(*args, "--halt-on", "guard", "--json")
    assert f"guard halts on '{bad}'" in call(*args, "--halt-on", "guard").stderr
    assert [row["halted"] is not None for row in found] == [True, False] and found[0]["halted"]["label"] == bad
    harmless, harmful = tmp_path / "harmless.jsonl", tmp_path / "harmful.jsonl"
    for path, word in ((harmless, "kind"), (harmful, "BAD!!")):
        path.write_text("\n".join(json.dumps({"text": f"{word} number {i}"}) for i in range(80, 110)))
    report = succeed("evaluate", *served, "--data", harmless, "--benign", "--bootstrap", 0, "--json")
    assert report["flagged"]["label"] == bad and report["flagged"]["share"] == 0 and report["labels"][bad]["rows"] == 0
    assert "more than" not in refuse("calibrate", *served, "--benign", harmful, "--rate", 0.1)
    assert read_config(head).threshold == config.threshold, "nothing was written"


def test_a_head_that_flags_nothing_halts_when_told_what(train, backbone_folder, tmp_path):
    head, printed = train("awful", "fine")
    assert "flagged: no label; name one with --flag" in printed and read_config(head).flagged is None
    args = ("generate", *PROMPTS, "--probe", head, "--backbone", backbone_folder, "--max-new-tokens", 1)
    assert "--halt-on guard:awful" in refuse(*args, "--halt-on", "guard")
    halted = [row["halted"] is not None for row in succeed(*args, "--halt-on", "guard:fine", "--json")]
    assert halted == [False, True]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"so so number {i}"}) for i in range(30)))
    served = ("--probe", head, "--backbone", backbone_folder)
    fit = ("calibrate", *served, "--benign", tmp_path / "rows.jsonl", "--rate", 0.4)
    assert "--flag awful" in refuse(*fit) and "--benign" in refuse("calibrate", *served, "--flag", "awful")
    assert "flagged=['bad']" in refuse(*fit, "--flag", "bad")


def test_calibrate_can_name_the_label(train, backbone_folder, tmp_path):
    head, _ = train("awful", "fine", "--seed", 1)
    lines = [json.dumps({"text": f"{('kind', 'BAD!!')[i % 3 == 0]} number {i}"}) for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    fit = ("calibrate", "--probe", head, "--backbone", backbone_folder, "--benign", tmp_path / "rows.jsonl")
    succeed(*fit, "--rate", 0.4, "--flag", "awful")
    probe = ProbeModel.from_pretrained(head)
    assert (
        probe.config.flagged == ["awful"]
        and probe.config.thresholds
        and probe.results["thresholds_from"]["flagged"] == "awful"
    )


def test_max_false_positive_rate_needs_the_label(backbone_folder, tmp_path):
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"number {i},{('bad', 'good')[i % 2]}\n" for i in range(40))
    )
    args = ("train", "--backbone", backbone_folder, "--train", tmp_path / "rows.csv", "--output", tmp_path / "head")
    assert "--flag" in refuse(*args, "--set", "training.max_false_positive_rate=0.1")
    assert "flagged=['worse']" in refuse(*args, "--flag", "worse").replace("--flag=", "flagged=")
    assert not (tmp_path / "head").exists()
