"""`llama-probe train` and `llama-probe sweep`, apart from what test_cli.py says of them."""

import json

import pytest
from command_line import call, refuse, succeed, write_rows
from own_kind_fixture import CODE

from llama_probe import ProbeModel
from llama_probe.heads import registry
from llama_probe.heads.configuration import read_config


pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def train(rows, backbone_folder):
    return ("train", "--backbone", backbone_folder, "--train", rows / "train.jsonl", "--epochs", 1, "--folds", 0)


def test_a_finished_head_is_not_replaced_in_silence(train, tmp_path):
    args = (*train, "--output", tmp_path / "a")
    succeed(*args, "--probe-type", "pooling", "--no-cache")
    before = (tmp_path / "a" / "probe_model.safetensors").read_bytes()
    for more in ((), ("--resume",), ("--resume", "--learning-rate", 0.5)):
        assert "--overwrite" in refuse(*args, "--probe-type", "gate", *more)
    assert (tmp_path / "a" / "probe_model.safetensors").read_bytes() == before
    succeed(*args, "--probe-type", "gate", "--overwrite")
    assert ProbeModel.from_pretrained(tmp_path / "a").config.probe_type == "gate"


def test_a_stopped_run_says_how_to_go_on(train, tmp_path, monkeypatch):
    args = (*train, "--probe-type", "pooling", "--output", tmp_path / "a")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("llama_probe.training.run.judge", stop)
        stopped = call(*args)
    assert stopped.returncode == 130 and "--resume" in stopped.stderr
    succeed(*args, "--resume")
    assert ProbeModel.from_pretrained(tmp_path / "a").config.probe_type == "pooling"


def test_a_head_of_one_layer(train, backbone_folder, tmp_path):
    succeed(*train, "--probe-type", "last", "--layers", "1,3", "--output", tmp_path / "a")
    config = read_config(tmp_path / "a")
    assert config.layers == [1, 3] and config.layer_indices == [3]
    served = ("--backbone", backbone_folder, "--probe", tmp_path / "a", "--json")
    assert succeed("classify", "good morning", *served)[0]["labels"]["a"].startswith("LABEL_")


def test_a_kind_of_ones_own(train, backbone_folder, tmp_path, monkeypatch):
    known = dict(registry._PROBE_TYPES)
    monkeypatch.setattr(registry, "_PROBE_TYPES", dict(known))
    (tmp_path / "kind.py").write_text(CODE)  # without weights of layers
    words = (*train, "--probe-type", "top", "--output", tmp_path / "mine")
    assert "top" in refuse(*words)
    given = ("--import", tmp_path / "kind.py")
    succeed(*words, *given)
    head = ("--probe", tmp_path / "mine", "--backbone", backbone_folder, "--json")
    assert "mine" in succeed("classify", "good morning", *head, *given)[0]["labels"]
    monkeypatch.setattr(registry, "_PROBE_TYPES", known)  # as in another process
    for line in (
        "classify x --probe {0}",
        "evaluate --data sst2 --probe {0}",
        "inspect {0}",
        "plot {0} --output x",
        "push {0} a/b",
    ):
        assert "trust_remote_code" in refuse(*line.format(tmp_path / "mine").split()).replace("-", "_")
    assert succeed("inspect", tmp_path / "mine", "--trust-remote-code", "--json")["probe_type"] == "top"
    assert "mine" in succeed("classify", "good morning", *head, "--trust-remote-code")[0]["labels"]
    (tmp_path / "broken.py").write_text("1 / 0")
    for name in ("broken.py", "nowhere.py"):
        assert name in refuse("inspect", tmp_path / "mine", "--import", tmp_path / name)


def test_sweep(rows, backbone_folder, tmp_path):
    arguments = (
        "sweep", "--backbone", backbone_folder, "--train", rows / "train.jsonl", "--probe-type", "gate", "--probe-type",
        "attentive", "--trials", 3, "--epochs", 2, "--output", tmp_path / "sweep",
    )  # fmt: skip
    shown = succeed(*arguments)
    assert "3 configurations by validation auprc" in shown and "--probe-type" in shown
    best = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["trials"][0]
    words = ("--backbone", backbone_folder, "--train", rows / "train.jsonl", "--output", tmp_path / "head")
    succeed("train", *words, *best["options"].split(), "--epochs=1")
    assert read_config(tmp_path / "head").probe_type == best["params"]["probe_type"]
    assert "--resume" in refuse(*arguments)
