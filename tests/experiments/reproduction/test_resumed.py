"""Reproductions that were stopped go on, and what was made otherwise, or of something else, is refused."""

import gzip
import json
import shutil
from importlib import import_module
from operator import attrgetter

import pytest
from conftest import make_lm

from llama_probe import ProbeError
from llama_probe.experiments.reproduction.workbench import Workbench
from llama_probe.training.shared import SharedTraining


def numbers(result):
    """A result without what it cost."""
    return {name: part for name, part in result.items() if name not in ("seconds", "command")}


def test_a_killed_run_goes_on(reproduction, tmp_path, monkeypatch):
    whole = reproduction("whole").execute()
    original = SharedTraining._train_epoch

    def die(training):
        if training.epoch == 1:
            raise KeyboardInterrupt
        original(training)

    with monkeypatch.context() as patch:
        patch.setattr(SharedTraining, "_train_epoch", die)
        with pytest.raises(KeyboardInterrupt):
            reproduction("cut").execute()
    assert "Not finished" in (tmp_path / "cut" / "report.md").read_text()
    with monkeypatch.context() as patch:  # the heads are finished now, a baseline is not
        patch.setattr("llama_probe.experiments.reproduction.baselines.fit_prototypes", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reproduction("cut").execute()
    resumed = reproduction("cut")
    monkeypatch.setattr(SharedTraining, "run", lambda *args, **kwargs: pytest.fail("heads are trained again"))
    assert numbers(resumed.execute()) == numbers(whole)
    monkeypatch.setattr(Workbench, "dataset", lambda *args: pytest.fail("nothing is left to do"))
    assert numbers(reproduction("cut").execute()) == numbers(whole)


@pytest.mark.parametrize(
    "method, only, work",
    [
        ("few-shot", "main", "baselines.draw_examples"),
        ("gate", "few-labels", "learning_curves.SharedTraining.run_unseen"),
    ],
)
def test_a_seed_that_is_finished_is_not_done_again(reproduction, tmp_path, monkeypatch, method, only, work):
    setup = {"chosen": [method], "only": [only], "seeds": (0, 1, 2)}
    whole = reproduction("whole", **setup).execute()
    module, *names = work.split(".")
    target = f"llama_probe.experiments.reproduction.{work}"
    original, calls = attrgetter(".".join(names))(import_module(f"llama_probe.experiments.reproduction.{module}")), []

    def count(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(target, count)
    with pytest.raises(KeyboardInterrupt):
        reproduction("cut", **setup).execute()
    assert numbers(reproduction("cut", **setup).execute()) == numbers(whole) and len(calls) == 4
    assert not any((tmp_path / "cut" / "training").iterdir())


def test_results_do_not_depend_on_what_is_trained_beside(reproduction):
    together = reproduction("both", chosen=["pooling", "gate"]).execute()["main"]["toxicchat"]
    reproduction("one", chosen=["gate"]).execute()
    added = reproduction("one", chosen=["pooling", "gate"]).execute()["main"]["toxicchat"]
    assert added == together


def test_other_settings_are_refused(reproduction, tmp_path, monkeypatch):
    reproduction(chosen=["tfidf"]).execute()
    monkeypatch.setattr(Workbench, "_loaded", property(lambda self: pytest.fail("refused after the backbone loads")))
    with pytest.raises(ProbeError, match=r"was made with other settings: max_rows=None \(now 20\).*another --output"):
        reproduction(chosen=["tfidf", "gate"], max_rows=20).execute()
    (tmp_path / "out" / "parts" / "main" / "toxicchat" / "tfidf.json").write_text("{")
    with pytest.raises(ProbeError, match="is damaged"):
        reproduction(chosen=["tfidf"]).execute()


def test_other_rows_of_the_same_name_are_refused(reproduction, copies, tmp_path):
    chosen = {"chosen": ["gate", "tfidf"], "seeds": [0]}
    reproduction(**chosen, only=["main", "ood"]).execute()
    for name, only, part in (
        ("toxicchat/train", "main", "main/toxicchat/"),
        ("xstest/test", "ood", "ood/toxicchat/xstest/"),
    ):
        other = tmp_path / name.split("/")[0]
        shutil.copytree(copies, other)
        rows = [json.loads(line) for line in gzip.decompress((other / f"{name}.jsonl.gz").read_bytes()).splitlines()]
        text = "".join(json.dumps({**row, "label": 1 - row["label"]}) + "\n" for row in rows)
        (other / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        again = reproduction(**chosen, only=[only])
        again.bench.data_dir = other
        with pytest.raises(ProbeError, match=rf"{part}\w+.json was made with other settings: rows=.*another --output"):
            again.execute()
    reproduction(**chosen, only=["main", "ood"]).execute()


@pytest.fixture
def backbone(backbone_folder, tmp_path):
    """A copy, and what exchanges its weights for others."""
    folder = tmp_path / "backbone"
    shutil.copytree(backbone_folder, folder)
    return folder, lambda: make_lm(seed=1, vocab_size=260).save_pretrained(folder)


def test_another_backbone_of_the_same_name_is_refused(reproduction, backbone, tmp_path):
    folder, exchange = backbone

    def run(**changes):
        return reproduction(chosen=["gate"], seeds=[0], trials=1, backbone=folder, **changes).execute()

    first = run(only=["main", "sensitivity"])
    exchange()
    for only in ("main", "layers"):
        with pytest.raises(
            ProbeError, match=r"backbone.json was made on another backbone .* --output, or remove .*parts"
        ):
            run(only=[only])
    (tmp_path / "out" / "parts" / "backbone.json").unlink()
    with pytest.raises(ProbeError, match=r"main/toxicchat/gate.json was made on another backbone of this name"):
        run(only=["main"])
    shutil.rmtree(tmp_path / "out" / "parts")
    with pytest.raises(ProbeError, match="out/sweep holds a sweep that was made with other settings: weights="):
        run(only=["sensitivity"])
    shutil.rmtree(tmp_path / "out" / "sweep")
    assert run(only=["main", "sensitivity"])["main"] != first["main"]


def test_what_an_earlier_version_has_finished_is_read(reproduction, tmp_path, caplog):
    """It did not note the weights of the backbone."""
    first = reproduction(chosen=["gate"], only=["main", "sensitivity"], trials=1).execute()
    for path in [*(tmp_path / "out" / "parts").rglob("*.json"), tmp_path / "out" / "sweep" / "settings.json"]:
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "weights"}))
    (tmp_path / "out" / "parts" / "sensitivity.json").unlink()
    again = reproduction(chosen=["gate"], only=["main", "sensitivity"], trials=1).execute()
    assert numbers(again) == numbers(first) and "parts are taken to be made on those at hand" in caplog.text


def test_a_checkpoint_of_another_backbone_is_not_gone_on_from(reproduction, backbone, tmp_path, monkeypatch):
    folder, exchange = backbone

    def run():
        return reproduction(chosen=["gate"], seeds=[0], backbone=folder).execute()

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(
            "llama_probe.experiments.reproduction.comparison.predict_together", lambda *args, **kwargs: 1 / 0
        )
        run()
    exchange()
    shutil.rmtree(tmp_path / "out" / "parts")
    epochs = []
    original = SharedTraining._train_epoch
    monkeypatch.setattr(SharedTraining, "_train_epoch", lambda self: (epochs.append(self.epoch), original(self))[1])
    run()
    assert epochs == [0, 1]


def test_a_checkpoint_of_other_rows_is_not_gone_on_from(reproduction, copies, tmp_path, monkeypatch):
    def run(data_dir):
        wanted = reproduction(chosen=["gate"], seeds=[0])
        wanted.bench.data_dir = data_dir
        return wanted.execute()

    other = tmp_path / "other"
    shutil.copytree(copies, other)
    shutil.copy(copies / "toxicchat" / "test.jsonl.gz", other / "toxicchat" / "train.jsonl.gz")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(
            "llama_probe.experiments.reproduction.comparison.predict_together", lambda *args, **kwargs: 1 / 0
        )
        run(copies)
    epochs = []
    original = SharedTraining._train_epoch
    monkeypatch.setattr(SharedTraining, "_train_epoch", lambda self: (epochs.append(self.epoch), original(self))[1])
    run(other)
    assert epochs == [0, 1]
