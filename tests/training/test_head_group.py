"""Heads that learn side by side: each as if it were alone."""

import math

import numpy as np
import pytest
import torch
from conftest import HIDDEN, LAYERS, make_lm, make_prompts
from transformers import TrainerCallback, set_seed

from llama_probe import ProbeConfig, ProbeError, ProbeModel, ProbeTrainer, ProbeTrainingArguments
from llama_probe.data.cached_states import PromptDataset, StateCache
from llama_probe.heads import probe_types
from llama_probe.training.head_group import HeadGroup
from llama_probe.training.rows import TrainingRows


def rows(count, seed=0):
    """Prompts whose label is whether token 11 occurs."""
    prompts, labels = [], []
    for row in range(count):
        ids = [
            12 if token == 11 else token for token in make_prompts(1, 4 + row % 5, seed=1000 * seed + row)[0].tolist()
        ]
        if row % 2:
            ids[row % len(ids)] = 11
        prompts.append(ids)
        labels.append(row % 2)
    return prompts, np.array(labels)


TRAIN, VALIDATION = rows(48), rows(16, 1)
HEADS = {kind: {"probe_type": kind, "dropout": 0.2, "layer_dropout": 0.1} for kind in probe_types() if kind != "muli"}
HEADS |= {"few-layers": {"probe_type": "gate", "layers": [1, 3]}, "rms": {"probe_type": "gate", "normalize": "rms"}}
RATES = {"few-layers": {"learning_rate": 3e-2, "weight_decay": 0.0, "label_smoothing_factor": 0.1, "focal_gamma": 1.0}}


def head(name, lm, seed=3):
    set_seed(seed)
    sizes = {"downcast": 4, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
    return ProbeModel(ProbeConfig(**{**sizes, **HEADS[name]}), backbone=lm)


def train(model, folder, lm=None, callbacks=(), resume=None, train_rows=TRAIN, validation=VALIDATION, **changes):
    """Train on prompts with `lm`, else on cached states, and return the trainer."""
    given = {name: changes.pop(name) for name in ("head_args", "left_out") if name in changes}
    changes = {
        "num_train_epochs": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "patience": None,
        **changes,
    }
    changes = {"label_smoothing_factor": 0.0, **changes}
    args = ProbeTrainingArguments(str(folder / "run"), disable_tqdm=True, use_cpu=True, seed=5, **changes)
    parts = [PromptDataset(*train_rows), PromptDataset(*validation)]
    if lm is None:
        config, cache = head("gate", lm := make_lm()).config, StateCache(folder / "states", torch.float32)
        parts = [cache.dataset(lm, config, prompts, labels) for prompts, labels in (train_rows, validation)]
    trainer = ProbeTrainer(model, args, None, *parts, callbacks=list(callbacks), **given)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same(a, b, tolerance=1e-5):
    return all(
        torch.allclose(x, y, atol=tolerance)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("is_cached", [True, False])
def test_each_head_learns_as_if_alone(tmp_path, is_cached):
    lm = None if is_cached else make_lm()
    group = train({name: head(name, lm) for name in HEADS}, tmp_path / "group", lm, head_args=RATES)
    assert set(group.heads) == set(group.logits) == set(HEADS)
    for name in HEADS:
        alone = train(head(name, lm), tmp_path / name, lm, **RATES.get(name, {}))
        assert same(alone.model, group.heads[name]), name
        torch.testing.assert_close(alone.logits, group.logits[name], atol=1e-4, rtol=1e-4)
        assert alone.progress["head"].scores == pytest.approx(group.progress[name].scores, abs=1e-6)
        assert alone.model.config.threshold == pytest.approx(group.heads[name].config.threshold, abs=1e-4)
        assert alone.model.results["runs"] and group.heads[name].results["probe_type"] == HEADS[name]["probe_type"]


def test_seeds_differ(tmp_path):
    group = train({f"seed-{seed}": head("gate", None, seed) for seed in (0, 1, 0 + 2)}, tmp_path)
    weights = [each.classifier.weight for each in group.heads.values()]
    assert not any(torch.allclose(weights[i], weights[i - 1], atol=1e-4) for i in range(3))


def test_a_head_learns_nothing_of_the_rows_that_it_is_to_leave_out(tmp_path):
    """Flipped labels of these rows change the others, and not the head that leaves them out."""
    held = list(range(0, 48, 3))
    flipped = TRAIN[1].copy()
    flipped[held] = 1 - flipped[held]
    found = [
        train(
            {"whole": head("gate", None), "twin": head("gate", None)},
            tmp_path / str(place),
            train_rows=(TRAIN[0], labels),
            left_out={"twin": held},
        )
        for place, labels in enumerate((TRAIN[1], flipped))
    ]
    assert same(found[0].heads["twin"], found[1].heads["twin"]) and not same(
        found[0].heads["whole"], found[1].heads["whole"], 1e-3
    )


def test_the_backbone_runs_once_for_all_heads(tmp_path):
    counts = []
    for names in (["gate"], ["gate", "pooling", "few-layers"]):
        lm, passes = make_lm(), []
        lm.model.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        train(
            {name: head(name, lm) for name in names},
            tmp_path / str(len(names)),
            lm,
            num_train_epochs=2,
            eval_strategy="no",
        )
        counts.append(len(passes))
    # After the training each head is judged by itself.
    assert counts[1] - counts[0] <= 8 and counts[0] >= 12


class Kill(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        if state.epoch == 2:
            raise KeyboardInterrupt


def test_a_killed_run_gives_what_an_uninterrupted_run_gives(tmp_path):
    make = lambda: {name: head(name, None) for name in ("gate", "multimax", "few-layers")}  # noqa: E731
    whole = train(make(), tmp_path / "whole", patience=2, head_args=RATES)
    with pytest.raises(KeyboardInterrupt):
        train(make(), tmp_path / "cut", callbacks=[Kill()], patience=2, head_args=RATES)
    set_seed(77)
    resumed = train(make(), tmp_path / "cut", resume=True, patience=2, head_args=RATES)
    assert all(same(resumed.heads[name], whole.heads[name]) for name in whole.heads)
    assert resumed.progress["gate"].scores == whole.progress["gate"].scores


def test_each_head_has_its_own_best_epoch_and_stops_by_itself(tmp_path):
    rates = {"still": {"learning_rate": 1e-30}, "moving": {"learning_rate": 3e-2}}
    heads = {"still": head("gate", None), "moving": head("gate", None)}
    trainer = train(heads, tmp_path, patience=2, num_train_epochs=12, head_args=rates, validation=TRAIN)
    assert len(trainer.progress["still"].scores) == 3 == trainer.progress["still"].epochs
    moving = trainer.progress["moving"]
    assert len(moving.scores) > 3 and moving.best == max(moving.scores)
    assert trainer.state.epoch == moving.epochs


def test_a_head_that_diverges_leaves_the_others_alone(tmp_path):
    rates = {"wild": {"learning_rate": 1e38}}
    group = train(
        {"wild": head("gate", None), "calm": head("gate", None)},
        tmp_path / "a",
        num_train_epochs=2,
        head_args=rates,
        eval_strategy="epoch",
    )
    assert group.progress["wild"].best == -math.inf or math.isfinite(group.progress["wild"].best)
    alone = train(head("gate", None), tmp_path / "b", num_train_epochs=2)
    assert same(alone.model, group.heads["calm"])


@pytest.mark.parametrize(
    "strategies", [{"save_strategy": "no"}, {"eval_strategy": "no"}, {"save_strategy": "no", "eval_strategy": "no"}]
)
def test_without_checkpoints_or_evaluations(tmp_path, strategies):
    trainer = train(head("gate", None), tmp_path, **strategies)
    is_evaluated = "eval_strategy" not in strategies
    assert len(trainer.progress["head"].scores) == (4 if is_evaluated else 0)
    assert bool(list((tmp_path / "run").glob("checkpoint-*"))) == ("save_strategy" not in strategies)
    if is_evaluated:
        assert trainer.evaluate()["eval_auprc"] == pytest.approx(trainer.progress["head"].best)


def test_a_stopped_run_in_the_folder_is_named(tmp_path, caplog):
    train(head("gate", None), tmp_path)
    assert "earlier run" not in caplog.text
    train(head("gate", None), tmp_path)
    assert "checkpoint-" in caplog.text and "resume_from_checkpoint=True" in caplog.text


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"num_labels": 3}, "id2label"),
        ({"token_scope": "user"}, "token_scope"),
        ({"num_hidden_layers": 5}, "num_hidden_layers"),
    ],
)
def test_heads_that_do_not_fit_together(changes, named):
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
    heads = [ProbeModel(ProbeConfig(probe_type="gate", **{**sizes, **more})) for more in ({}, changes)]
    with pytest.raises(ProbeError, match=named):
        HeadGroup(dict(zip("ab", heads, strict=True)))


@pytest.mark.parametrize("given", [{"head_args": {"b": {}}}, {"left_out": {"b": [0]}}])
def test_names_of_no_head(tmp_path, given):
    lm = make_lm()
    with pytest.raises(ProbeError, match="'b'"):
        train({"a": head("gate", lm)}, tmp_path, lm, **given)


def test_rows_may_occur_again():
    data = TrainingRows(PromptDataset([[1], [2, 3]], np.array([0, 1])), [1, 0, 1], row_weights=[None, [0.5], None])
    assert [data[place]["input_ids"] for place in range(3)] == [[2, 3], [1], [2, 3]]
    assert data.labels.tolist() == [1, 0, 1] and "row_weights" not in data[0] and data[1]["row_weights"] == [0.5]
