"""Heads that learn side by side: each as if it were alone."""

import math

import pytest
import torch
from conftest import HIDDEN, LAYERS, make_lm
from training_runs import Kill, head_of, token_rows, trainer_of
from transformers import set_seed

from llama_probe import ProbeError, ProbeModel, ProbeTrainer, ProbeTrainingArguments
from llama_probe.data import batches
from llama_probe.data.batches import collate
from llama_probe.data.disk_states import DiskStates
from llama_probe.data.prompts import PromptDataset
from llama_probe.heads import probe_types
from llama_probe.training.head_group import HeadGroup


TRAIN, VALIDATION = token_rows(24), token_rows(16, 1)
HEADS = {name: {"probe_type": name, "dropout": 0.2, "layer_dropout": 0.1} for name in probe_types()}
HEADS |= {"few/layers": {"probe_type": "gate", "layers": [1, 3]}, "rms": {"probe_type": "gate", "normalize": "rms"}}
RATES = {"few/layers": {"learning_rate": 3e-2, "weight_decay": 0.0, "label_smoothing_factor": 0.1, "focal_gamma": 1.0}}


def head(name="gate", lm=None, seed=3):
    return head_of(lm, seed, **HEADS[name])


def train(model, folder, lm=None, resume=None, train_rows=TRAIN, validation=VALIDATION, **changes):
    """Train on prompts with `lm`, else on cached states, and return the trainer."""
    parts = [PromptDataset(*train_rows), PromptDataset(*validation)]
    if lm is None:
        lm, config, cache = make_lm(), head().config, DiskStates(folder / "states", torch.float32)
        parts = [cache.dataset(lm, config, part) for part in parts]
    changes = {"patience": None, "label_smoothing_factor": 0.0, **changes}
    trainer = trainer_of(folder / "run", *parts, model=model, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same(a, b, tolerance=1e-5):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.allclose(x, y, atol=tolerance) for x, y in pairs)


@pytest.mark.parametrize("is_cached, names", [(True, list(HEADS)), (False, ["mha", "multimax", "few/layers"])])
def test_each_head_learns_as_if_alone(tmp_path, is_cached, names):
    lm, rows = None if is_cached else make_lm(), {"num_train_epochs": 1 + (not is_cached)}
    rows["bf16"] = is_cached  # autocast is meant for the LM
    given = {name: rates for name, rates in RATES.items() if name in names}
    group = train({name: head(name, lm) for name in names}, tmp_path / "group", lm, head_args=given, **rows)
    assert list(group.heads) == list(group.logits) == names
    for name in names:
        alone = train(head(name, lm), tmp_path / name, lm, **RATES.get(name, {}), **rows)
        assert same(alone.heads["head"], group.heads[name]), name
        torch.testing.assert_close(alone.logits, group.logits[name], atol=1e-4, rtol=1e-4)
        assert alone.progress["head"].scores == pytest.approx(group.progress[name].scores, abs=1e-6)
        assert alone.heads["head"].config.threshold == pytest.approx(group.heads[name].config.threshold, abs=1e-4)
        assert alone.results["runs"] and group.heads[name].results["probe_type"] == HEADS[name]["probe_type"]


def test_dropout_differs_from_step_to_step_and_not_from_head_to_head():
    """Also without a trainer, which need not seed each step."""
    states = torch.randn(6, LAYERS + 1, 4, HIDDEN, generator=torch.Generator().manual_seed(0))
    batch = collate([{"input_ids": [1, 2, 3, 4], "hidden_states": row} for row in states])

    def steps(group):
        torch.manual_seed(0)
        outputs = [group.train()(**batch).by_head for _ in range(2)]
        logits = [{name: output.learned_logits for name, output in each.items()} for each in outputs]
        return *logits, torch.rand(())

    first, second, drawn = steps(HeadGroup({"one": head("mha"), "other": head(), "again": head("mha")}))
    alone, _, drawn_alone = steps(HeadGroup(head("mha")))
    torch.testing.assert_close(first["one"], first["again"])
    torch.testing.assert_close(first["one"], alone["head"])
    assert all(not torch.allclose(first[name], second[name]) for name in first)
    assert drawn == drawn_alone, "what follows a step does not depend on the heads"


def test_rates_that_are_left_open_are_those_of_the_head_types(tmp_path):
    args = ProbeTrainingArguments(str(tmp_path), use_cpu=True)
    heads = {name: head(name, make_lm()) for name in ("mha", "gate")}
    sgd, own = (torch.optim.SGD, {"momentum": 0.5}), {"gate": {"weight_decay": 0.0}}
    trainer = ProbeTrainer(heads, args, None, PromptDataset(*TRAIN), head_args=own, optimizer_cls_and_kwargs=sgd)
    optimizer = trainer.create_optimizer()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3, 1e-2, 1e-2]
    assert isinstance(optimizer, torch.optim.SGD)


def test_a_head_learns_nothing_of_the_rows_that_it_is_to_leave_out(tmp_path):
    """Flipped labels of these rows change the others, and not the head that leaves them out."""
    held = list(range(0, 24, 3))
    flipped = TRAIN[1].copy()
    flipped[held] = 1 - flipped[held]

    def learn(name, labels):
        rows = {"train_rows": (TRAIN[0], labels), "left_out": {"ablation": held}, "num_train_epochs": 2}
        return train({"whole": head(), "ablation": head()}, tmp_path / name, **rows).heads

    a, b = learn("a", TRAIN[1]), learn("b", flipped)
    assert same(a["ablation"], b["ablation"]) and not same(a["whole"], b["whole"], 1e-3)


def test_the_backbone_runs_once_for_all_heads(tmp_path):
    counts = []
    for names in (["gate"], ["gate", "pooling", "few/layers"]):
        lm, passes = make_lm(), []
        lm.model.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        heads = {name: head(name, lm) for name in names}
        train(heads, tmp_path / str(len(names)), lm, num_train_epochs=2, eval_strategy="no")
        counts.append(len(passes))
    # After the training each head is judged by itself.
    assert counts[1] - counts[0] <= 8 and counts[0] >= 6


def test_a_killed_run_gives_what_an_uninterrupted_run_gives(tmp_path):
    def run(folder, seed=5, **changes):
        set_seed(seed)
        heads = {name: head(name) for name in ("gate", "multimax", "few/layers")}
        return train(heads, tmp_path / folder, patience=2, head_args=RATES, **changes)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", callbacks=[Kill()])
    (tmp_path / "cut" / "run" / "checkpoint-999").mkdir()  # killed while it was written
    resumed = run("cut", seed=77, resume=True)
    assert all(same(resumed.heads[name], whole.heads[name]) for name in whole.heads)
    assert [each.scores for each in resumed.progress.values()] == [each.scores for each in whole.progress.values()]


def test_each_head_has_its_own_best_epoch_and_stops_by_itself(tmp_path):
    rates = {"still": {"learning_rate": 1e-30}, "moving": {"learning_rate": 3e-2}}
    heads = {"still": head(), "moving": head()}
    trainer = train(heads, tmp_path, patience=2, num_train_epochs=5, head_args=rates, validation=TRAIN)
    assert len(trainer.progress["still"].scores) == 3 == trainer.progress["still"].epochs
    moving = trainer.progress["moving"]
    assert len(moving.scores) > 3 and moving.best == max(moving.scores)
    assert trainer.state.epoch == moving.epochs


def test_a_head_that_diverges_leaves_the_others_alone(tmp_path):
    rates = {"wild": {"learning_rate": 1e38}}
    group = train({"wild": head(), "calm": head()}, tmp_path / "a", num_train_epochs=2, head_args=rates)
    assert group.progress["wild"].best == -math.inf or math.isfinite(group.progress["wild"].best)
    alone = train(head(), tmp_path / "b", num_train_epochs=2)
    assert same(alone.heads["head"], group.heads["calm"])


def test_without_checkpoints_the_best_epoch_is_kept_all_the_same(tmp_path):
    trainer = train(head(), tmp_path, save_strategy="no")
    assert not list((tmp_path / "run").glob("checkpoint-*")) and len(trainer.progress["head"].scores) == 4
    assert trainer.evaluate()["eval_auprc"] == pytest.approx(trainer.progress["head"].best)


def test_without_evaluations(tmp_path):
    trainer = train(head(), tmp_path, eval_strategy="no")
    assert list((tmp_path / "run").glob("checkpoint-*")) and not trainer.progress["head"].scores


@pytest.mark.parametrize(
    "changes, given, named",
    [
        ({"id2label": {0: "a", 1: "b", 2: "c"}}, {}, "id2label"),
        ({"num_hidden_layers": 5}, {}, "num_hidden_layers"),
        ({}, {"metric_for_best_model": "loss"}, "'loss'"),
        ({}, {"head_args": {"c": {}}}, "'c'"),
        ({}, {"head_args": {"a": {"lr": 1e-3}}}, "'lr'"),
        ({}, {"left_out": {"c": [0]}}, "'c'"),
    ],
)
def test_heads_and_names_that_do_not_fit_together(tmp_path, changes, given, named):
    with pytest.raises(ProbeError, match=named):
        train({"a": head(), "b": ProbeModel(head().config.replace(**changes))}, tmp_path, **given)


def test_a_batch_of_many_tokens_is_computed_in_parts(tmp_path, monkeypatch):
    """The gradient, the scores and the loss of an evaluation are those of the whole batch, and no part has more tokens."""
    padded, forward = [], HeadGroup.forward

    def counted(group, **batch):
        padded.append(batch["attention_mask"].numel())
        return forward(group, **batch)

    def run(name):
        padded.clear()
        heads = {"all": head_of(dropout=0, layer_dropout=0), "few": head_of(layers=[1, 3], dropout=0, layer_dropout=0)}
        trainer = train(heads, tmp_path / name, num_train_epochs=2, gradient_accumulation_steps=2)
        return trainer, max(padded), trainer.evaluate()["eval_loss"], trainer.predict(trainer.eval_dataset).predictions

    monkeypatch.setattr(HeadGroup, "forward", counted)
    whole, most, loss, logits = run("whole")
    assert most > 16
    monkeypatch.setattr(batches, "PART_TOKENS", 16)
    parts, most, loss_of_parts, logits_of_parts = run("parts")
    assert most <= 16
    assert all(same(parts.heads[name], whole.heads[name]) for name in whole.heads)
    assert loss_of_parts == pytest.approx(loss, abs=1e-5)
    assert logits_of_parts == pytest.approx(logits, abs=1e-4), "in the order of the rows"
