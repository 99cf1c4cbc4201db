"""The paper's tables for a backbone at hand: the report says what the numbers say, and wrong options are refused early."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import read_head
from reproduction_fixture import ALL

from llama_probe import ProbeError
from llama_probe.data.sources import DataSources
from llama_probe.experiments import paper
from llama_probe.experiments.reproduction.report import columns
from llama_probe.experiments.reproduction.reproduction import TEST_SETS
from llama_probe.experiments.reproduction.workbench import Workbench
from llama_probe.training.shared import SharedTraining


def section(text, source):
    return text.split(f"\n`{source}`:")[1].split("\n## ")[0]


def dig(value, path):
    for key in path:
        value = value[key]
    return value


@pytest.mark.parametrize("source, count", [("toxicchat", 4), ("emotion", 2)])
def test_the_main_tables(everything, source, count):
    report, output = everything
    text = section((output / "report.md").read_text(), source)
    assert list(report["main"][source]) == sorted(ALL, key=list(report["main"][source]).index)
    for name, result in report["main"][source].items():
        seeded = name not in ("tfidf", "prototypes", "zero-shot")
        assert [run["seed"] for run in result["runs"]] == ([0, 1] if seeded else [None])
        line = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        shown = [part.strip() for part in line.strip("|").split("|")][2 : 2 + count]
        for cell, column in zip(shown, columns(source), strict=True):
            values = [dig(run["test"], column.path) for run in result["runs"]]
            expected = f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if seeded else "")
            assert cell == expected, (name, column.title)


def test_the_other_parts(everything):
    report, output = everything
    text = (output / "report.md").read_text()
    assert json.loads((output / "report.json").read_text()) == json.loads(json.dumps(report))
    assert not (output / ".states").exists() and not any((output / "training").iterdir())
    toxic = report["main"]["toxicchat"]
    assert 0 <= toxic["layer-linear"]["runs"][0]["layer"] <= 4
    assert toxic["few-shot"]["runs"][0]["label_tokens"] in ("sum", "mean")
    human = toxic["gate"]["runs"][0]["test"]["slices"]["human_annotation"]
    assert human["True"]["rows"] == human["False"]["rows"] == 6
    head = read_head(output / "heads" / "toxicchat" / "mha-seed-1")
    assert head.config.threshold == toxic["mha"]["runs"][1]["threshold"]

    ood = report["ood"]["results"]
    assert set(ood) == set(TEST_SETS) and set(ood["xstest"]) == set(ALL) - {"prototypes", "zero-shot", "few-shot"}
    assert ood["xstest"]["gate"]["summary"]["test"]["rows"] == 8
    assert "Not at hand: openai_moderation, aegis, beavertails, advbench." in text
    downcasts = report["downcast"]["results"]
    assert {name: result["num_parameters"] for name, result in downcasts.items()} == {
        name: 6 * 4 * 32 * (32 // int(name)) + 66 for name in ("4", "8", "16", "32")
    }
    assert set(report["layers"]["emotion"]) == {"gate", "mha"}
    found = report["layers"]["toxicchat"]["gate"]
    assert found["layers"] == [0, 1, 2, 3, 4] and sum(group["rows"] for group in found["groups"]) == 12
    assert sum(kind["trials"] for kind in report["sensitivity"]["kinds"].values()) == 2
    assert all(trial["status"] != "pruned" for trial in report["sensitivity"]["trials"])
    points = [point for name in ("pooling", "gate") for point in report["few_labels"]["toxicchat"][name]["curve"]]
    assert [(e["rows"], e["seed"], e["head"]) for e in points] == [
        (16, seed, name) for name in ("pooling", "gate") for seed in (0, 1)
    ]
    for name in ("main-toxicchat", "main-emotion", "layers-toxicchat", "few-labels-toxicchat", "sensitivity"):
        assert (output / f"{name}.png").is_file() and text.count(f"({name}.png)") == 1
    assert "(main-emotion.png)" in section(text, "emotion") and "Not finished" not in text


def test_the_papers_figures_are_in_their_columns(everything):
    text = (everything[1] / "report.md").read_text()
    toxic, emotion = section(text, "toxicchat"), section(text, "emotion")
    assert re.search(r"\| `pooling` \|.*\| 0\.735 ± 0\.007 \| 0\.812 \|\n", toxic)
    assert re.search(r"\| `pooling` \|.*\| 0\.692 \|\n", emotion)
    assert re.search(r"\| `tfidf` \|.*\| - \| - \|\n", toxic)
    assert "| muli (paper only) | - | - | - | - | - | 0.778 | 0.829 |" in toxic
    assert "| chain-of-thought prompting (paper only) | - | - | - | 0.561 |" in emotion and "T5" not in emotion
    header = next(line for line in toxic.splitlines() if line.startswith("| method"))
    assert header.count("paper: ") == 2 and "paper: AUPRC, human-annotated rows |" in header
    assert paper.BACKBONE in text and "tiny-chat" in text


def test_fitted_heads(reproduction, tmp_path):
    report = reproduction(chosen=["muli", "pooling"], seeds=(0,)).execute()
    muli, pooling = report["main"]["toxicchat"].values()
    assert muli["num_parameters"] == 2 * 261 and muli["runs"][0]["l1"] > 0 and "best_epoch" not in muli["runs"][0]
    assert pooling["runs"][0]["best_epoch"] in (1, 2) and not (tmp_path / "out" / ".states").exists()


def test_nothing_is_chosen_by_test_rows(reproduction, everything, monkeypatch):
    """With other test labels, all choices are the same."""

    def chosen(results):
        keys = ("seed", "best_epoch", "layer", "label_tokens", "temperature", "threshold", "validation")
        return {
            name: [{key: run.get(key) for key in keys} for run in found["runs"]] for name, found in results.items()
        }

    original = DataSources.read

    def read(sources, seed):
        parts = original(sources, seed)
        parts["test"].labels = 1 - parts["test"].labels
        return parts

    monkeypatch.setattr(DataSources, "read", read)
    names = ["prototypes", "layer-linear", "gate", "few-shot"]
    found = reproduction(chosen=names).execute()["main"]["toxicchat"]
    before = {name: everything[0]["main"]["toxicchat"][name] for name in found}
    assert chosen(found) == chosen(before) and found != before


def test_later_runs_keep_the_parts_that_are_there(reproduction, finished, tmp_path):
    """In their report as well."""
    shown = reproduction(chosen=["gate"], only=["ood"]).execute()
    text = (tmp_path / "out" / "report.md").read_text()
    assert shown["main"]["toxicchat"]["gate"] == finished["main"]["toxicchat"]["gate"] and "## ToxicChat" in text


def test_at_most_so_many_rows(reproduction, tmp_path):
    report = reproduction(data=("emotion",), chosen=["tfidf"], max_rows=10).execute()
    assert report["main"]["emotion"]["tfidf"]["rows"] == {"train": 10, "validation": 10, "test": 10}
    assert "**Not all rows:** at most 10" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"chosen": ["svm"]}, "methods='svm'"),
        ({"only": ["table 9"]}, "only='table 9'"),
        ({"only": ["ood"], "data": ["emotion"]}, "only='ood'"),
        ({"only": ["layers"], "chosen": ["tfidf"]}, "only='layers'"),
        ({"data": ["xstest"]}, "data='xstest'"),
        ({"data": ["goemotions"]}, "data='goemotions'"),
        ({"data": ["emotion", "emotion"]}, "data="),
        ({"epochs": 0}, "epochs=0"),
        ({"max_rows": 0}, "max_rows="),
        ({"only": ["sensitivity"], "sweep": Path("nowhere")}, "sweep=nowhere"),
        ({"only": ["main"], "sweep": Path("nowhere")}, "sweep=nowhere is read for sensitivity"),
    ],
)
def test_refusals(reproduction, changes, field, monkeypatch):
    monkeypatch.setattr(Workbench, "_loaded", property(lambda self: pytest.fail("refused after the backbone loads")))
    with pytest.raises(ProbeError, match=field):
        reproduction(**changes).execute()


def test_a_sweep_in_place_of_a_search(reproduction, tmp_path):
    results = [(0.1, "finished", 1e-4), (0.4, "pruned", 1e-3), (0.7, "finished", 1e-2), (None, "failed", 1e-3)]
    trials = [
        {"score": score, "status": status, "params": {"probe_type": "gate", "learning_rate": rate}}
        for score, status, rate in results
    ]
    sweep = tmp_path / "study"
    sweep.mkdir()
    (sweep / "sweep.json").write_text(json.dumps({"metric": "auprc", "trials": trials}))
    report = reproduction(only=("sensitivity",), sweep=sweep).execute()
    assert report["sensitivity"]["kinds"] == {
        "gate": {"trials": 3, "best": 0.7, "median": 0.4, "worst": 0.1, "learning_rate": pytest.approx(1.0)}
    }
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| `gate` | 3 | 0.700 | 0.400 | 0.100 | 0.600 | +1.00 |" in text and "## ToxicChat" not in text
    (sweep / "sweep.json").write_text(json.dumps({"metric": "auprc", "trials": trials[:1]}))
    with pytest.raises(ProbeError, match=r"sensitivity\.json.*digest="):
        reproduction(only=("sensitivity",), sweep=sweep).execute()


@pytest.mark.parametrize("error, stays", [(ProbeError, False), (KeyboardInterrupt, True)])
def test_states_stay_only_after_an_interrupt(reproduction, tmp_path, monkeypatch, error, stays):
    def fail(training):
        raise error("no further")

    monkeypatch.setattr(SharedTraining, "_train_epoch", fail)
    with pytest.raises(error):
        reproduction(chosen=["gate"]).execute()
    assert any((tmp_path / "out").rglob("states.bin")) == stays
