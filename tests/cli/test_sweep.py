"""`llama-probe sweep`: a search from the command line, and what it says to train with."""

import json

from command_line import call, run, write_rows

from llama_probe.heads.configuration import read_config


def test_sweep(backbone_folder, tmp_path):
    rows = write_rows(tmp_path)
    arguments = (
        "sweep", "--backbone", backbone_folder, "--train", rows / "train.jsonl", "--probe-type", "gate", "--probe-type",
        "attentive", "--trials", 3, "--epochs", 2, "--output", tmp_path / "sweep",
    )  # fmt: skip
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "3 configurations by validation auprc" in done.stdout and "--probe-type" in done.stdout
    best = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["trials"][0]
    trained = call(
        "train", "--backbone", backbone_folder, "--train", rows / "train.jsonl", "--output", tmp_path / "head",
        "--epochs", 1, *best["options"].split(),
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert read_config(tmp_path / "head").probe_type == best["params"]["probe_type"]
    again = call(*arguments)
    assert again.returncode == 2 and "go on with --resume" in again.stderr
