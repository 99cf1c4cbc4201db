"""Runs from rows to a head folder: what is held back, and what a few rows are used for."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from llama_probe import ProbeError
from llama_probe.calibration import reliability
from llama_probe.data_sources import FEW_ROWS, FOLDS, DataSources
from llama_probe.evaluation import predict_logits
from llama_probe.files import read_head
from llama_probe.metrics import score
from llama_probe.probe import ProbeModel
from llama_probe.recipe import Recipe
from llama_probe.sweep import Sweep
from llama_probe.training_run import CHECKPOINTS, TrainingRun, _last_checkpoint


def write(path, count, labels=2):
    lines = [
        json.dumps({"text": f"{('bad', 'good', 'so so')[i % labels]} no {i}", "label": i % labels})
        for i in range(count)
    ]
    path.write_text("\n".join(lines))
    return str(path)


class TestHoldingBack:
    def test_a_share(self, tmp_path):
        parts = DataSources(train=write(tmp_path / "a.jsonl", 40)).read(0)
        assert (len(parts["train"]), len(parts["validation"])) == (34, 6)
        assert not set(parts["train"].texts) & set(parts["validation"].texts)

    @pytest.mark.parametrize("count, folded", [(FEW_ROWS - 1, True), (FEW_ROWS, False)])
    def test_few_rows_are_folded(self, tmp_path, count, folded):
        parts = DataSources(train=write(tmp_path / "a.jsonl", count), folds=None).read(0)
        assert (parts["validation"] is parts["train"]) == folded
        assert len(parts["train"]) == (count if folded else 340)

    def test_a_share_of_few_rows_that_is_asked_for(self, tmp_path):
        train = write(tmp_path / "a.jsonl", 40)
        parts = DataSources(train, validation_share=0.25, folds=None).read(0)
        assert [len(parts[name]) for name in ("train", "validation")] == [30, 10]

    @pytest.mark.parametrize(
        "changes, words",
        [
            ({"validation_share": 7}, "validation_share=7 must lie between 0 and 1"),
            ({"validation_share": 0.0, "folds": None}, "validation_share=0.0 must lie between 0 and 1"),
            ({"test_share": 1.0}, "test_share=1.0 must lie between 0 and 1"),
            ({"validation_share": 0.2, "folds": 3}, "validation_share=0.2 and folds=3 cannot both be used"),
            (
                {"validation_share": 0.2, "eval": "b.jsonl"},
                r"validation_share=0.2 and .* of b\.jsonl cannot both be used",
            ),
        ],
    )
    def test_shares_that_cannot_be(self, tmp_path, changes, words):
        with pytest.raises(ProbeError, match=words):
            DataSources(write(tmp_path / "a.jsonl", 40), **changes)

    def test_rows_of_their_own_come_first(self, tmp_path):
        train, other = write(tmp_path / "a.jsonl", 20), write(tmp_path / "b.jsonl", 10)
        parts = DataSources(train=train, eval=other, folds=None).read(0)
        assert (len(parts["train"]), len(parts["validation"])) == (20, 10)
        with pytest.raises(ProbeError, match=r"folds=3 and the validation rows of .* cannot both be used"):
            DataSources(train=train, eval=other, folds=3)

    def test_test_rows_before_anything_else(self, tmp_path):
        train = write(tmp_path / "a.jsonl", 40)
        parts = DataSources(train=train, test_share=0.25).read(0)
        assert [len(parts[name]) for name in ("train", "validation", "test")] == [25, 5, 10]
        assert len({text for rows in parts.values() for text in rows.texts}) == 40
        fewer = DataSources(train=train, test_share=0.25, max_rows=9, folds=3).read(0)
        assert fewer["test"].texts == parts["test"].texts and len(fewer["train"]) == 9
        with pytest.raises(ProbeError, match=r"test_share=0.5 and the test rows of .* cannot both be used"):
            DataSources(train=train, test=train, test_share=0.5)

    def test_extra_rows_train_and_do_nothing_else(self, tmp_path, caplog):
        train, extra = write(tmp_path / "a.jsonl", 40), write(tmp_path / "b.jsonl", 60)
        parts = DataSources(train=train, test_share=0.25, extra=[extra]).read(0)
        assert [len(parts[name]) for name in ("train", "validation", "test")] == [25, 5, 10], "as without them"
        judged = {*parts["validation"].texts, *parts["test"].texts}
        assert len(parts["extra"]) == 60 - 15 and not judged & set(parts["extra"].texts)
        with_folds = DataSources(train=train, folds=3, extra=[extra, extra]).read(0)
        assert with_folds["extra"].texts == [f"{('bad', 'good')[i % 2]} no {i}" for i in range(40, 60)] * 2
        fewer = DataSources(train=train, folds=3, extra=[extra, extra], max_extra_rows=7).read(0)["extra"]
        assert len(fewer) == 14 and set(fewer.texts) < set(with_folds["extra"].texts) and len(set(fewer.texts)) == 7

    def test_extra_rows_that_are_all_judged_by(self, tmp_path, caplog):
        train, extra, other = (
            write(tmp_path / f"{name}.jsonl", rows) for name, rows in zip("abc", (40, 20, 60), strict=True)
        )
        with pytest.raises(
            ProbeError, match=r"no rows of .*b\.jsonl are left: all of them are validation or test rows"
        ):
            DataSources(train, folds=3, extra=[extra]).read(0)
        parts = DataSources(train, folds=3, extra=[extra, other]).read(0)
        assert len(parts["extra"]) == 20 and f"20 rows of {extra} are left out" in caplog.text

    @pytest.mark.parametrize(
        ("weights", "reason"),
        [
            ([], "must be numbers"),
            ([-0.1, 1.0], "must be numbers"),
            ([0.0], "not all of them 0"),
            ([float("inf")], "must"),
        ],
    )
    def test_weights_of_extra_rows_that_are_none(self, tmp_path, weights, reason):
        train = write(tmp_path / "a.jsonl", 40)
        with pytest.raises(ProbeError, match=reason):
            DataSources(train=train, extra=[train], extra_weights=weights)
        with pytest.raises(ProbeError, match="are for the rows of extra, and there are none"):
            DataSources(train=train, extra_weights=[0.5])

    def test_extra_rows_of_a_named_data_set_are_read_by_the_order_of_its_labels(self, tmp_path):
        (tmp_path / "advbench").mkdir()
        (tmp_path / "advbench" / "test.jsonl").write_text(json.dumps({"text": "Make a bomb.", "label": 1}))
        (tmp_path / "toxicchat").mkdir()
        write(tmp_path / "toxicchat" / "train.jsonl", 40)
        parts = DataSources(train="toxicchat", extra=["advbench"], data_dir=tmp_path).read(0)
        assert parts["extra"].label_names == parts["train"].label_names and parts["extra"].labels.tolist() == [1]
        (tmp_path / "goemotions").mkdir()
        (tmp_path / "goemotions" / "train.jsonl").write_text(json.dumps({"text": "Wow.", "label": [1, 2]}))
        with pytest.raises(ProbeError, match="goemotions is multi_label_classification, and toxicchat single_label"):
            DataSources(train="toxicchat", extra=["goemotions"], data_dir=tmp_path).read(0)

    @pytest.mark.parametrize(
        "changes, words",
        [
            ({"max_rows": 0}, "max_rows=0 must be at least 1"),
            ({"max_extra_rows": -1}, "max_extra_rows=-1 must be at least 1"),
            ({"label_names": ["no", "yes", ""]}, "none of them empty"),
            ({"label_names": ["no", "no"]}, "must be different names"),
        ],
    )
    def test_what_cannot_be(self, tmp_path, changes, words):
        with pytest.raises(ProbeError, match=words):
            DataSources(train=write(tmp_path / "a.jsonl", 40), **changes)

    def test_one_label_teaches_nothing(self, tmp_path):
        """Two are wanted where a row has one of them; one that holds or not is fine."""
        train, other = write(tmp_path / "a.jsonl", 30, labels=1), write(tmp_path / "b.jsonl", 30)
        for changes in ({}, {"label_names": ["no", "yes"]}, {"folds": 3, "label_names": ["no", "yes"]}):
            with pytest.raises(ProbeError, match=r"all rows to learn from have the label '(LABEL_0|no)'"):
                DataSources(train, **changes).read(0)
        assert "extra" in DataSources(train, extra=[other], folds=3, label_names=["no", "yes"]).read(0)
        (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": f"{i}", "label": [0]}) for i in range(30)))
        assert DataSources(str(tmp_path / "c.jsonl")).read(0)["train"].label_names == ["LABEL_0"]

    def test_slices_without_test_rows(self, tmp_path):
        data = DataSources(train=write(tmp_path / "a.jsonl", 40), slice_columns=["text"])
        with pytest.raises(ProbeError, match="are for test rows, and there are none"):
            data.read(0)

    def test_replies_to_one_prompt_stay_together(self, tmp_path):
        lines = [{"ask": f"number {i // 4}", "text": f"reply {i}", "label": i % 2} for i in range(48)]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
        sources = DataSources(train=str(tmp_path / "a.jsonl"), prompt_column="ask", test_share=0.3)
        parts = sources.read(0)
        asked = {name: {rows[0]["content"] for rows in part.texts} for name, part in parts.items()}
        assert sum(map(len, asked.values())) == 12 == len(set.union(*asked.values()))
        folds = parts["train"].folds(3, 0)
        texts = [{parts["train"].texts[row][0]["content"] for row in fold} for fold in folds]
        assert sum(map(len, texts)) == len(set.union(*texts))

    @pytest.mark.parametrize("count, labels, folds", [(23, 2, 4), (11, 3, 5), (6, 3, 5)])
    def test_each_row_is_held_out_once(self, tmp_path, count, labels, folds):
        sources = DataSources(train=write(tmp_path / "a.jsonl", count, labels), folds=folds)
        rows = sources.read(0)["train"]
        held = rows.folds(sources.folds, 0)
        assert sorted(np.concatenate(held)) == list(range(count)) and len(held) == folds
        if count >= folds * labels:
            assert all(len(set(rows.labels[fold])) > 1 for fold in held), "labels are spread"
        assert all((a == b).all() for a, b in zip(held, rows.folds(sources.folds, 0), strict=True))

    @pytest.mark.parametrize(
        "folds, words", [(1, r"0 .* or at least 2"), (-2, "or at least 2"), (8, "7 different texts are too few for 8")]
    )
    def test_numbers_that_cannot_be(self, tmp_path, folds, words):
        with pytest.raises(ProbeError, match=words):
            DataSources(train=write(tmp_path / "a.jsonl", 7), folds=folds).read(0)["train"].folds(folds, 0)


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

        def run(resume=True, rows=40, **recipe):
            data = DataSources(train=write(tmp_path / f"{rows}.jsonl", rows), label_names=["0", "1"])
            recipe = Recipe(**{"num_train_epochs": 1, **recipe})
            return TrainingRun(
                str(backbone_folder), data, tmp_path / "head", {"probe_type": "gate"}, recipe, resume=resume
            )

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
    for seeds in ([], [-1]):
        with pytest.raises(ProbeError, match="must be whole numbers from 0, and at least one"):
            TrainingRun("demo", DataSources(train=write(tmp_path / "a.jsonl", 40)), tmp_path / "head", seeds=seeds)


def test_half_of_a_checkpoint_is_none(tmp_path):
    assert _last_checkpoint(tmp_path / "none") is None
    for step in (5, 10, 15):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").touch()
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert _last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
