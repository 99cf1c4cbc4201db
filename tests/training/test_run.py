"""Runs from rows to a head folder: folds, rows of other sources, and going on after a stop."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import make_lm, read_head
from torch.utils.data import Subset

from llama_probe import ProbeError
from llama_probe.data.sources import FOLDS, DataSources
from llama_probe.evaluation.calibration import reliability
from llama_probe.evaluation.metrics import score
from llama_probe.evaluation.report import predict_logits
from llama_probe.heads.probe import ProbeModel
from llama_probe.training.recipe import Recipe
from llama_probe.training.run import CHECKPOINTS, TrainingRun, _last_checkpoint
from llama_probe.training.sweep import Sweep


def write(path, count, labels=2):
    lines = [
        json.dumps({"text": f"{('bad', 'good', 'so so')[i % labels]} no {i}", "label": i % labels})
        for i in range(count)
    ]
    path.write_text("\n".join(lines))
    return str(path)


class TestFolds:
    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory, backbone_folder):
        folder = tmp_path_factory.mktemp("few")
        return TrainingRun(
            backbone=str(backbone_folder),
            output=folder / "head",
            data=DataSources(train=write(folder / "a.jsonl", 30), folds=None),
            head={"probe_type": "gate"},
            recipe=Recipe(num_train_epochs=3, learning_rate=0.03),
            seeds=[4, 5],
        )

    @pytest.fixture(scope="class")
    def results(self, run):
        return run.execute()

    def test_every_row_trains_and_is_judged_by_a_head_that_did_not_see_it(self, run, results):
        assert results["data"]["train"]["rows"] == results["data"]["validation"]["rows"] == 30
        assert results["data"]["validation"]["source"] == f"{FOLDS} folds of train"
        assert [found["epochs"] for found in results["runs"]] == [3.0, 3.0], "nothing stops it early"
        # The same by hand, for one fold.
        prepared = run.prepare()
        held = prepared.folds[0]
        rest = np.setdiff1d(np.arange(30), held).tolist()
        part, _ = run._fit(4, prepared, Subset(prepared.datasets["train"], rest), None, run.output / "c")
        trained = run._train(4, prepared, run.output / "d")
        expected = predict_logits(part, Subset(prepared.datasets["train"], held.tolist()))
        assert torch.allclose(trained["logits"][torch.from_numpy(held)], expected, atol=1e-6)
        own = predict_logits(trained["probe"], prepared.datasets["train"])
        assert not torch.allclose(own, trained["logits"], atol=1e-3), "the head itself has seen all rows"

    def test_temperature_and_threshold_are_those_of_the_folds(self, run, results):
        head = read_head(run.output)
        prepared = run.prepare()
        logits = run._train(results["chosen_seed"], prepared, run.output / "e")["logits"]
        labels = prepared.parts["train"].labels
        chosen = next(found for found in results["runs"] if found["seed"] == results["chosen_seed"])
        assert head.config.temperature == chosen["temperature"] and head.config.threshold == chosen["threshold"]
        probs = (logits / head.config.temperature).softmax(-1).numpy()
        assert chosen["validation"]["f1"] == pytest.approx(score(probs, labels, head.config)["f1"])
        found = results["inspection"]["calibration"]["error"]
        assert found == pytest.approx(reliability(logits, labels, head.config)["error"], abs=1e-3)

    def test_the_card_says_so(self, run, results):
        card = (run.output / "README.md").read_text()
        assert "each scored by a head that was trained on the others of 5 folds and are saved" in card
        assert "validation 30 rows (5 folds of train)" in card


def test_a_head_of_replies_says_how_soon_it_halts(backbone_folder, tmp_path):
    lines = [
        {
            "ask": f"number {i}?",
            "text": ("fine, all is good", "fine, BAD BAD BAD BAD!")[i % 2] + "!" * (i % 3),
            "label": i % 2,
        }
        for i in range(100)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = TrainingRun(
        backbone=str(backbone_folder),
        data=DataSources(
            train=str(tmp_path / "a.jsonl"), prompt_column="ask", test_share=0.25, label_names=["fine", "awful"]
        ),
        output=tmp_path / "guard",
        head={"probe_type": "gate", "token_scope": "response"},
        recipe=Recipe(num_train_epochs=6, learning_rate=0.03),
        seeds=[0, 1],
    )
    results = run.execute()
    for found in results["runs"]:
        assert found["halting"]["max_false_halts"] == 0.05
        rules = found["halting"]["labels"]["awful"]
        (best,) = [rule for rule in rules if rule["chosen"]]
        assert best["validation"]["false_halts"] <= 0.05
        assert best["test"]["rows"] == 25 and best["test"]["detected"] > 0.5
        assert best["test"]["delay"]["median"] > len("fine, "), "the two begin alike, a token a letter"
    card = (tmp_path / "guard" / "README.md").read_text()
    assert "Replies halted by `awful` while they are written, 25 test rows" in card
    assert "gives one of `fine`, `awful` after each token of it" in card
    assert f"test 25 rows ({'25%'} of train)" in card


def test_no_reply_is_to_be_halted_in_vain(backbone_folder, tmp_path):
    """A rate of 0 is a rate, and goes for the halting as well."""
    lines = [{"ask": f"{i}?", "text": ("fine", "fine, BAD")[i % 2] + "!" * (i % 5), "label": i % 2} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = TrainingRun(
        backbone=str(backbone_folder),
        data=DataSources(train=str(tmp_path / "a.jsonl"), prompt_column="ask", validation_share=0.5),
        output=tmp_path / "guard",
        head={"probe_type": "gate", "token_scope": "response"},
        recipe=Recipe(num_train_epochs=1, max_false_positive_rate=0.0),
    ).execute()["runs"][0]["halting"]
    assert found["max_false_halts"] == 0
    assert all(rule["validation"]["false_halts"] == 0 for rule in found["labels"]["LABEL_1"])
    assert "that halt at most 0% of the other validation replies" in (tmp_path / "guard" / "README.md").read_text()


@pytest.mark.parametrize("folds", [0, 3])
def test_extra_rows_are_trained_on(backbone_folder, tmp_path, folds):
    """What the rows of train do not hold, and the extra rows do, is learned."""
    extra = [{"text": f"{'XX' if i % 2 else 'OO'} {i}", "label": i % 2} for i in range(60)]
    asked = [{"text": f"{'XX' if i % 2 else 'OO'} {i}", "label": i % 2} for i in range(60, 90)]
    for name, lines in (("extra", extra), ("asked", asked)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def run(further):
        return TrainingRun(
            backbone=str(backbone_folder),
            output=tmp_path / f"head-{len(further)}",
            data=DataSources(
                train=write(tmp_path / "a.jsonl", 40),
                test=str(tmp_path / "asked.jsonl"),
                label_names=["0", "1"],
                folds=folds,
                extra=further,
            ),
            head={"probe_type": "gate"},
            recipe=Recipe(num_train_epochs=6, learning_rate=0.03, patience=None),
        ).execute()

    results, without = run([str(tmp_path / "extra.jsonl")]), run([])
    assert results["data"]["extra"]["rows"] == 60 and results["data"]["extra"]["source"].endswith("extra.jsonl")
    assert results["data"]["train"] == without["data"]["train"] and "extra" not in without["data"]
    assert results["runs"][0]["test"]["auroc"] == 1.0 > without["runs"][0]["test"]["auroc"]
    assert "extra 60 rows" in (tmp_path / "head-1" / "README.md").read_text()


def test_what_extra_rows_count_for_is_said(backbone_folder, tmp_path):
    train, extra = write(tmp_path / "a.jsonl", 40), write(tmp_path / "b.jsonl", 60)

    def run(backbone, **head):
        data = DataSources(train=train, label_names=["0", "1"], extra=[extra], extra_weights=[0.0, 0.25])
        recipe = Recipe(num_train_epochs=1)
        return TrainingRun(str(backbone), data, tmp_path / "head", head, recipe).execute()

    results = run(backbone_folder, probe_type="multimax", options={"num_members": 2, "num_maxima": 1})
    assert results["data"]["extra"]["weights"] == [0.0, 0.25] and "weights" not in results["data"]["train"]
    card = (tmp_path / "head" / "README.md").read_text()
    assert "b.jsonl; they count 0 and 0.25 in turn for the head's members)" in card
    with pytest.raises(
        ProbeError, match=r"one for each of 2 members or more, and this gate head has 1: give a single"
    ):
        run(tmp_path / "never-loaded", probe_type="gate")


def test_extra_rows_where_a_kind_is_fitted_are_refused(backbone_folder, tmp_path):
    train = write(tmp_path / "a.jsonl", 40)
    run = TrainingRun(str(backbone_folder), DataSources(train, extra=[train]), tmp_path / "h", {"probe_type": "muli"})
    with pytest.raises(ProbeError, match=r"'muli' is fitted to the rows of .* alone: leave extra out"):
        run.execute()


def test_a_metric_that_says_nothing_of_the_validation_rows_is_refused(backbone_folder, tmp_path):
    alike = tmp_path / "alike.jsonl"
    alike.write_text("\n".join(json.dumps({"text": f"no {i}", "label": 1}) for i in range(5)))
    sources = DataSources(write(tmp_path / "a.jsonl", 40), str(alike), label_names=["0", "1"])
    run = TrainingRun(str(backbone_folder), sources, tmp_path / "head", {"probe_type": "gate"})
    with pytest.raises(
        ProbeError, match=r"auprc is not defined on the 5 validation rows: .* \(accuracy, f1, precision"
    ):
        run.execute()
    assert not (tmp_path / "head").exists(), "before any work"
    with pytest.raises(ProbeError, match="auprc is not defined"):
        Sweep(run, trials=2).execute()


class TestGoingOn:
    @pytest.fixture
    def stopped(self, backbone_folder, tmp_path, monkeypatch):
        """A run that was stopped after its training, and one that goes on with changes."""
        shutil.copytree(backbone_folder, tmp_path / "backbone")

        def run(resume=True, rows=40, **recipe):
            data = DataSources(train=write(tmp_path / f"{rows}.jsonl", rows), label_names=["0", "1"])
            recipe = Recipe(**{"num_train_epochs": 1, **recipe})
            head = {"probe_type": "gate"}
            return TrainingRun(str(tmp_path / "backbone"), data, tmp_path / "head", head, recipe, resume=resume)

        def stop(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(TrainingRun, "judge", stop)
            run(resume=False).execute()
        assert (tmp_path / "head" / CHECKPOINTS / "seed-0").is_dir() and (tmp_path / "head" / ".states").is_dir()
        return run

    def test_the_same_training(self, stopped, tmp_path, monkeypatch):
        steps = []
        original = ProbeModel.forward
        monkeypatch.setattr(
            ProbeModel, "forward", lambda self, *a, **k: (steps.append(self.training), original(self, *a, **k))[1]
        )
        stopped().execute()
        assert not any(steps), "nothing was left to train"
        assert not (tmp_path / "head" / CHECKPOINTS).exists() and not (tmp_path / "head" / ".states").exists()

    @pytest.mark.parametrize(
        "changes, what",
        [({"learning_rate": 0.5}, "recipe"), ({"rows": 42}, "rows"), ({"label_smoothing": 0.1}, "recipe")],
    )
    def test_another_training(self, stopped, tmp_path, changes, what):
        with pytest.raises(ProbeError, match=f"checkpoints of another training: its {what} are not these"):
            stopped(**changes).execute()
        assert not (tmp_path / "head" / "probe_config.json").exists()
        stopped(resume=False, **changes).execute()
        assert (tmp_path / "head" / "probe_config.json").exists()

    def test_another_backbone_of_the_same_name(self, stopped, tmp_path):
        make_lm(seed=1, vocab_size=260).save_pretrained(tmp_path / "backbone")
        with pytest.raises(ProbeError, match="checkpoints of another training: its backbone_weights are not these"):
            stopped().execute()

    def test_other_folds(self, backbone_folder, tmp_path, monkeypatch):
        """Folds are drawn by the first seed: the heads of another one have learned from rows that are held out now."""
        data = DataSources(train=write(tmp_path / "a.jsonl", 30), label_names=["0", "1"], folds=3)

        def run(*seeds, resume=False):
            recipe = Recipe(num_train_epochs=1)
            return TrainingRun(
                str(backbone_folder),
                data,
                tmp_path / "head",
                {"probe_type": "gate"},
                recipe,
                seeds=seeds,
                resume=resume,
            )

        def stop(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(TrainingRun, "save", stop)
            run(0, 1).execute()
        with pytest.raises(ProbeError, match="checkpoints of another training: its folds are not these"):
            run(1, resume=True).execute()
        assert run(0, 1, resume=True).execute()["chosen_seed"] in (0, 1)


class TestOutput:
    @pytest.mark.parametrize("name", ["README.md", "results.json"])
    def test_what_is_no_head_is_not_lost(self, backbone_folder, tmp_path, name):
        (tmp_path / name).write_text("mine")
        (tmp_path / "checkpoints").mkdir()
        run = TrainingRun("never-loaded", DataSources(train=write(tmp_path / "a.jsonl", 40)), tmp_path)
        with pytest.raises(ProbeError, match=f"{name} that belongs to no head, and would be lost"):
            run.execute()
        assert (tmp_path / name).read_text() == "mine"

    def test_folders_of_ones_own_stay(self, backbone_folder, tmp_path):
        (tmp_path / "checkpoints").mkdir()
        data = DataSources(train=write(tmp_path / "a.jsonl", 40), label_names=["0", "1"])
        recipe = Recipe(num_train_epochs=1)
        TrainingRun(str(backbone_folder), data, tmp_path, {"probe_type": "gate"}, recipe).execute()
        assert (tmp_path / "checkpoints").is_dir()

    def test_a_file(self, tmp_path):
        train = write(tmp_path / "a.jsonl", 40)
        for output in (tmp_path / "a.jsonl", tmp_path / "a.jsonl" / "b"):
            with pytest.raises(ProbeError, match=r"a\.jsonl is a file; name a folder"):
                TrainingRun("never-loaded", DataSources(train=train), output).execute()

    def test_states_are_removed_where_the_training_fails(self, backbone_folder, tmp_path, monkeypatch):
        def fail(*_):
            raise RuntimeError("out of order")

        monkeypatch.setattr(TrainingRun, "judge", fail)
        data = DataSources(train=write(tmp_path / "a.jsonl", 40), label_names=["0", "1"])
        run = TrainingRun(
            str(backbone_folder), data, tmp_path / "head", {"probe_type": "gate"}, Recipe(num_train_epochs=1)
        )
        with pytest.raises(RuntimeError, match="out of order"):
            run.execute()
        assert not (tmp_path / "head" / ".states").exists()


@pytest.mark.parametrize("weights", ["nan,1", "-1,2", "a,b", "", "0,0"])
def test_weights_of_classes_that_are_none(backbone_folder, tmp_path, weights):
    data, recipe = DataSources(train=write(tmp_path / "a.jsonl", 40)), Recipe(class_weights=weights)
    with pytest.raises(ProbeError, match="must be 'balanced', or numbers of at least 0 with commas, not all"):
        TrainingRun("never-loaded", data, tmp_path / "head", {"probe_type": "gate"}, recipe).execute()


def test_seeds_that_are_none(tmp_path):
    for seeds in ([], [-1], [2**32]):
        with pytest.raises(ProbeError, match=r"must be whole numbers from 0 and below 2\*\*32, and at least one"):
            TrainingRun("demo", DataSources(train=write(tmp_path / "a.jsonl", 40)), tmp_path / "head", seeds=seeds)


def test_half_of_a_checkpoint_is_none(tmp_path):
    assert _last_checkpoint(tmp_path / "none") is None
    for step in (5, 10, 15):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").touch()
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert _last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


class TestRefusals:
    def run(self, folder, backbone_folder, **changes):
        data = DataSources(train=write(folder / "a.jsonl", 30), folds=0)
        return TrainingRun(str(backbone_folder), data, folder / "head", {"probe_type": "gate"}, **changes)

    def test_a_second_run_into_the_same_folder(self, tmp_path, backbone_folder, monkeypatch):
        run = self.run(tmp_path, backbone_folder, recipe=Recipe(num_train_epochs=1))
        train = TrainingRun._train_all

        def train_beside_another(first, prepared):
            monkeypatch.setattr(TrainingRun, "_train_all", train)
            with pytest.raises(ProbeError, match=r"another run is at work in .*head"):
                run.execute()
            return train(first, prepared)

        monkeypatch.setattr(TrainingRun, "_train_all", train_beside_another)
        run.execute()
        assert read_head(tmp_path / "head").results["data"]["train"]["rows"] == 25

    @pytest.mark.parametrize("folds", [0, 2])
    def test_a_training_that_runs_away(self, tmp_path, backbone_folder, folds):
        run = self.run(tmp_path, backbone_folder, recipe=Recipe(num_train_epochs=2, learning_rate=1e38))
        run.data.folds = folds
        with pytest.raises(ProbeError, match=r"no number for .* rows: its training ran away"):
            run.execute()
