"""The search: ranges, ranking, files, and going on after a kill."""

import dataclasses
import json
import shutil
from collections import Counter

import optuna
import pytest
import torch
from conftest import HIDDEN, make_lm, read_head

from llama_probe import ProbeConfig, ProbeError
from llama_probe.data.sources import DataSources
from llama_probe.evaluation.plots import sensitivity_plot
from llama_probe.experiments.reproduction.reproduction import summarize_trials
from llama_probe.hub.folder import read_results
from llama_probe.training import shared as shared_training
from llama_probe.training.recipe import Recipe
from llama_probe.training.run import TrainingRun
from llama_probe.training.shared import SharedTraining
from llama_probe.training.sweep import STUDY_NAME, SearchSpace, Sweep


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name, count in (("train", 60), ("test", 20)):
        lines = [
            json.dumps({"text": f"{'good' if i % 3 else 'bad'} no {i}", "label": int(i % 3 == 0)})
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def sweep(
    rows, backbone_folder, output, trials=6, kinds=("gate", "mha", "pooling", "attentive"), resume=False, **changes
):
    run = TrainingRun(
        backbone=str(backbone_folder),
        output=output,
        data=DataSources(train=str(rows / "train.jsonl"), test=str(rows / "test.jsonl")),
        recipe=Recipe(num_train_epochs=3, patience=3),
        cache=False,
        **changes,
    )
    space = SearchSpace(probe_types=kinds, downcasts=(4, 8))
    return Sweep(run, space, trials, keep=0.5, resume=resume)


@pytest.mark.parametrize("hidden_size", [HIDDEN, 576, 3072])
def test_every_draw_can_be_built(hidden_size):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    space = SearchSpace(("pooling", "gate", "mha", "attentive", "multimax"))
    seen = set()
    for _ in range(80):
        head, recipe = space.suggest(study.ask(), hidden_size)
        config = ProbeConfig(hidden_size=hidden_size, num_hidden_layers=2, **head)
        Recipe(**recipe)
        seen.add(config.probe_type)
        if config.probe_type == "gate":
            assert 1e-4 <= recipe["learning_rate"] <= 3e-2
    assert seen == {"pooling", "gate", "mha", "attentive", "multimax"}


def test_what_it_leaves(rows, backbone_folder, tmp_path):
    result = sweep(rows, backbone_folder, tmp_path).execute()
    assert json.loads((tmp_path / "sweep.json").read_text()) == result
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head", "sensitivity.png", "study.log", "sweep.json"]
    scores = [trial["score"] for trial in result["trials"]]
    assert len(scores) == 6 and scores == sorted(scores, reverse=True)
    assert [trial["score"] for trial in result["trials"]] == [max(trial["scores"]) for trial in result["trials"]]
    shares = Counter(trial["params"]["probe_type"] for trial in result["trials"])
    assert len(shares) == 4 and max(shares.values()) - min(shares.values()) <= 1, "kinds in turn"
    best, head, results = result["trials"][0], read_head(tmp_path / "head"), read_results(tmp_path / "head")
    assert head.config.probe_type == best["params"]["probe_type"]
    assert results["runs"][0]["validation"]["auprc"] == pytest.approx(best["score"], abs=1e-4)
    assert results["runs"][0]["test"]["rows"] == 20 and (tmp_path / "head" / "README.md").is_file()
    assert results["recipe"]["learning_rate"] == pytest.approx(
        float(best["options"].split("--learning-rate ")[1].split()[0]), rel=0.01
    )
    study = sweep(rows, backbone_folder, tmp_path)._study(tmp_path)
    assert study.best_value == best["score"] and study.best_trial.number == best["number"]
    axes = sensitivity_plot(result).axes
    assert {"learning_rate", "batch_size", "dropout"} <= {panel.get_xlabel() for panel in axes}
    shown = sum(len(points.get_offsets()) for points in axes[0].collections)
    assert shown == 6, "every trial has a learning rate"


def test_a_configuration_that_runs_away_is_shown_as_failed(rows, backbone_folder, tmp_path, monkeypatch):
    search = sweep(rows, backbone_folder, tmp_path, 4, ("gate", "pooling"))
    original = Sweep._candidate

    def candidate(self, number, *args):
        made = original(self, number, *args)
        return dataclasses.replace(made, learning_rate=1e6) if number == 0 else made

    monkeypatch.setattr(Sweep, "_candidate", candidate)
    result = search.execute()
    *others, last = result["trials"]
    assert (last["number"], last["status"], last["score"]) == (0, "failed", None)
    assert all(trial["score"] == max(trial["scores"]) for trial in others) and len(others) == 3
    study = sweep(rows, backbone_folder, tmp_path)._study(tmp_path)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    shown = sum(len(points.get_offsets()) for points in sensitivity_plot(result).axes[0].collections)
    assert shown == 3
    assert summarize_trials(result["trials"])["gate"]["trials"] == 1


def test_heads_that_follow_replies_learn_from_cut_ones(backbone_folder, tmp_path, monkeypatch):
    lines = [
        json.dumps({"prompt": f"what no {i}", "text": "good no bad no good no", "label": i % 2}) for i in range(40)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    seen = []
    original = shared_training.collect_hidden_states
    monkeypatch.setattr(
        shared_training,
        "collect_hidden_states",
        lambda *args: (seen.append(args[3].sum(dim=1).tolist()), original(*args))[1],
    )
    search = sweep(tmp_path, backbone_folder, tmp_path / "out", 2, ("gate",), head={"token_scope": "response"})
    search.run.data = DataSources(train=str(tmp_path / "train.jsonl"), prompt_column="prompt")
    search.execute()
    lengths = Counter(length for batch in seen for length in batch)
    whole = max(lengths)
    assert lengths.total() == 3 * 40
    # every other one of 34 training rows, 3 epochs, is cut by at least a token or, at times, by none
    assert 20 < lengths.total() - lengths[whole] - lengths[whole - 1] < 60
    assert read_head(tmp_path / "out" / "head").config.token_scope == "response"


def test_a_killed_sweep_goes_on(rows, backbone_folder, tmp_path, monkeypatch):
    whole = sweep(rows, backbone_folder, tmp_path / "whole").execute()
    original = SharedTraining._train_epoch

    def die(training):
        if training.epoch == 2:
            raise KeyboardInterrupt
        original(training)

    with monkeypatch.context() as patch:
        patch.setattr(SharedTraining, "_train_epoch", die)
        with pytest.raises(KeyboardInterrupt):
            sweep(rows, backbone_folder, tmp_path / "cut").execute()
    with pytest.raises(ProbeError, match="holds a sweep already: go on with --resume"):
        sweep(rows, backbone_folder, tmp_path / "cut").execute()
    with pytest.raises(ProbeError, match="holds another sweep: its trials are not these"):
        sweep(rows, backbone_folder, tmp_path / "cut", trials=7, resume=True).execute()
    with pytest.raises(ProbeError, match="holds another sweep: its dtype, backbone_weights are not these"):
        sweep(rows, backbone_folder, tmp_path / "cut", resume=True, dtype="bfloat16").execute()
    train, before = rows / "train.jsonl", (rows / "train.jsonl").read_text()
    train.write_text(before.replace('"label": 0', '"label": 2').replace("1}", "0}").replace("2}", "1}"))
    with pytest.raises(ProbeError, match="holds another sweep: its rows are not these"):
        sweep(rows, backbone_folder, tmp_path / "cut", resume=True).execute()
    train.write_text(before)
    resumed = sweep(rows, backbone_folder, tmp_path / "cut", resume=True).execute()
    assert resumed == whole
    one, other = (read_head(tmp_path / name / "head").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_one_that_is_finished_is_not_done_again(rows, backbone_folder, tmp_path, monkeypatch):
    whole = sweep(rows, backbone_folder, tmp_path, trials=2).execute()
    monkeypatch.setattr(SharedTraining, "_train_epoch", lambda *args: pytest.fail("nothing is left to train"))
    assert sweep(rows, backbone_folder, tmp_path, trials=2, resume=True).execute() == whole


def test_one_on_another_backbone_of_the_same_name_is_refused(rows, backbone_folder, tmp_path):
    backbone, output = tmp_path / "backbone", tmp_path / "out"
    shutil.copytree(backbone_folder, backbone)
    sweep(rows, backbone, output, trials=1).execute()
    make_lm(seed=1, vocab_size=260).save_pretrained(backbone)
    with pytest.raises(ProbeError, match="holds another sweep: its backbone_weights are not these"):
        sweep(rows, backbone, output, trials=1, resume=True).execute()


def test_one_that_was_killed_while_it_drew_begins_anew(rows, backbone_folder, tmp_path):
    interrupted = sweep(rows, backbone_folder, tmp_path, trials=2)
    interrupted._study(tmp_path).ask()
    assert len(sweep(rows, backbone_folder, tmp_path, trials=2, resume=True).execute()["trials"]) == 2


@pytest.mark.parametrize("kept", [1, -1, -30])
def test_a_study_that_was_cut_short_is_drawn_again_once_it_is_removed(rows, backbone_folder, tmp_path, kept):
    """As by a full disk: what is left is not written on."""
    whole = sweep(rows, backbone_folder, tmp_path, trials=2).execute()
    study = tmp_path / STUDY_NAME
    study.write_bytes(study.read_bytes()[:kept])
    left = study.read_bytes()
    with pytest.raises(ProbeError, match=r"study.log is damaged: its last line is not complete. Remove it"):
        sweep(rows, backbone_folder, tmp_path, trials=2, resume=True).execute()
    assert study.read_bytes() == left
    study.unlink()
    assert sweep(rows, backbone_folder, tmp_path, trials=2, resume=True).execute() == whole


@pytest.mark.parametrize("error, stays", [(ProbeError, False), (KeyboardInterrupt, True)])
def test_states_stay_only_where_a_sweep_was_stopped(rows, backbone_folder, tmp_path, monkeypatch, error, stays):
    def fail(training):
        raise error("no further")

    monkeypatch.setattr(SharedTraining, "_train_epoch", fail)
    search = sweep(rows, backbone_folder, tmp_path, trials=2)
    search.run.cache = True
    with pytest.raises(error):
        search.execute()
    assert any(tmp_path.rglob("states.bin")) == stays


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"trials": 0}, "trials=0"),
        ({"kinds": ()}, "no kind of head"),
        ({"kinds": ("lstm",)}, "probe_type='lstm'"),
        ({"kinds": ("gate", "muli")}, "probe_type='muli' has nothing to search: it is fitted"),
    ],
)
def test_refusals(rows, backbone_folder, tmp_path, changes, words):
    with pytest.raises(ProbeError, match=words):
        sweep(rows, backbone_folder, tmp_path, **changes).execute()


def test_a_share_that_cannot_be_leaves_nothing_behind(rows, backbone_folder, tmp_path):
    wrong = sweep(rows, backbone_folder, tmp_path / "study")
    wrong.keep = 0.0
    with pytest.raises(ProbeError, match=r"keep=0\.0 must be above 0"):
        wrong.execute()
    assert not (tmp_path / "study").exists(), "so that it can be begun with another share"
