"""The paper's tables for a backbone at hand: parts that go on after a kill, and a report that says what the numbers say."""

import gzip
import json
import re
import shutil

import numpy as np
import pytest
from conftest import read_head
from reproduction_fixture import FAST

from llama_probe import ProbeError
from llama_probe.distributed import claimed
from llama_probe.experiments import paper
from llama_probe.experiments.reproduction.columns import columns
from llama_probe.experiments.reproduction.methods import HEADS, HeadMethod
from llama_probe.experiments.reproduction.reproduction import TEST_SETS, summarize_trials
from llama_probe.experiments.reproduction.workbench import Task, Workbench
from llama_probe.training.shared import SharedTraining


def test_everything(reproduction, tmp_path, monkeypatch):
    """All parts, methods and files; the report's numbers are those of the JSON."""
    names = [*FAST, "zero-shot", "few-shot", "last-token", "muli", "attentive", "mha", "multimax-small", "multimax"]
    monkeypatch.setitem(HEADS, "mha", HeadMethod({"probe_type": "mha", "downcast": 8, "num_attention_heads": 2}))
    report = reproduction(data=("toxicchat", "emotion"), chosen=names, only=None, trials=3).execute()
    output = tmp_path / "out"
    assert json.loads((output / "report.json").read_text()) == json.loads(json.dumps(report))
    assert not (output / ".states").exists() and not any((output / "training").iterdir())
    text = (output / "report.md").read_text()

    for source, count in (("toxicchat", 4), ("emotion", 2)):
        assert set(report["main"][source]) == set(names)
        for name, result in report["main"][source].items():
            seeded = name not in ("tfidf", "prototypes", "zero-shot", "muli")
            assert [run["seed"] for run in result["runs"]] == ([0, 1] if seeded else [None])
            line = next(line for line in section(text, source).splitlines() if line.startswith(f"| `{name}` |"))
            shown = [part.strip() for part in line.strip("|").split("|")][2 : 2 + count]
            for cell, column in zip(shown, columns(source), strict=True):
                values = [dig(run["test"], column.path) for run in result["runs"]]
                expected = f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if seeded else "")
                assert cell == expected, (name, column.title)
    assert 0 <= report["main"]["toxicchat"]["layer-linear"]["runs"][0]["layer"] <= 4
    assert report["main"]["toxicchat"]["few-shot"]["runs"][0]["label_tokens"] in ("sum", "mean")
    fitted = report["main"]["emotion"]["muli"]
    assert (
        fitted["num_parameters"] == 6 * 261 and fitted["runs"][0]["l1"] > 0 and "best_epoch" not in fitted["runs"][0]
    )
    human = report["main"]["toxicchat"]["gate"]["runs"][0]["test"]["slices"]["human_annotation"]
    assert human["True"]["rows"] == human["False"]["rows"] == 6

    ood = report["ood"]["results"]
    assert set(ood) == set(TEST_SETS) and set(ood["xstest"]) == set(names) - {"prototypes", "zero-shot", "few-shot"}
    assert ood["xstest"]["gate"]["summary"]["test"]["rows"] == 8
    assert "Not at hand: openai_moderation, aegis, beavertails, advbench." in text
    assert set(report["downcast"]["results"]) == {"4", "8", "16", "32"}
    assert [report["downcast"]["results"][n]["num_parameters"] for n in ("4", "32")] == [6 * 4 * 32 * 8 + 66, 834]
    assert set(report["layers"]["emotion"]) == {"gate", "attentive", "mha", "multimax-small", "multimax"}
    found = report["layers"]["toxicchat"]["gate"]
    assert found["layers"] == [0, 1, 2, 3, 4] and sum(group["rows"] for group in found["groups"]) == 12
    assert sum(kind["trials"] for kind in report["sensitivity"]["kinds"].values()) == 3
    assert all(trial["status"] != "pruned" for trial in report["sensitivity"]["trials"])
    points = [point for found in report["few_labels"]["emotion"].values() for point in found["curve"]]
    assert {(e["rows"], e["seed"], e["head"]) for e in points} == {
        (16, seed, name) for seed in (0, 1) for name in ("pooling", "gate", "attentive", "mha", "multimax")
    }
    pngs = (
        "main-toxicchat",
        "main-emotion",
        "layers-toxicchat",
        "layers-emotion",
        "few-labels-emotion",
        "sensitivity",
    )
    for name in pngs:
        assert (output / f"{name}.png").is_file() and text.count(f"({name}.png)") == 1
    assert (
        "(main-emotion.png)" in section(text, "emotion") and "(sensitivity.png)" in text.split("\n## Sensitivity")[1]
    )
    assert "Not finished" not in text and "Not all rows" not in text and "tiny-chat" in text and paper.BACKBONE in text
    assert {(tuple(o["order"]), o["data"]) for o in report["orders"]} == {
        (order, source) for order in paper.ORDERS for source in ("toxicchat", "emotion")
    }
    head = read_head(output / "heads" / "toxicchat" / "mha-seed-1")
    assert head.config.threshold == report["main"]["toxicchat"]["mha"]["runs"][1]["threshold"]


def section(text, source):
    return text.split(f"\n`{source}`:")[1].split("\n## ")[0]


def dig(value, path):
    for key in path:
        value = value[key]
    return value


def test_one_part_after_the_other(reproduction, tmp_path):
    """A later run with another `only` keeps what is there in its report, unless it was made with other settings."""
    reproduction(chosen=["gate"]).execute()
    report = reproduction(chosen=["gate"], only=["ood"]).execute()
    text = (tmp_path / "out" / "report.md").read_text()
    assert report["main"]["toxicchat"]["gate"] and "## ToxicChat" in text and "## Out of distribution" in text
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sweep.json").write_text(json.dumps({"metric": "auprc", "trials": [TRIAL]}))
    report = reproduction(chosen=["gate"], only=["sensitivity"], sweep=tmp_path / "mine", epochs=3).execute()
    assert report["main"]["toxicchat"]["gate"] is None and report["sensitivity"] is not None


TRIAL = {"score": 0.5, "status": "finished", "params": {"probe_type": "mha", "learning_rate": 1e-3}}


def test_at_most_so_many_rows(reproduction, tmp_path):
    report = reproduction(data=("emotion",), chosen=["tfidf"], max_rows=10).execute()
    assert report["main"]["emotion"]["tfidf"]["rows"] == {"train": 10, "validation": 10, "test": 10}
    assert "**Not all rows:** at most" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"chosen": ["svm"]}, "method 'svm' is not known; allowed: tfidf, zero-shot"),
        ({"chosen": []}, "no method to compare"),
        ({"only": ["table 9"]}, "only='table 9' is not allowed; allowed: main, ood"),
        ({"data": ["xstest"]}, "data='xstest' is not allowed; allowed: toxicchat"),
        ({"data": ["goemotions"]}, "data='goemotions' is not allowed"),
        ({"data": ["emotion", "emotion"]}, "each once"),
        ({"data": ["emotion"], "only": ["ood"]}, "ood needs heads trained on one of toxicchat, wildguardmix"),
        ({"seeds": []}, "seeds="),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"trials": 0}, "trials=0"),
        ({"max_rows": 0}, "max_rows=0"),
        ({"chosen": ["few-shot"], "shots": 30}, "few-shot prompting wants 30: use more rows, or fewer with --shots"),
        ({"only": ["sensitivity"], "sweep": "nowhere"}, "nowhere holds no sweep.json"),
        (
            {"only": ["sensitivity"], "sweep": "nowhere", "trials": 12},
            "trials=12 is for a search, and sweep=nowhere is read",
        ),
        ({"data": ["emotion"], "only": ["ood", "main"]}, "ood needs heads trained on one of toxicchat"),
        ({"chosen": ["zero-shot"], "only": ["main", "ood"]}, "ood has nothing to do for methods=zero-shot"),
        ({"chosen": ["pooling"], "only": ["layers"]}, "layers has nothing to do for methods=pooling"),
        ({"chosen": ["tfidf"], "only": ["few-labels"]}, "few-labels has nothing to do for methods=tfidf"),
        ({"max_rows": 12, "only": ["main", "few-labels"]}, "training rows, and few-labels wants 16 at least"),
    ],
)
def test_refusals(reproduction, changes, words, tmp_path, monkeypatch):
    monkeypatch.setattr(Workbench, "_loaded", property(lambda self: pytest.fail("refused after work was done")))
    with pytest.raises(ProbeError, match=words):
        reproduction(**changes).execute()


def test_processes_of_torchrun_are_refused(reproduction, tmp_path, monkeypatch):
    wanted = reproduction()
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Workbench, "_loaded", property(lambda self: pytest.fail("refused after work was done")))
    with pytest.raises(ProbeError, match="without torchrun"):
        wanted.execute()
    assert not (tmp_path / "out").exists()


def test_a_sweep_with_other_settings_is_refused(reproduction, tmp_path, monkeypatch):
    def run(**changes):
        return reproduction(only=["sensitivity"], **{"trials": 2, "epochs": 1, **changes}).execute()

    run()
    part = tmp_path / "out" / "parts" / "sensitivity.json"
    part.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(
            "llama_probe.experiments.reproduction.reproduction.Sweep",
            lambda *args, **kwargs: pytest.fail("it was finished"),
        )
        for changes, told in (({"trials": 4}, r"trials=2 \(now 4\)"), ({"patience": 1}, r"patience=3 \(now 1\)")):
            with pytest.raises(ProbeError, match=rf"out/sweep holds a sweep .*: {told}\. .* remove the folder"):
                run(**changes)
        assert not part.exists() and run()["sensitivity"] is not None
    part.unlink()
    shutil.rmtree(tmp_path / "out" / "sweep")
    assert len(run(trials=3)["sensitivity"]["trials"]) == 3


def test_a_sweep_of_ones_own_is_read(reproduction, tmp_path):
    trials = [
        {"score": score, "status": status, "params": {"probe_type": "gate", "gate_learning_rate": rate}}
        for rate, score, status in ((1e-4, 0.1, "pruned"), (1e-3, 0.4, "stopped"), (1e-2, 0.7, "finished"))
    ]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sweep.json").write_text(json.dumps({"metric": "auprc", "trials": trials}))
    report = reproduction(only=("sensitivity",), sweep=tmp_path / "mine").execute()
    assert report["sensitivity"]["kinds"] == {
        "gate": {"trials": 3, "best": 0.7, "median": 0.4, "worst": 0.1, "learning_rate": pytest.approx(1.0)}
    }
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| `gate` | 3 | 0.700 | 0.400 | 0.100 | 0.600 | +1.00 |" in text and "## ToxicChat" not in text
    assert "Pruned early: 1," in text


def test_another_sweep_of_the_same_name_is_not_taken_for_the_first(reproduction, tmp_path):
    for number, score in enumerate((0.25, 0.75)):
        trial = {"score": score, "status": "finished", "params": {"probe_type": "gate", "gate_learning_rate": 1e-3}}
        (tmp_path / str(number) / "study").mkdir(parents=True)
        text = json.dumps({"metric": "auprc", "trials": [trial]})
        (tmp_path / str(number) / "study" / "sweep.json").write_text(text)
    reproduction(only=("sensitivity",), sweep=tmp_path / "0" / "study").execute()
    with pytest.raises(ProbeError, match=r"sensitivity.json was made with other settings: digest="):
        reproduction(only=("sensitivity",), sweep=tmp_path / "1" / "study").execute()
    with pytest.raises(ProbeError, match="is read for sensitivity: name that in only as well"):
        reproduction(only=("main",), sweep=tmp_path / "0" / "study")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"metric": "auprc", "trials": []}', '{"metric": "auprc", "trials": [1]}']
)
def test_a_damaged_sweep_is_refused(reproduction, tmp_path, text):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sweep.json").write_text(text)
    with pytest.raises(ProbeError, match=r"mine/sweep.json is not what a sweep writes .*: do the sweep anew"):
        reproduction(only=("sensitivity",), sweep=tmp_path / "mine").execute()


def test_one_run_at_a_time(reproduction, tmp_path):
    """The first to end would remove the states and checkpoints that the other is at."""
    with claimed(tmp_path / "out"), pytest.raises(ProbeError, match="another run is at work in"):
        reproduction(chosen=["tfidf"]).execute()
    assert not (tmp_path / "out").exists()
    reproduction(chosen=["tfidf"]).execute()


@pytest.mark.parametrize("error, stays", [(ProbeError, False), (KeyboardInterrupt, True)])
def test_states_stay_only_where_it_was_stopped(reproduction, tmp_path, monkeypatch, error, stays):
    def fail(training):
        raise error("no further")

    monkeypatch.setattr(SharedTraining, "_train_epoch", fail)
    with pytest.raises(error):
        reproduction(chosen=["gate"]).execute()
    assert any((tmp_path / "out").rglob("states.bin")) == stays


def test_a_metric_that_test_rows_do_not_define_is_a_gap(reproduction, copies, tmp_path):
    """Test rows of one label: they have an accuracy, and no AUPRC."""
    path = copies / "toxicchat" / "test.jsonl.gz"
    before = path.read_bytes()
    path.write_bytes(gzip.compress(gzip.decompress(before).replace(b'"label": 1', b'"label": 0')))
    try:
        reproduction(chosen=["gate"], only=("main", "few-labels"), seeds=(0,)).execute()
    finally:
        path.write_bytes(before)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Few labels: toxicchat" in text and re.search(r"\| `gate` \| - \|", text)


def test_few_trials_have_no_correlation():
    assert summarize_trials([TRIAL] * 2)["mha"]["learning_rate"] is None


def test_the_papers_column_is_right(reproduction, tmp_path):
    reproduction(data=("toxicchat", "emotion"), chosen=["tfidf", "pooling"], cache=False).execute()
    text = (tmp_path / "out" / "report.md").read_text()
    toxic, emotion = section(text, "toxicchat"), section(text, "emotion")
    assert re.search(r"\| `pooling` \|.*\| 0\.735 ± 0\.007 \| 0\.812 \|\n", toxic)
    assert re.search(r"\| `pooling` \|.*\| 0\.692 \|\n", emotion)
    assert re.search(r"\| `tfidf` \|.*\| - \| - \|\n", toxic)
    assert "| mha (paper only) | - | - | - | - | - | 0.845 ± 0.004 | 0.898 |" in toxic
    assert "| chain-of-thought prompting (paper only) | - | - | - | 0.561 |" in emotion and "T5" not in emotion
    header = next(line for line in toxic.splitlines() if line.startswith("| method"))
    assert header.count("paper: ") == 2 and "paper: AUPRC, human-annotated rows |" in header


def test_nothing_is_chosen_by_test_rows(reproduction, monkeypatch):
    """With other test labels, all that was chosen is the same."""

    def chosen(report):
        keys = ("seed", "best_epoch", "layer", "label_tokens", "temperature", "threshold", "validation")
        runs = {name: result["runs"] for name, result in report["main"]["toxicchat"].items()}
        return {name: [{key: run.get(key) for key in keys} for run in found] for name, found in runs.items()}

    names = [*FAST, "zero-shot", "few-shot"]
    first = reproduction("one", chosen=names, seeds=[0]).execute()
    original = Task.read

    def read(bench, source):
        task = original(bench, source)
        task.parts["test"].labels = 1 - task.parts["test"].labels
        return task

    monkeypatch.setattr(Task, "read", read)
    second = reproduction("two", chosen=names, seeds=[0]).execute()
    assert chosen(first) == chosen(second)
    assert first["main"] != second["main"]
