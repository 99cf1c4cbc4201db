"""The search: draws, ranking, files, and resuming after a kill."""

import dataclasses
import json
import shutil
from collections import Counter

import pytest
import torch
from conftest import HIDDEN, make_lm, read_head

from llama_probe import ProbeConfig, ProbeError
from llama_probe.data.sources import DataSources
from llama_probe.evaluation.plots import sensitivity_plot
from llama_probe.heads import get_probe_type, probe_types
from llama_probe.hub.folder import read_results
from llama_probe.training import shared
from llama_probe.training.recipe import COMMON, Recipe
from llama_probe.training.run import TrainingRun
from llama_probe.training.shared import CHECKPOINT_NAME, SharedTraining
from llama_probe.training.sweep import SETUP_NAME, SearchSpace, Sweep, split_drawn


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name, count in (("train", 60), ("test", 20)):
        lines = [{"text": f"{'good' if i % 3 else 'bad'} no {i}", "label": int(i % 3 == 0)} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def sweep(rows, backbone, output, trials=6, kinds=("gate", "mha", "pooling", "attentive"), resume=False, **changes):
    run = TrainingRun(
        backbone=str(backbone),
        output=output,
        data=DataSources(train=str(rows / "train.jsonl"), test=str(rows / "test.jsonl")),
        recipe=Recipe(num_train_epochs=3),
        cache=False,
        **changes,
    )
    return Sweep(run, SearchSpace(kinds), trials, keep=0.5, resume=resume)


@pytest.mark.parametrize("hidden_size", [HIDDEN, 576, 3072])
def test_every_draw_can_be_built(hidden_size):
    kinds = [kind for kind in probe_types() if not get_probe_type(kind).convex]
    space, base = SearchSpace(kinds), ProbeConfig(probe_type="pooling", hidden_size=hidden_size, num_hidden_layers=2)
    drawn = [space.draw(base, number, seed=0) for number in range(60)]
    assert drawn == [space.draw(base, number, seed=0) for number in range(60)]
    for one in drawn:
        head, recipe = split_drawn(one)
        base.replace(**head)
        Recipe(**recipe)
        low, high = (COMMON | get_probe_type(one["probe_type"]).search_space)["learning_rate"]
        assert low <= recipe["learning_rate"] <= high
    assert Counter(one["probe_type"] for one in drawn).keys() == set(kinds)
    assert len({one["num_attention_heads"] for one in drawn if one["probe_type"] == "mha"}) > 1
    with pytest.raises(ProbeError, match="hidden_size"):
        SearchSpace(["mha"]).draw(base.replace(hidden_size=7), 0, 0)


def test_what_it_leaves(rows, backbone_folder, tmp_path, monkeypatch):
    result = sweep(rows, backbone_folder, tmp_path).run()
    assert json.loads((tmp_path / "sweep.json").read_text()) == result
    left = ["head", "sensitivity.png", "setup.json", "sweep.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    scores = [trial["score"] for trial in result["trials"]]
    assert len(scores) == 6 and scores == sorted(scores, reverse=True)
    assert scores == [max(trial["scores"]) for trial in result["trials"]]
    shares = Counter(trial["params"]["probe_type"] for trial in result["trials"])
    assert len(shares) == 4 and max(shares.values()) - min(shares.values()) <= 1, "kinds in turn"
    best, head, results = result["trials"][0], read_head(tmp_path / "head"), read_results(tmp_path / "head")
    assert head.config.probe_type == best["params"]["probe_type"]
    assert results["runs"][0]["validation"]["auprc"] == pytest.approx(best["score"], abs=1e-4)
    assert results["runs"][0]["test"]["rows"] == 20 and (tmp_path / "head" / "README.md").is_file()
    shown = best["options"].split("--learning-rate ")[1].split()[0]
    assert results["recipe"]["learning_rate"] == pytest.approx(float(shown), rel=0.01)
    axes = sensitivity_plot(result).axes
    assert {"learning_rate", "batch_size", "dropout"} <= {panel.get_xlabel() for panel in axes}
    assert sum(len(points.get_offsets()) for points in axes[0].collections) == 6, "every trial has a learning rate"

    monkeypatch.setattr(SharedTraining, "_train_epoch", lambda *args: pytest.fail("nothing is left to train"))
    assert sweep(rows, backbone_folder, tmp_path, resume=True).run() == result


def test_heads_that_follow_replies_learn_from_cut_ones(backbone_folder, tmp_path, monkeypatch):
    lines = [{"prompt": f"what no {i}", "text": "good no bad no good no", "label": i % 2} for i in range(40)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    seen, original = [], shared.collect_hidden_states
    monkeypatch.setattr(
        shared, "collect_hidden_states", lambda *args: (seen.extend(args[3].sum(dim=1).tolist()), original(*args))[1]
    )
    search = sweep(tmp_path, backbone_folder, tmp_path / "out", 2, ("gate",), head={"token_scope": "response"})
    search.training.data = DataSources(train=str(tmp_path / "train.jsonl"), prompt_column="prompt")
    search.run()
    whole = max(seen)
    assert len(seen) == 3 * 40
    # Half of 34 training rows, in 3 epochs, are cut, at times by none of their tokens.
    assert 20 < len(seen) - seen.count(whole) - seen.count(whole - 1) < 60
    assert read_head(tmp_path / "out" / "head").config.token_scope == "response"


def test_a_killed_sweep_resumes(rows, backbone_folder, tmp_path, monkeypatch):
    shutil.copytree(backbone_folder, tmp_path / "backbone")
    shutil.copytree(rows, tmp_path / "rows")

    def search(name, **changes):
        values = {"trials": 4, "kinds": ("gate", "mha"), **changes}
        return sweep(tmp_path / "rows", tmp_path / "backbone", tmp_path / name, **values)

    whole = search("whole").run()
    original = SharedTraining._train_epoch

    def die(training):
        if training.epoch == 2:
            raise KeyboardInterrupt
        original(training)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SharedTraining, "_train_epoch", die)
        search("cut").run()
    assert (tmp_path / "cut" / CHECKPOINT_NAME).exists()
    with pytest.raises(ProbeError, match="--resume"):
        search("cut").run()
    with pytest.raises(ProbeError, match=f"{SETUP_NAME}.*trials"):
        search("cut", resume=True, trials=7).run()
    train = tmp_path / "rows" / "train.jsonl"
    before = train.read_text()
    train.write_text(before.replace("no 7", "no 77"))
    with pytest.raises(ProbeError, match="rows"):
        search("cut", resume=True).run()
    train.write_text(before)
    make_lm(seed=1, vocab_size=260).save_pretrained(tmp_path / "backbone")
    with pytest.raises(ProbeError, match="backbone_weights"):
        search("cut", resume=True).run()
    make_lm(vocab_size=260).save_pretrained(tmp_path / "backbone")
    assert search("cut", resume=True).run() == whole
    one, other = (read_head(tmp_path / name / "head").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"trials": 0}, "trials=0"),
        ({"keep": 0.0}, r"keep=0\.0"),
        ({"kinds": ()}, "probe_types"),
        ({"kinds": ("lstm",)}, "probe_type='lstm'"),
        ({"kinds": ("gate", "muli")}, "probe_type='muli'"),
    ],
)
def test_refusals_leave_nothing_behind(rows, tmp_path, changes, name):
    keep = changes.pop("keep", 0.5)
    with pytest.raises(ProbeError, match=name):
        dataclasses.replace(sweep(rows, "never-loaded", tmp_path / "study", **changes), keep=keep).run()
    assert not (tmp_path / "study").exists()
