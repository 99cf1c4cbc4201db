"""Stopped reproductions resume exactly. Parts with other settings, rows or weights are refused."""

import gzip
import json
import shutil
from importlib import import_module
from operator import attrgetter

import pytest
from reproduction_fixture import FAST

from llama_probe import ProbeError
from llama_probe.experiments.reproduction.workbench import Workbench
from llama_probe.training.shared import SharedTraining


MODULES = "llama_probe.experiments.reproduction"


@pytest.fixture
def epochs(monkeypatch):
    """Epochs that are trained from now on."""
    found, original = [], SharedTraining._train_epoch
    monkeypatch.setattr(SharedTraining, "_train_epoch", lambda self: (found.append(self.epoch), original(self))[1])
    return found


def other_copies(copies, folder, name):
    """Local copies of the data sets in which one has other labels."""
    shutil.copytree(copies, folder)
    rows = [json.loads(line) for line in gzip.decompress((folder / f"{name}.jsonl.gz").read_bytes()).splitlines()]
    text = "".join(json.dumps({**row, "label": 1 - row["label"]}) + "\n" for row in rows)
    (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def test_a_killed_run_resumes(reproduction, everything, tmp_path, monkeypatch, epochs):
    """Its heads are those that a run of more methods trains in one go: results do not depend on methods beside them."""
    whole = {name: everything[0]["main"]["toxicchat"][name] for name in FAST}
    original = SharedTraining._train_epoch

    def die(training):
        if training.epoch == 1:
            raise KeyboardInterrupt
        original(training)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SharedTraining, "_train_epoch", die)
        reproduction().execute()
    assert "Not finished" in (tmp_path / "out" / "report.md").read_text()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):  # the heads are finished now
        patch.setattr(f"{MODULES}.baselines.fit_prototypes", lambda *args: 1 / 0)
        reproduction().execute()
    assert epochs == [0, 1]
    assert reproduction().execute()["main"]["toxicchat"] == whole
    monkeypatch.setattr(Workbench, "dataset", lambda *args: pytest.fail("nothing is left to do"))
    assert reproduction().execute()["main"]["toxicchat"] == whole and epochs == [0, 1]


@pytest.mark.parametrize(
    "method, only, work",
    [
        ("few-shot", "main", "baselines.draw_examples"),
        ("gate", "few-labels", "learning_curves.SharedTraining.run_unseen"),
    ],
)
def test_a_finished_seed_is_not_done_again(reproduction, everything, tmp_path, monkeypatch, method, only, work):
    module, *names = work.split(".")
    original, calls = attrgetter(".".join(names))(import_module(f"{MODULES}.{module}")), []

    def count(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(f"{MODULES}.{work}", count)
    with pytest.raises(KeyboardInterrupt):
        reproduction(chosen=[method], only=[only]).execute()
    key = only.replace("-", "_")
    found = reproduction(chosen=[method], only=[only]).execute()[key]["toxicchat"][method]
    assert found == everything[0][key]["toxicchat"][method] and len(calls) == 3
    assert not any((tmp_path / "out" / "training").iterdir())


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"max_rows": 20}, r"run\.json.*max_rows=None \(now 20\)"),
        ({"patience": 1}, r"run\.json.*patience=3 \(now 1\)"),
        ({"only": ["sensitivity"], "trials": 4}, r"sensitivity\.json.*trials=2 \(now 4\)"),
        ({"other": "toxicchat/train"}, r"rows-toxicchat\.json.*train="),
    ],
)
def test_other_settings_and_rows_are_refused(reproduction, finished, copies, tmp_path, monkeypatch, changes, told):
    monkeypatch.setattr(Workbench, "_loaded", property(lambda self: pytest.fail("refused after the backbone loads")))
    if "other" in changes:
        changes = {"copies": other_copies(copies, tmp_path / "other", changes["other"])}
    with pytest.raises(ProbeError, match=told):
        reproduction(**changes).execute()


def test_other_rows_of_a_test_set_are_refused(reproduction, finished, copies, tmp_path):
    other = other_copies(copies, tmp_path / "other", "xstest/test")
    with pytest.raises(ProbeError, match=r"test-xstest\.json"):
        reproduction(chosen=["gate", "tfidf"], only=["ood"], copies=other).execute()


def test_another_backbone_of_the_same_name_is_refused(reproduction, finished, monkeypatch):
    monkeypatch.setattr(Workbench, "weights", "0" * 16)
    with pytest.raises(ProbeError, match=r"weights\.json"):
        reproduction(chosen=["gate"], only=["layers"]).execute()


def test_a_wrong_backbone_leaves_no_settings(reproduction, tmp_path, monkeypatch):
    """Else the mended command would be refused."""
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Workbench, "_loaded", property(lambda self: 1 / 0))
        reproduction().execute()
    assert not (tmp_path / "out" / "settings").exists()
