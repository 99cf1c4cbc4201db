"""Runs from a recipe to a head folder: folds, ablations, and resuming after a stop."""

import json
import os
import shutil
import signal
from itertools import count
from unittest.mock import Mock

import pytest
import torch
import yaml
from conftest import make_lm, read_head
from training_runs import recipe_of, train, write

from llama_probe import ProbeError, ProbeTrainer
from llama_probe.backbone.loading import load_backbone
from llama_probe.data.disk_states import DiskStates
from llama_probe.distributed import claimed
from llama_probe.evaluation import transformations
from llama_probe.evaluation.calibration import reliability
from llama_probe.evaluation.metrics import score_logits
from llama_probe.evaluation.prediction import predict_logits
from llama_probe.training import choosing, estimate, measurements, measuring, plan
from llama_probe.training import run as training_run
from llama_probe.training.plan import make_plan
from llama_probe.training.recipe_rows import read_rows
from llama_probe.training.run import train_recipe
from llama_probe.training.run_folder import CHECKPOINTS


pytestmark = pytest.mark.usefixtures("no_plots")


def test_folds(backbone_folder, tmp_path):
    """Every row trains, and is judged by a head that has not seen it."""
    sections = {"validation": {"folds": 2}, "seeds": 2, "seed": 4}
    sections["training"] = {"num_train_epochs": 2, "learning_rate": 0.03}
    place = {"backbone": str(backbone_folder), "output_dir": tmp_path / "head"}
    trainer = ProbeTrainer.from_recipe(recipe_of(tmp_path, 30, **sections), **place)
    assert list(trainer.heads) == [f"seed-{seed}{fold}" for seed in (4, 5) for fold in ("", "-fold-0", "-fold-1")]
    trainer.train()
    results, rows, learned = trainer.results, trainer.plan.rows, trainer.states["train"]
    assert results["data"]["train"]["rows"] == results["data"]["validation"]["rows"] == 30
    assert results["data"]["validation"]["source"] == "2 folds of train"
    assert [run["epochs"] for run in results["runs"]] == [2.0, 2.0], "nothing stops it early"
    chosen = next(run for run in results["runs"] if run["seed"] == results["chosen_seed"])
    name, logits = f"seed-{chosen['seed']}", torch.empty(30, 2)
    for number, fold in enumerate(rows.folds):
        logits[fold] = predict_logits(trainer.heads[f"{name}-fold-{number}"], learned)[fold]
    assert not torch.allclose(predict_logits(trainer.heads[name], learned), logits, atol=1e-3)
    trainer.save_model()
    config = read_head(tmp_path / "head").config
    assert config.temperature == chosen["temperature"] and config.threshold == chosen["threshold"]
    assert chosen["validation"]["f1"] == pytest.approx(score_logits(logits, rows.train.labels, config)["f1"])
    error = reliability(logits, rows.train.labels, config)["error"]
    assert results["inspection"]["calibration"]["error"] == pytest.approx(error, abs=1e-3)
    assert "2 folds" in (tmp_path / "head" / "README.md").read_text()


def test_a_head_of_replies_says_how_soon_it_halts(backbone_folder, tmp_path):
    words = ("fine, all is good", "fine, BAD BAD BAD BAD!")
    lines = [{"ask": f"number {i}?", "text": words[i % 2] + "!" * (i % 3), "label": i % 2} for i in range(100)]
    sections = {
        "train": [{"rows": write(tmp_path / "a.jsonl", lines), "prompt_column": "ask"}],
        "labels": {"names": ["fine", "awful"], "flagged": ["awful"]},
        "head": {"probe_type": "gate", "token_scope": "response"},
        "test": {"share": 0.25},
        "training": {"num_train_epochs": 4, "learning_rate": 0.03, "max_false_positive_rate": 0.02},
    }
    halting = train(tmp_path, backbone_folder, **sections)["runs"][0]["halting"]
    rules = halting["labels"]["awful"]
    assert all(rule["validation"]["false_halts"] <= halting["max_false_halts"] == 0.02 for rule in rules)
    (best,) = [rule for rule in rules if rule["chosen"]]
    assert best["test"]["rows"] == 25 and best["test"]["detected"] > 0.5
    assert best["test"]["delay"]["median"] > len("fine, "), "the two begin alike, a token a letter"
    assert "halted by `awful`" in (tmp_path / "head" / "README.md").read_text()


class TestAblations:
    """An ablation has not learned from the sources that it is measured on, nor from pieces cut from them."""

    @pytest.fixture
    def recipe(self, tmp_path):
        def rows(name, count, label):
            words = [("kind", "BAD!!")[label != (i % 4 == 0)] for i in range(count)]  # some as of the other label
            texts = [f"{word} {name}-{i}" for i, word in enumerate(words)]
            lines = [{"text": text, "label": label, "tone": text[:4].lower()} for text in texts]
            return {"rows": write(tmp_path / f"{name}.jsonl", lines)}

        sources = [rows("ask", 40, 1), rows("list", 30, 1), rows("talk", 80, 0), {**rows("chat", 40, 0), "repeat": 2}]
        return {
            "name": "tiny",
            "labels": {"names": ["harmless", "harmful"], "flagged": ["harmful"]},
            "train": sources,
            "validation": {"share": 0.2},
            "augmentations": {"names": ["lead_in", "earlier_turns"], "share": 0.3},
            "head": {"probe_type": "gate", "token_scope": "user", "layers": [0.5, 1.0, 0.6]},
            "training": {"num_train_epochs": 4, "learning_rate": 0.03},
            "calibration": {"sources": [rows("mild", 60, 0)], "rates": [0.1, 0.05]},
            "hold_out": {"lists": ["list"], "talks": ["talk"]},
            "measure": {
                "sources": [rows("seen", 20, 1), rows("other", 20, 0)],
                "slice_columns": ["tone"],
                "wrappings": "seen",
                "attacks": "seen",
                "quantised": ["int8", "int4"],
            },
        }

    @pytest.mark.slow
    def test_what_is_measured(self, recipe, backbone_folder, tmp_path, monkeypatch):
        monkeypatch.setattr(transformations, "GROUPS", dict.fromkeys(transformations.GROUPS, (2, 2)))
        trainer = ProbeTrainer.from_recipe(recipe, backbone=str(backbone_folder), output_dir=tmp_path / "head")
        assert list(trainer.heads) == ["seed-0", "ablation-lists", "ablation-talks"]
        rows, learned = trainer.plan.rows, trainer.train_dataset

        def rows_of(source, part):
            return [row for row, text in enumerate(part.texts) if f" {source}-" in str(text)]

        for ablation, source in (("lists", "list"), ("talks", "talk")):
            held = rows_of(source, rows.train)
            assert rows.ablations[ablation].left_out == held, "augmentations with a lead-in from these rows as well"
            assert rows.ablations[ablation].excluded_from_validation == rows_of(source, rows.validation)
            by_ablation = learned.learned_by[:, list(trainer.heads).index(f"ablation-{ablation}")]
            assert sorted({row for row, learns in zip(learned.rows, by_ablation, strict=True) if not learns}) == held
        assert max(map(learned.rows.count, learned.rows)) == 2, "repeated rows"
        trainer.train()
        trainer.save_model()
        measured = trainer.results["measured"]
        assert [(part["name"], part["ablation"], part["rows"]) for part in measured["parts"]] == [
            ("seen", None, 20), ("other", None, 20), ("list", "lists", 30), ("talk", "talks", 80),
            ("seen, int8 copy of the backbone", None, 20), ("seen, int4 copy of the backbone", None, 20),
        ]  # fmt: skip
        assert measured["rates"] == ["fpr-10%", "fpr-5%"] and measured["wrappings"]["rows"]
        for attacks in (measured[group] for group in transformations.ATTACKS):
            assert attacks["rows"] == 2 and attacks["kept"].keys() == attacks["tfidf"]["kept"].keys()
            assert attacks["length"]["kept"].keys() == attacks["length"]["alarms"].keys()
        shares = {part["name"]: part for part in measured["parts"]}
        assert set(shares["list"]["labels"]) == {"harmful"} and set(shares["talk"]["labels"]) == {"harmless"}
        harmful = shares["list"]["labels"]["harmful"]
        assert harmful["fpr-10%"]["share"] >= harmful["fpr-5%"]["share"] and "tfidf" in shares["seen"]
        by_tone = shares["list"]["slices"]["tone"]
        counts = {tone: part["labels"]["harmful"]["rows"] for tone, part in by_tone.items()}
        assert counts == {"bad!": 22, "kind": 8} and "slices" not in shares["seen, int8 copy of the backbone"]
        whole, int8 = (shares[name]["labels"]["harmful"]["fpr-10%"]["share"] for name in list(shares)[::4])
        assert abs(whole - int8) <= 0.1, "int8 weights change little"
        assert trainer.chosen.head.backbone is trainer.plan.lm
        saved = read_head(tmp_path / "head")
        assert saved.config.layers == [2, 4] and saved.config.thresholds.keys() == {"fpr-10%", "fpr-5%"}
        assert saved.results["measured"] == measured and saved.results["data"]["calibration"]["rows"] == 60
        card = (tmp_path / "head" / "README.md").read_text()
        for line in (
            "On rows that it was not trained on",
            "| rot13 | 2 |",
            "| list (ablation trained without lists) | harmful | 30 |",
            "| list (ablation trained without lists), by tone | harmful | flagged at fpr-10% | AUROC |",
            "| bad! | 22 |",
        ):
            assert line in card
        written = (tmp_path / "head" / "recipe.yaml").read_text()
        assert yaml.safe_load(written)["hold_out"] == recipe["hold_out"] and str(tmp_path) not in written

    def test_several_labels_are_measured_one_by_one(self, backbone_folder, tmp_path):
        def rows(name, labels, known=None):
            texts = [(f"{''.join(words) or 'none'} {name}-{i}", words) for i in range(16) for words in labels]
            lines = [{"text": text, "label": words} for text, words in texts]
            return {"rows": write(tmp_path / f"{name}.jsonl", lines), "known_labels": known}

        one = rows("one", [[], ["RED"], ["big"]])
        two = rows("two", [[], ["RED"]], ["RED"])
        three = rows("three", [[], ["big"]])
        sections = {
            "labels": {"names": ["RED", "big"], "problem_type": "multi_label_classification", "flagged": ["RED"]},
            "train": [one, two, three],
            "validation": {"share": 0.2},
            "hold_out": {"colours": ["two"], "sizes": ["three"]},
            "measure": {"sources": [{**rows("unlabelled", [[]], []), "label": []}], "wrappings": "unlabelled"},
        }
        measured = train(tmp_path, backbone_folder, **sections)["measured"]
        unlabelled, colours, sizes = measured["parts"]
        assert unlabelled["labels"] == {} and unlabelled["auroc"] is None and measured["wrappings"]["rows"] == 16
        assert measured["rates"] == [] and set(colours["labels"]) == {"RED"}, "nobody has said what is big"
        assert set(sizes["labels"]) == {"big"} and sizes["labels"]["big"]["rows"] == 16 < sizes["rows"] == 32
        for part, label in ((colours, "RED"), (sizes, "big")):
            assert part["labels"][label]["auroc"] == part["auroc"], "of the only label that some rows have"
            assert part["tfidf"]["labels"][label]["auroc"] == 1, "a word tells it"
        card = (tmp_path / "head" / "README.md").read_text()
        assert "| three (ablation trained without sizes) | big | 16 | " in card
        assert "flagged at each threshold" not in card

    def test_a_loaded_backbone(self, recipe, backbone_folder, tmp_path, monkeypatch, hub, token):
        lm, tokenizer = load_backbone(str(backbone_folder))
        settings = ["hold_out={}", "measure={}", "training.num_train_epochs=1"]
        given = {"recipe": recipe, "backbone": lm, "settings": settings, "output_dir": "~/head"}
        monkeypatch.setenv("HOME", str(tmp_path))
        trainer = ProbeTrainer.from_recipe(**given, processing_class=tokenizer)
        assert isinstance(trainer, ProbeTrainer)
        trainer.train()
        assert trainer.predict([("Go!", "harmless"), ("Kill!", "harmful")]).predictions.shape == (2, 1, 2)
        trainer.save_model(tmp_path / "other")
        assert read_head(tmp_path / "other").config.layers == [2, 4] == read_head(tmp_path / "head").config.layers
        assert not (tmp_path / "head" / CHECKPOINTS).exists(), "the head alone"
        write(log := tmp_path / "head" / CHECKPOINTS / "runs" / "events", 1)  # as TensorBoard does
        trainer.push_to_hub()
        assert list(hub.repositories) == ["alice/head"] and log.is_file()
        for more, named in (({}, "processing_class"), ({"settings": ["licence=free"]}, "licence")):
            with pytest.raises(ProbeError, match=named):
                ProbeTrainer.from_recipe(**given | more)


class TestResuming:
    @pytest.fixture
    def stopped(self, backbone_folder, tmp_path, monkeypatch):
        """A run that was stopped after its training, and a function that resumes it with changes."""
        shutil.copytree(backbone_folder, tmp_path / "backbone")

        def resumed(resume=True, rows=40, **changes):
            return train(tmp_path, tmp_path / "backbone", rows, resume, training=changes)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(training_run, "choose", Mock(side_effect=KeyboardInterrupt))
            resumed(resume=False)
        assert list((tmp_path / "head" / CHECKPOINTS).glob("checkpoint-*"))
        assert (tmp_path / "head" / ".states").is_dir()
        return resumed

    def test_the_same_training(self, stopped, backbone_folder, tmp_path, monkeypatch):
        with pytest.raises(ProbeError, match=r"stopped run.*--resume"):
            train_recipe(recipe_of(tmp_path), str(backbone_folder), tmp_path / "head")
        monkeypatch.setattr(ProbeTrainer, "training_step", lambda *_: pytest.fail("nothing is left to train"))
        assert stopped()["runs"]
        assert not (tmp_path / "head" / CHECKPOINTS).exists() and not (tmp_path / "head" / ".states").exists()

    def test_a_stopped_run_in_the_folder_is_named(self, stopped, backbone_folder, tmp_path, caplog):
        place = {"backbone": str(backbone_folder), "output_dir": tmp_path / "head"}
        for resumes in (True, False):
            ProbeTrainer.from_recipe(recipe_of(tmp_path), **place).train(resume_from_checkpoint=resumes)
            assert ("/checkpoint-3 is of an earlier run: train(" in caplog.text) != resumes

    def test_before_the_first_checkpoint(self, backbone_folder, tmp_path, monkeypatch):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(ProbeTrainer, "training_step", Mock(side_effect=KeyboardInterrupt))
            train(tmp_path, backbone_folder)
        assert train(tmp_path, backbone_folder, resume=True)["runs"]

    def test_another_training_is_refused(self, stopped, tmp_path):
        for changes, name in (({"learning_rate": 0.5}, "learning_rate"), ({"rows": 42}, "train")):
            with pytest.raises(ProbeError, match=name):
                stopped(**changes)
        assert list((tmp_path / "head" / ".states").rglob("*.safetensors")), "of the run that can be resumed"
        make_lm(seed=1, vocab_size=260).save_pretrained(tmp_path / "backbone")
        with pytest.raises(ProbeError, match="backbone_weights"):
            stopped()
        assert not (tmp_path / "head" / "probe_config.json").exists()
        stopped(resume=False, learning_rate=0.5)
        assert (tmp_path / "head" / "probe_config.json").exists()


class TestMeasuring:
    """A run that ends while it measures leaves its head, and a resumed run measures the rest."""

    @pytest.fixture(scope="class")
    def place(self, tmp_path_factory):
        return tmp_path_factory.mktemp("measuring")

    @pytest.fixture(scope="class")
    def run(self, backbone_folder, place):
        """A function that starts or resumes a run with three things to measure."""
        sources = [{"rows": write(place / f"{name}.jsonl", 12, (f"{name}?", f"{name}!"))} for name in "abc"]

        def start(resume=False):
            settings = {"num_train_epochs": 2, "save_strategy": "no"}
            return train(
                place, backbone_folder, resume=resume, training=settings, test={"share": 0.2},
                measure={"sources": sources, "wrappings": "b"},
            )  # fmt: skip

        return start

    @pytest.fixture(scope="class")
    def expected(self, run):
        """The results of a run that is not interrupted."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("llama_probe.evaluation.plots.find_spec", lambda name: None)
            return run()

    @pytest.fixture
    def head(self, expected, place):
        """The folder of the head, with nothing in it."""
        shutil.rmtree(place / "head")
        return place / "head"

    def is_left(self, folder):
        assert read_head(folder).config.threshold is not None and "flag" in (folder / "README.md").read_text()
        assert list((folder / ".states").rglob("*.safetensors")), "the states"
        return read_head(folder).results

    def assert_resumes(self, run, expected, monkeypatch, measured):
        """Resume, and compare the parts that are measured then, and all results."""
        parts, measure_part = [], measurements._measure_part
        counted = lambda *given: parts.append(given[2].texts[0][0]) or measure_part(*given)  # noqa: E731
        monkeypatch.setattr(measurements, "_measure_part", counted)
        monkeypatch.setattr(ProbeTrainer, "training_step", lambda *_: pytest.fail("it is trained already"))
        assert json.loads(json.dumps(run(resume=True))) == json.loads(json.dumps(expected))
        assert parts == measured

    def fail_at(self, number, fail):
        """A `_measure_part` that fails at the part with a number."""
        numbers, measure_part = count(), measurements._measure_part
        return lambda *given: fail() if next(numbers) == number else measure_part(*given)

    @pytest.mark.parametrize("step", ["compute_states", "train", "choose", "save", "measure"])
    def test_a_stop_before_each_step(self, step, run, expected, head, monkeypatch):
        """No step that has ended is done again, and the head is written before it is measured."""
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(training_run, step, Mock(side_effect=KeyboardInterrupt))
            run()
        assert (head / "probe_config.json").exists() == (step == "measure")
        if step != "compute_states":
            monkeypatch.setattr(DiskStates, "_compute", lambda *_: pytest.fail("the states are there already"))
        if step not in ("compute_states", "train"):
            monkeypatch.setattr(ProbeTrainer, "training_step", lambda *_: pytest.fail("it is trained already"))
        assert json.loads(json.dumps(run(resume=True))) == json.loads(json.dumps(expected))
        assert not (head / ".states").exists() and not (head / CHECKPOINTS).exists()

    def test_an_exception_in_the_middle(self, run, expected, head, place, monkeypatch, caplog):
        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="out of order"):
            fail = Mock(side_effect=RuntimeError("out of order"))
            patched.setattr(measurements, "_measure_part", self.fail_at(1, fail))
            run()
        assert "--resume" in caplog.text
        left = self.is_left(head)
        assert [part["name"] for part in left["measured"]["parts"]] == ["a"] and left["summary"]["test"]
        with pytest.raises(ProbeError, match=r"stopped run.*--resume"):
            train_recipe(recipe_of(place), "never-loaded", head)
        self.assert_resumes(run, expected, monkeypatch, ["b", "c"])
        assert not (head / ".states").exists() and not (head / CHECKPOINTS).exists()

    def test_a_kill(self, run, expected, head, monkeypatch):
        kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        child = os.fork()
        if child == 0:
            try:
                measurements._measure_part = self.fail_at(2, kill)
                run()
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert [part["name"] for part in self.is_left(head)["measured"]["parts"]] == ["a", "b"]
        self.assert_resumes(run, expected, monkeypatch, ["c"])

    def test_on_the_test_rows(self, run, expected, head, monkeypatch):
        with monkeypatch.context() as patched, pytest.raises(MemoryError):
            patched.setattr(measuring, "report", Mock(side_effect=MemoryError))
            run()
        assert "measured" not in self.is_left(head)
        self.assert_resumes(run, expected, monkeypatch, ["a", "b", "c"])

    def test_a_form_that_needs_too_much_memory_is_told(self, backbone_folder, tmp_path, monkeypatch, caplog):
        errors = {"int8": MemoryError(), "int4": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")}

        def quantised(_, form):
            assert read_head(tmp_path / "head").config.threshold is not None, "it is saved before anything is copied"
            raise errors[form]

        monkeypatch.setattr(measurements, "quantised", quantised)
        sources = [write(tmp_path / "a.jsonl", 20, ("a?", "a!"))]
        measure = {"sources": sources, "quantised": ["int8", "int4"]}
        measured = train(tmp_path, backbone_folder, measure=measure)["measured"]
        assert [part["name"] for part in measured["parts"]] == ["a"] and "9 GiB" in caplog.text
        assert "the int8 copy of the backbone is not measured" in caplog.text


def test_folders_of_ones_own_stay_where_the_training_fails(backbone_folder, tmp_path, monkeypatch):
    (tmp_path / "head" / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr(training_run, "choose", Mock(side_effect=RuntimeError("out of order")))
    with pytest.raises(RuntimeError, match="out of order"):
        train(tmp_path, backbone_folder)
    assert (tmp_path / "head" / ".states").exists() and (tmp_path / "head" / "checkpoints").is_dir()


def test_a_second_run_into_the_same_folder_is_refused(tmp_path):
    with claimed(tmp_path / "head"), pytest.raises(ProbeError, match="another run"):
        train(tmp_path)


@pytest.mark.parametrize(
    "sections, named",
    [
        # A metric that is not defined on the validation rows.
        ({"validation": {"sources": ["alike.jsonl"]}}, "auprc"),
        ({"training": {"class_weights": "nan,1"}}, "class_weights"),
        ({"training": {"class_weights": "a,b"}}, "class_weights"),
        ({"head": {"layers": [0.5, 7.5]}}, r"layers.*7\.5"),
        ({"head": {"probe_type": "mha", "downcast": 5}}, "downcast"),
        ({"train": [{"rows": "40.jsonl", "weights": [0.0, 0.25]}]}, "weights"),
        ({"training": {"lr": 1}}, "lr"),
        ({"training": {"output_dir": 1}}, "output_dir"),
        ({"training": {"lr_scheduler_type": "cosine_with_min_lr"}}, "training: .*min_lr"),
        ({"training": {"report_to": "foo"}}, "training: foo"),
        ({"training": {"cache_states": True}}, "cache_states"),
        ({"calibration": {"sources": ["40.jsonl"], "rates": [0.01]}}, "at least 100 rows"),
        ({"measure": {"sources": ["40.jsonl"], "attacks": "40"}, "head": {"prompt_format": "raw"}}, "measure.attacks"),
    ],
)
def test_refused_before_the_backbone_is_loaded(tmp_path, backbone_folder, monkeypatch, sections, named):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "alike.jsonl", 1)
    monkeypatch.setattr(plan, "load_backbone", lambda *_: pytest.fail("refused after the backbone loads"))
    monkeypatch.setattr(estimate, "free_bytes", lambda _: 1000)
    with pytest.raises(ProbeError, match=named):
        train(tmp_path, backbone_folder, **sections)
    assert not (tmp_path / "head").exists(), "before any work"


def test_a_training_that_diverges(tmp_path, backbone_folder):
    with pytest.raises(ProbeError, match=r"no.* numbers?"):
        train(tmp_path, backbone_folder, training={"num_train_epochs": 2, "learning_rate": 1e38})


def test_states_are_cached_if_they_fit_or_are_there(tmp_path, backbone_folder, monkeypatch, caplog):
    """Those of other rows take room, though they are in the same folder."""
    kept = {"cache_dir": str(tmp_path / "kept")}
    train(tmp_path, backbone_folder, training=kept)
    monkeypatch.setattr(estimate, "free_bytes", lambda _: 1000)
    for rows, passes in ((40, 0.0), (60, 2.0)):
        recipe = recipe_of(tmp_path, rows, kept)
        planned = make_plan(recipe, read_rows(recipe), tmp_path / "b", str(backbone_folder)).estimate
        assert planned.passes == passes and planned.rows == rows and not planned.bytes
        assert not (tmp_path / "b").exists()
    assert train(tmp_path, backbone_folder, rows)["runs"] and "no hidden states on disk" in caplog.text


def test_rates_without_a_threshold_are_left_out(backbone_folder, tmp_path, monkeypatch):
    odds = torch.tensor([2e4, 1e4, 3.0, 2.0, 1.0, *[-1.0] * 95])  # the first two have the probability 1
    monkeypatch.setattr(choosing, "predict_logits", lambda *_: torch.stack([0 * odds, odds], dim=1))
    calm = write(tmp_path / "calm.jsonl", 100, words=("calm",))
    for rates, fitted in (([0.05, 0.01], {"fpr-5%": 0.05}), ([0.01], None)):
        results = train(tmp_path, backbone_folder, calibration={"sources": [calm], "rates": rates})
        config = read_head(tmp_path / "head").config
        assert results.get("thresholds_from", {"rates": None})["rates"] == fitted
        assert config.thresholds == (fitted and {"fpr-5%": config.threshold})
