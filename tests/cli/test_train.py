"""`llama-probe train`, apart from what test_cli.py says of them."""

import json

import pytest
import yaml
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
    succeed(*args, "--probe-type", "pooling", "--set", "training.cache_states=false")
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
        patched.setattr("llama_probe.training.trainer.finish", stop)
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


class TestRecipes:
    @pytest.fixture
    def recipe(self, rows, tmp_path):
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
        (tmp_path / "data" / "moods" / "train.jsonl").write_text((rows / "train.jsonl").read_text())
        return ("train", tmp_path / "mood.yaml", "--data-dir", tmp_path / "data", "--output", tmp_path / "a")

    def test_a_head_by_a_recipe(self, recipe, backbone_folder, tmp_path):
        words = (*recipe, "--backbone", backbone_folder)
        told = succeed(*words, "--dry-run")
        assert "60 rows" in told and "tokens a second" in told and "GB of hidden states" in told
        assert not (tmp_path / "a").exists()
        results = succeed(*words, "--set", "training.learning_rate=1e-3", "--seed", 3, "--json")
        assert results["recipe"]["learning_rate"] == 1e-3 and results["chosen_seed"] == 3
        assert read_config(tmp_path / "a").layers == [2, 4] and read_config(tmp_path / "a").flagged == ["bad"]
        written = yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())
        assert written["training"] == {"num_train_epochs": 1, "learning_rate": 1e-3} and written["seed"] == 3
        assert "recipe.yaml" not in refuse(
            "train", tmp_path / "a", "--output", tmp_path / "b"
        )  # its rows are not here

    def test_refusals(self, recipe, rows, backbone_folder, tmp_path):
        words = (*recipe, "--backbone", backbone_folder)
        for more, named in (
            (("--set", "head.kind=gate"), "'kind'"),
            (("--set", "train.0.rows=other"), "other/SPLIT.jsonl.gz"),
            (("--train", rows / "train.jsonl"), "--train and the recipe"),
            (("--licence", "commercial"), "licence"),
        ):
            assert named in refuse(*words, *more)
        for first, named in (("no-such", "safety"), (tmp_path / "none.yaml", "none.yaml")):
            assert named in refuse("train", first, "--output", tmp_path / "b")
        assert "safety" in refuse("train", "--output", tmp_path / "b")
        assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()

    def test_rows_in_place_of_a_recipe(self, rows, backbone_folder, tmp_path):
        words = ("--backbone", backbone_folder, "--epochs", 1, "--folds", 0, "--output", tmp_path / "a", "--json")
        assert succeed("train", rows / "train.jsonl", *words)["data"]["train"]["rows"] == 51

    def test_a_search(self, rows, backbone_folder, tmp_path):
        words = ("--backbone", backbone_folder, "--train", rows / "train.jsonl", "--epochs", 2, "--folds", 0)
        search = ("--set", "search={trials: 3, probe_types: [gate, attentive]}", "--output", tmp_path / "a")
        assert "3 configurations by validation auprc" in succeed("train", *words, *search)
        best = json.loads((tmp_path / "a" / "results.json").read_text())["search"][0]
        assert read_config(tmp_path / "a").probe_type == best["values"]["probe_type"]
