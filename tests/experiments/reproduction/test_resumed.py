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


@pytest.fixture
def other_weights(monkeypatch):
    """A function that exchanges the weights of the backbone."""
    return lambda: monkeypatch.setattr(Workbench, "weights", "0" * 16)


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


def test_other_settings_are_refused(reproduction, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(Workbench, "_loaded", property(lambda self: pytest.fail("refused after the backbone loads")))
    with pytest.raises(ProbeError, match=r"max_rows=None \(now 20\)"):
        reproduction(max_rows=20).execute()
    (tmp_path / "out" / "parts" / "main" / "toxicchat" / "tfidf.json").write_text("{")
    with pytest.raises(ProbeError, match=r"tfidf\.json is damaged"):
        reproduction(chosen=["tfidf"]).execute()


@pytest.mark.parametrize(
    "name, only, part",
    [("toxicchat/train", "main", "main/toxicchat/"), ("xstest/test", "ood", "ood/toxicchat/xstest/")],
)
def test_other_rows_of_the_same_name_are_refused(reproduction, finished, copies, tmp_path, name, only, part):
    other = other_copies(copies, tmp_path / "other", name)
    with pytest.raises(ProbeError, match=rf"{part}\w+\.json.*rows\.t"):
        reproduction(chosen=["gate", "tfidf"], only=[only], copies=other).execute()


def test_another_sweep_is_refused(reproduction, finished, tmp_path, monkeypatch):
    (tmp_path / "out" / "parts" / "sensitivity.json").unlink()
    monkeypatch.setattr(f"{MODULES}.reproduction.Sweep", lambda *args, **kwargs: pytest.fail("it was finished"))
    for changes, told in (({"trials": 4}, r"trials=2 \(now 4\)"), ({"patience": 1}, r"patience=3 \(now 1\)")):
        with pytest.raises(ProbeError, match=rf"out/sweep/.*{told}"):
            reproduction(only=["sensitivity"], **{"trials": 2, **changes}).execute()
    found = reproduction(only=["sensitivity"], trials=2).execute()["sensitivity"]
    assert found == finished["sensitivity"]


def test_another_backbone_of_the_same_name_is_refused(reproduction, finished, tmp_path, other_weights):
    parts = tmp_path / "out" / "parts"
    other_weights()
    with pytest.raises(ProbeError, match=r"backbone\.json.*backbone_weights"):
        reproduction(chosen=["gate"], only=["layers"]).execute()
    (parts / "backbone.json").unlink()
    with pytest.raises(ProbeError, match=r"main/toxicchat/gate\.json.*backbone_weights"):
        reproduction(chosen=["gate"]).execute()
    shutil.rmtree(parts)
    with pytest.raises(ProbeError, match=r"out/sweep/.*weights"):
        reproduction(only=["sensitivity"], trials=2).execute()


def test_parts_of_an_earlier_version_are_read(reproduction, finished, tmp_path, caplog):
    """It did not write the weights of the backbone."""
    parts = tmp_path / "out" / "parts"
    for path in [*parts.rglob("*.json"), tmp_path / "out" / "sweep" / "settings.json"]:
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "weights"}))
    (parts / "sensitivity.json").unlink()
    again = reproduction(chosen=["gate"], only=["main", "sensitivity"], trials=2).execute()
    assert again["main"]["toxicchat"]["gate"] == finished["main"]["toxicchat"]["gate"]
    assert again["sensitivity"] == finished["sensitivity"] and "taken to be those at hand" in caplog.text


@pytest.mark.parametrize("other, expected", [(None, []), ("weights", [0, 1]), ("rows", [0, 1])])
def test_a_checkpoint_is_resumed_on_the_same_rows_and_backbone(
    reproduction, copies, tmp_path, monkeypatch, other_weights, epochs, other, expected
):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(f"{MODULES}.comparison.predict_together", lambda *args, **kwargs: 1 / 0)
        reproduction(chosen=["gate"], seeds=[0]).execute()
    shutil.rmtree(tmp_path / "out" / "parts")
    epochs.clear()
    if other == "weights":
        other_weights()
    if other == "rows":
        copies = other_copies(copies, tmp_path / "other", "toxicchat/train")
    reproduction(chosen=["gate"], seeds=[0], copies=copies).execute()
    assert epochs == expected
