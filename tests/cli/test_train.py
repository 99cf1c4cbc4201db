"""`llama-probe train`, apart from what test_cli.py says of it."""

import json
import shutil
from unittest.mock import Mock

import pytest
import yaml
from command_line import call, refuse, settings, succeed, train, write_rows
from conftest import OWN_TYPE

from llama_probe import ProbeModel
from llama_probe.heads import registry
from llama_probe.heads.configuration import read_config


pytestmark = pytest.mark.usefixtures("no_plots")
SHORT = settings(validation={"folds": 0}, training={"num_train_epochs": 1})


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows")) / "train.jsonl"


def test_a_finished_head_is_not_replaced_in_silence(rows, backbone_folder, tmp_path):
    train(backbone_folder, rows, tmp_path / "a", training={"cache_states": False})
    before = (tmp_path / "a" / "probe_model.safetensors").read_bytes()
    words = ("train", rows, "--backbone", backbone_folder, "--output", tmp_path / "a", *SHORT, "--probe-type=pooling")
    for more in ((), ("--resume",), ("--resume", "--set", "training.learning_rate=0.5")):
        assert "--overwrite" in refuse(*words, *more)
    assert (tmp_path / "a" / "probe_model.safetensors").read_bytes() == before
    succeed(*words, "--overwrite")
    assert ProbeModel.from_pretrained(tmp_path / "a").config.probe_type == "pooling"


def test_a_stopped_run_says_how_to_go_on(rows, backbone_folder, tmp_path, monkeypatch):
    words = ("train", rows, "--backbone", backbone_folder, "--output", tmp_path / "a", *SHORT)
    with monkeypatch.context() as patched:
        patched.setattr("llama_probe.training.run.choose", Mock(side_effect=KeyboardInterrupt))
        stopped = call(*words)
    assert stopped.returncode == 130 and "--resume" in stopped.stderr
    assert "runs" in succeed(*words, "--resume", "--json")


def test_a_type_of_ones_own(rows, backbone_folder, tmp_path, monkeypatch):
    known = dict(registry._PROBE_TYPES)
    monkeypatch.setattr(registry, "_PROBE_TYPES", dict(known))
    (tmp_path / "top.py").write_text(OWN_TYPE)  # without weights of layers
    words = ("train", rows, "--backbone", backbone_folder, "--output", tmp_path / "mine", *SHORT, "--probe-type=top")
    assert "top" in refuse(*words)
    own = ("--import", tmp_path / "top.py")
    succeed(*words, *own)
    head = ("--probe", tmp_path / "mine", "--backbone", backbone_folder, "--json")
    assert "mine" in succeed("classify", "good morning", *head, *own)[0]["probes"]
    monkeypatch.setattr(registry, "_PROBE_TYPES", known)  # as in another process
    for line in ("classify x --probe", "evaluate --data sst2 --probe", "inspect", "plot --output x"):
        assert "--import FILE.py" in refuse(*line.split(), tmp_path / "mine")
    (tmp_path / "broken.py").write_text("1 / 0")
    assert "broken.py" in refuse("inspect", tmp_path / "mine", "--import", tmp_path / "broken.py")


class TestRecipes:
    @pytest.fixture
    def recipe(self, rows, backbone_folder, tmp_path):
        values = {
            "name": "mood",
            "labels": {"names": ["good", "bad"], "flagged": ["bad"]},
            "train": [{"rows": "moods", "name": "moods"}],
            "validation": {"share": 0.2},
            "head": {"probe_type": "gate", "layers": [0.5, 1.0]},
            "training": {"num_train_epochs": 1},
        }
        (tmp_path / "mood.yaml").write_text(json.dumps(values))
        (tmp_path / "data" / "moods").mkdir(parents=True)
        shutil.copy(rows, tmp_path / "data" / "moods")
        places = ("--data-dir", tmp_path / "data", "--output", tmp_path / "a", "--backbone", backbone_folder)
        return ("train", tmp_path / "mood.yaml", *places)

    def test_a_head_by_a_recipe(self, recipe, tmp_path):
        shown = succeed(*recipe, "--dry-run")
        assert "60 rows" in shown and "tokens a second" in shown and "no hidden states" not in shown
        assert not (tmp_path / "a").exists()
        results = succeed(*recipe, "--set", "training.learning_rate=1e-3", "--set", "seed=3", "--json")
        assert results["training"]["learning_rate"] == 1e-3 and results["chosen_seed"] == 3
        assert read_config(tmp_path / "a").layers == [2, 4] and read_config(tmp_path / "a").flagged == ["bad"]
        written = yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())
        assert written["training"] == {"num_train_epochs": 1, "learning_rate": 1e-3} and written["seed"] == 3
        assert "moods" in refuse("train", tmp_path / "a", "--output", tmp_path / "b"), "its rows are not here"

    def test_refusals(self, recipe, rows, tmp_path):
        for more, named in (
            (("--set", "train.0.rows=other"), "other/SPLIT.jsonl.gz"),
            (("--train", rows), "exclude each other"),
            (("--licence", "commercial"), "licence"),
        ):
            assert named in refuse(*recipe, *more)
        for first, named in (
            ("no-such", "safety"),
            (tmp_path / "none.yaml", "none.yaml"),
            ("--num-train-epochs=2", "safety"),
            ("alice/rows:cola", "Hub data set"),
            (f"{tmp_path / 'data'}::none", "no split 'none'"),
        ):
            assert named in refuse("train", first, "--output", tmp_path / "b")
        assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()

    def test_a_search(self, rows, backbone_folder, tmp_path):
        search, head = {"trials": 3, "probe_types": ["gate", "last"]}, {"probe_type": "last"}
        shown = train(backbone_folder, rows, tmp_path / "a", search=search, head=head)
        assert "3 configurations by validation" in shown
        results = json.loads((tmp_path / "a" / "results.json").read_text())
        best, *others = results["search"]
        assert {trial["values"]["probe_type"] for trial in results["search"]} == {"gate", "last"}
        assert best["score"] == results["runs"][0]["validation"]["auprc"] >= max(trial["score"] for trial in others)
        assert read_config(tmp_path / "a").probe_type == best["values"]["probe_type"] == results["probe_type"]
