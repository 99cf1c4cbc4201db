"""The search: draws, ranking, files, and resuming after a kill."""

import json
from collections import Counter

import pytest
from conftest import HIDDEN, read_head
from hub_server.heads import same_weights
from training_runs import run_of, write

from llama_probe import ProbeConfig, ProbeError
from llama_probe.evaluation.plots import sensitivity_plot
from llama_probe.heads import get_probe_type, probe_types
from llama_probe.hub.folder import read_results
from llama_probe.training import shared
from llama_probe.training.recipe import COMMON, Recipe
from llama_probe.training.shared import CHECKPOINT_NAME, SharedTraining
from llama_probe.training.sweep import SETUP_NAME, Sweep, draw, split_drawn


def sweep(folder, backbone="never-loaded", trials=4, kinds=("gate", "mha"), keep=0.5, resume=False, **changes):
    """A short search into `folder / "head"`; `changes` go to its run."""
    run = run_of(folder, backbone, 3, **{"rows": 60, **changes})
    run.cache = False
    return Sweep(training=run, probe_types=kinds, trials=trials, keep=keep, resume=resume)


@pytest.mark.parametrize("hidden_size", [HIDDEN, 576, 3072])
def test_every_draw_can_be_built(hidden_size):
    kinds = probe_types()
    base = ProbeConfig(probe_type="pooling", hidden_size=hidden_size, num_hidden_layers=2)
    drawn = [draw(kinds, base, number, seed=0) for number in range(60)]
    assert drawn == [draw(kinds, base, number, seed=0) for number in range(60)]
    for one in drawn:
        head, recipe = split_drawn(one)
        base.replace(**head)
        Recipe(**recipe)
        low, high = (COMMON | get_probe_type(one["probe_type"]).search_space)["learning_rate"]
        assert low <= recipe["learning_rate"] <= high
    assert Counter(one["probe_type"] for one in drawn).keys() == set(kinds)
    assert len({one["num_attention_heads"] for one in drawn if one["probe_type"] == "mha"}) > 1
    with pytest.raises(ProbeError, match="hidden_size"):
        draw(["mha"], base.replace(hidden_size=7), 0, 0)


def test_what_it_leaves(backbone_folder, tmp_path, monkeypatch):
    kinds, output = ("gate", "mha", "pooling", "attentive"), tmp_path / "head"
    search = sweep(tmp_path, backbone_folder, 6, kinds, test=write(tmp_path / "test.jsonl", 20))
    result = search.run()
    assert json.loads((output / "sweep.json").read_text()) == result
    left = ["head", "sensitivity.png", "setup.json", "sweep.json"]
    assert sorted(path.name for path in output.iterdir()) == left
    scores = [trial["score"] for trial in result["trials"]]
    assert len(scores) == 6 and scores == sorted(scores, reverse=True)
    assert scores == [max(trial["scores"]) for trial in result["trials"]]
    shares = Counter(trial["params"]["probe_type"] for trial in result["trials"])
    assert len(shares) == 4 and max(shares.values()) - min(shares.values()) <= 1, "kinds in turn"
    best, head, results = result["trials"][0], read_head(output / "head"), read_results(output / "head")
    assert head.config.probe_type == best["params"]["probe_type"]
    assert results["runs"][0]["validation"]["auprc"] == pytest.approx(best["score"], abs=1e-4)
    assert results["runs"][0]["test"]["rows"] == 20 and (output / "head" / "README.md").is_file()
    shown = best["options"].split("--learning-rate ")[1].split()[0]
    assert results["recipe"]["learning_rate"] == pytest.approx(float(shown), rel=0.01)
    axes = sensitivity_plot(result).axes
    assert {"learning_rate", "batch_size", "dropout"} <= {panel.get_xlabel() for panel in axes}
    assert sum(len(points.get_offsets()) for points in axes[0].collections) == 6, "every trial has a learning rate"

    monkeypatch.setattr(SharedTraining, "_train_epoch", lambda *args: pytest.fail("nothing is left to train"))
    search.resume = True
    assert search.run() == result


def test_heads_that_follow_replies_learn_from_cut_ones(backbone_folder, tmp_path, monkeypatch):
    lines = [{"prompt": f"what no {i}", "text": "good no bad no good no", "label": i % 2} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    seen, original = [], shared.collect_hidden_states
    monkeypatch.setattr(
        shared,
        "collect_hidden_states",
        lambda *args: (seen.extend(args[2].ne(0).sum(dim=1).tolist()), original(*args))[1],
    )
    changes = {"train": str(tmp_path / "train.jsonl"), "prompt_column": "prompt"}
    sweep(tmp_path, backbone_folder, 2, ("gate",), head={"token_scope": "response"}, **changes).run()
    whole = max(seen)
    assert len(seen) == 3 * 40
    # Half of 34 training rows, in 3 epochs, are cut, at times by none of their tokens.
    assert 20 < len(seen) - seen.count(whole) - seen.count(whole - 1) < 60
    assert read_head(tmp_path / "head" / "head").config.token_scope == "response"


def test_a_killed_sweep_resumes(backbone_folder, tmp_path, monkeypatch):
    def search(name, **changes):
        (tmp_path / name).mkdir(exist_ok=True)
        return sweep(tmp_path / name, backbone_folder, **changes)

    whole = search("whole").run()
    original = SharedTraining._train_epoch

    def die(training):
        if training.epoch == 2:
            raise KeyboardInterrupt
        original(training)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SharedTraining, "_train_epoch", die)
        search("cut").run()
    assert (tmp_path / "cut" / "head" / CHECKPOINT_NAME).exists()
    with pytest.raises(ProbeError, match="--resume"):
        search("cut").run()
    for changes, name in (({"trials": 7}, "trials"), ({"rows": 61}, r"rows\.train")):
        with pytest.raises(ProbeError, match=f"{SETUP_NAME}.*{name}"):
            search("cut", resume=True, **changes).run()
    assert search("cut", resume=True).run() == whole
    assert same_weights(*(read_head(tmp_path / name / "head" / "head") for name in ("whole", "cut")))


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"trials": 0}, "trials"),
        ({"keep": 0.0}, "keep"),
        ({"kinds": ("lstm",)}, "lstm"),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path, changes, name):
    with pytest.raises(ProbeError, match=name):
        sweep(tmp_path, **changes).run()
    assert not (tmp_path / "head").exists()
