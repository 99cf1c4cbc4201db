"""Runs from rows to a head folder: folds, further rows, and resuming after a stop."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import make_lm, read_head
from torch.utils.data import Subset
from training_runs import run_of, write

from llama_probe import ProbeError
from llama_probe.distributed import claimed
from llama_probe.evaluation.calibration import reliability
from llama_probe.evaluation.metrics import score_logits
from llama_probe.evaluation.prediction import predict_logits
from llama_probe.heads.probe import ProbeModel
from llama_probe.training import run as training_run
from llama_probe.training.options import CHECKPOINTS
from llama_probe.training.run import _last_checkpoint
from llama_probe.training.sweep import Sweep


pytestmark = pytest.mark.usefixtures("no_plots")


def interrupt(*_):
    raise KeyboardInterrupt


def test_folds(backbone_folder, tmp_path):
    """Every row trains, and is judged by a head that has not seen it."""
    run = run_of(tmp_path, backbone_folder, 2, 30, seeds=(4, 5), learning_rate=0.03, folds=2)
    results = run.run()
    assert results["data"]["train"]["rows"] == results["data"]["validation"]["rows"] == 30
    assert results["data"]["validation"]["source"] == "2 folds of train"
    assert [found["epochs"] for found in results["runs"]] == [2.0, 2.0], "nothing stops it early"
    chosen = next(found for found in results["runs"] if found["seed"] == results["chosen_seed"])
    data = run.prepare()
    train, labels, held = data.datasets["train"], data.parts["train"].labels, data.folds[0]
    probe, _, logits = run._train(results["chosen_seed"], data, tmp_path / "d")
    assert not torch.allclose(predict_logits(probe, train), logits, atol=1e-3), "the head itself has seen all rows"
    # The same by hand, for one fold.
    rest = Subset(train, np.setdiff1d(np.arange(30), held).tolist())
    part = run._fit(results["chosen_seed"], data, rest, None, tmp_path / "c").model
    expected = predict_logits(part, Subset(train, held.tolist()))
    assert torch.allclose(logits[torch.from_numpy(held)], expected, atol=1e-6)
    head = read_head(run.output)
    assert head.config.temperature == chosen["temperature"] and head.config.threshold == chosen["threshold"]
    assert chosen["validation"]["f1"] == pytest.approx(score_logits(logits, labels, head.config)["f1"])
    found = results["inspection"]["calibration"]["error"]
    assert found == pytest.approx(reliability(logits, labels, head.config)["error"], abs=1e-3)
    assert "2 folds" in (run.output / "README.md").read_text()


@pytest.mark.parametrize("rate", [None, 0.0])
def test_a_head_of_replies_says_how_soon_it_halts(backbone_folder, tmp_path, rate):
    words = ("fine, all is good", "fine, BAD BAD BAD BAD!")
    lines = [{"ask": f"number {i}?", "text": words[i % 2] + "!" * (i % 3), "label": i % 2} for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    changes = {
        "train": str(tmp_path / "a.jsonl"),
        "prompt_column": "ask",
        "label_names": ["fine", "awful"],
        "flagged": ["awful"],
    }
    changes |= {"head": {"probe_type": "gate", "token_scope": "response"}, "test_share": 0.25}
    run = run_of(tmp_path, backbone_folder, 4, learning_rate=0.03, max_false_positive_rate=rate, **changes)
    results = run.run()
    found = results["runs"][0]["halting"]
    assert found["max_false_halts"] == (0.05 if rate is None else 0)
    rules = found["labels"]["awful"]
    assert all(rule["validation"]["false_halts"] <= found["max_false_halts"] for rule in rules)
    (best,) = [rule for rule in rules if rule["chosen"]]
    assert best["test"]["rows"] == 25 and best["test"]["detected"] > 0.5
    assert best["test"]["delay"]["median"] > len("fine, "), "the two begin alike, a token a letter"
    assert "halted by `awful`" in (run.output / "README.md").read_text()


@pytest.mark.parametrize("folds", [0, 2])
def test_extra_rows_are_trained_on(backbone_folder, tmp_path, folds):
    """A head learns from the extra rows what the rows of train do not show."""
    extra = write(tmp_path / "e.jsonl", 60, ("XX", "OO"))
    test = write(tmp_path / "t.jsonl", 30, ("XX is", "OO is"))

    def results(further):
        changes = {"test": test, "folds": folds, "extra": further, "learning_rate": 0.03, "patience": None}
        return run_of(tmp_path, backbone_folder, 6, **changes).run()

    found = results([extra])
    assert found["data"]["extra"]["rows"] == 60 and found["data"]["extra"]["source"].endswith("e.jsonl")
    assert "extra 60 rows" in (tmp_path / "head" / "README.md").read_text()
    without = results([])
    assert found["data"]["train"] == without["data"]["train"] and "extra" not in without["data"]
    assert found["runs"][0]["test"]["auroc"] == 1.0 > without["runs"][0]["test"]["auroc"]


def test_weights_of_extra_rows(backbone_folder, tmp_path):
    changes = {"extra": [write(tmp_path / "b.jsonl", 60)], "extra_weights": [0.0, 0.25]}
    head = {"probe_type": "multimax", "options": {"num_members": 2, "num_maxima": 1}}
    results = run_of(tmp_path, backbone_folder, head=head, **changes).run()
    assert results["data"]["extra"]["weights"] == [0.0, 0.25] and "weights" not in results["data"]["train"]
    assert "0 and 0.25" in (tmp_path / "head" / "README.md").read_text()
    with pytest.raises(ProbeError, match="extra_weights"):
        run_of(tmp_path, **changes).run()


def test_later_turns_are_for_heads_that_read_earlier_ones(tmp_path):
    for scope in ("last_user", "response"):
        with pytest.raises(ProbeError, match="token_scope"):
            run_of(tmp_path, augment=["later_turns"], head={"token_scope": scope})
    run_of(tmp_path, augment=["later_turns"], head={"token_scope": "user"})


class TestResuming:
    @pytest.fixture
    def stopped(self, backbone_folder, tmp_path, monkeypatch):
        """A run that was stopped after its training, and a function that resumes it with changes."""
        shutil.copytree(backbone_folder, tmp_path / "backbone")

        def resumed(resume=True, **changes):
            return run_of(tmp_path, tmp_path / "backbone", resume=resume, **changes)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(training_run, "judge", interrupt)
            resumed(resume=False).run()
        assert (tmp_path / "head" / CHECKPOINTS / "seed-0").is_dir() and (tmp_path / "head" / ".states").is_dir()
        return resumed

    def test_the_same_training(self, stopped, tmp_path, monkeypatch):
        steps, original = [], ProbeModel.score
        monkeypatch.setattr(
            ProbeModel, "score", lambda self, *a, **k: (steps.append(self.training), original(self, *a, **k))[1]
        )
        stopped().run()
        assert steps and not any(steps), "nothing was left to train"
        assert not (tmp_path / "head" / CHECKPOINTS).exists() and not (tmp_path / "head" / ".states").exists()

    def test_another_training_is_refused(self, stopped, tmp_path):
        for changes, name in (({"learning_rate": 0.5}, "learning_rate"), ({"rows": 42}, "train")):
            with pytest.raises(ProbeError, match=name):
                stopped(**changes).run()
        make_lm(seed=1, vocab_size=260).save_pretrained(tmp_path / "backbone")
        with pytest.raises(ProbeError, match="backbone_weights"):
            stopped().run()
        assert not (tmp_path / "head" / "probe_config.json").exists()
        stopped(resume=False, learning_rate=0.5).run()
        assert (tmp_path / "head" / "probe_config.json").exists()

    def test_other_folds_are_refused(self, backbone_folder, tmp_path, monkeypatch):
        """Folds are drawn by the first seed: heads of another one have learned from rows that are held out now."""

        monkeypatch.setattr(training_run, "judge", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_of(tmp_path, backbone_folder, rows=30, folds=2).run()
        with pytest.raises(ProbeError, match="folds"):
            run_of(tmp_path, backbone_folder, rows=30, folds=2, seeds=[1], resume=True).run()


def test_half_of_a_checkpoint_is_none(tmp_path):
    assert _last_checkpoint(tmp_path / "none") is None
    for step in (5, 10, 15):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").touch()
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert _last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


class TestOutput:
    def test_states_go_where_the_training_fails_and_folders_of_ones_own_stay(
        self, backbone_folder, tmp_path, monkeypatch
    ):
        def fail(*_):
            raise RuntimeError("out of order")

        (tmp_path / "head" / "checkpoints").mkdir(parents=True)
        monkeypatch.setattr(training_run, "judge", fail)
        with pytest.raises(RuntimeError, match="out of order"):
            run_of(tmp_path, backbone_folder).run()
        assert not (tmp_path / "head" / ".states").exists() and (tmp_path / "head" / "checkpoints").is_dir()

    def test_a_second_run_into_the_same_folder_is_refused(self, tmp_path):
        with claimed(tmp_path / "head"), pytest.raises(ProbeError, match="another run"):
            run_of(tmp_path).run()


class TestRefusals:
    def test_a_metric_that_is_not_defined_on_the_validation_rows(self, tmp_path):
        run = run_of(tmp_path, eval=write(tmp_path / "alike.jsonl", 1))
        for wanted in (run, Sweep(training=run, trials=2)):
            with pytest.raises(ProbeError, match="auprc"):
                wanted.run()
        assert not (tmp_path / "head").exists(), "before any work"

    @pytest.mark.parametrize("weights", ["nan,1", "-1,2", "a,b", "0,0"])
    def test_class_weights(self, tmp_path, weights):
        with pytest.raises(ProbeError, match="class_weights"):
            run_of(tmp_path, class_weights=weights).run()

    @pytest.mark.parametrize("head", [{"layers": [99]}, {"probe_type": "mha", "downcast": 5}])
    def test_sizes_that_the_backbone_does_not_have(self, tmp_path, backbone_folder, monkeypatch, head):
        monkeypatch.setattr(training_run, "load_backbone", lambda *_: pytest.fail("refused after the backbone loads"))
        with pytest.raises(ProbeError, match=list(head)[-1]):
            run_of(tmp_path, backbone_folder, head=head).run()

    @pytest.mark.parametrize("seeds", [[], [2**32]])
    def test_seeds(self, tmp_path, seeds):
        with pytest.raises(ProbeError, match="seeds"):
            run_of(tmp_path, seeds=seeds)

    def test_a_training_that_diverges(self, tmp_path, backbone_folder):
        with pytest.raises(ProbeError, match="no number"):
            run_of(tmp_path, backbone_folder, 2, learning_rate=1e38).run()
