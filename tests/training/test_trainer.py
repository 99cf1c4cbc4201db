"""Training with the stock Trainer: only the head is trained, saved and resumed."""

import numpy as np
import pytest
import torch
from conftest import make_lm, make_prompts, make_tokenizer, read_head
from safetensors.torch import load_file
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments, set_seed

from llama_probe import ProbeConfig, ProbeError, ProbeModel
from llama_probe.data.states import PromptDataset, StateCache
from llama_probe.evaluation.report import predict_logits
from llama_probe.heads.decision import ProbeOutput, probe_loss
from llama_probe.training.trainer import ProbeLoss, balanced_weights, create_trainer, training_arguments


ROWS = 48


def dataset(rows=ROWS, seed=0):
    """Prompts whose label is whether token 11 occurs: learnable by any head."""
    prompts, labels = [], []
    for row in range(rows):
        ids = make_prompts(1, 4 + row % 5, seed=1000 * seed + row)[0].tolist()
        ids = [12 if token == 11 else token for token in ids]
        if row % 2:
            ids[row % len(ids)] = 11
        prompts.append(ids)
        labels.append(row % 2)
    return prompts, np.array(labels)


def head(backbone=None, **changes):
    set_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4}
    config = ProbeConfig(**{"probe_type": "mha", "downcast": 4, "dropout": 0.1, **sizes, **changes})
    return ProbeModel(config, backbone=backbone)


def trainer_for(probe, folder, patience=None, metric="auprc", callbacks=(), **changes):
    changes = {"per_device_train_batch_size": 8, "num_train_epochs": 4, "learning_rate": 1e-2, **changes}
    args = training_arguments(folder, metric, disable_tqdm=True, use_cpu=True, **changes)
    sets = PromptDataset(*dataset()), PromptDataset(*dataset(16, 1))
    return create_trainer(probe, args, *sets, None, patience, callbacks=list(callbacks))


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_the_stock_trainer_alone_will_do(tmp_path):
    """No helper of this package: rows of a data set, the tokenizer's collator, and the head's own loss."""
    from datasets import Dataset

    prompts, labels = dataset()
    rows = Dataset.from_dict({"input_ids": prompts, "label": labels, "note": ["x"] * len(labels)})
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": [], "save_strategy": "no"}
    args = TrainingArguments(str(tmp_path), num_train_epochs=12, learning_rate=1e-2, **quiet)
    trainer = Trainer(head(make_lm()), args, DataCollatorWithPadding(make_tokenizer()), rows, rows)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * start
    trainer.model.save_pretrained(tmp_path / "head")
    assert read_head(tmp_path / "head").num_parameters() == trainer.model.num_parameters()


def test_learns_and_leaves_the_backbone_bit_identical(tmp_path):
    lm = make_lm()
    before = snapshot(lm)
    probe = head(lm)
    trainer = trainer_for(probe, tmp_path, num_train_epochs=8)
    assert trainer.evaluate(trainer.train_dataset)["eval_accuracy"] < 0.7
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_accuracy"] > 0.95
    for name, tensor in lm.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not lm.training and all(p.grad is None for p in lm.parameters())
    saved = load_file(next(tmp_path.glob("checkpoint-*")) / "model.safetensors")
    assert saved.keys() == probe.state_dict().keys(), "checkpoints hold only the head"
    assert trainer.evaluate()["eval_auprc"] == trainer.state.best_metric > 0.85


class Kill(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        if state.epoch == 2:
            raise KeyboardInterrupt


def test_a_killed_run_gives_what_an_uninterrupted_run_gives(tmp_path):
    whole, cut, resumed = (head(make_lm()) for _ in range(3))
    trainer_for(whole, tmp_path / "whole", load_best_model_at_end=False).train()
    with pytest.raises(KeyboardInterrupt):
        trainer_for(cut, tmp_path / "cut", load_best_model_at_end=False, callbacks=[Kill()]).train()
    set_seed(8)
    trainer_for(resumed, tmp_path / "cut", load_best_model_at_end=False).train(resume_from_checkpoint=True)
    for name, tensor in whole.state_dict().items():
        assert not torch.equal(cut.state_dict()[name], tensor)
        assert torch.equal(resumed.state_dict()[name], tensor)


def test_early_stopping_counts_across_a_stop(tmp_path):
    changes = {"num_train_epochs": 50, "learning_rate": 0.0}
    with pytest.raises(KeyboardInterrupt):
        trainer_for(head(make_lm()), tmp_path, patience=2, callbacks=[Kill()], **changes).train()
    resumed = trainer_for(head(make_lm()), tmp_path, patience=2, **changes)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.epoch == 3


def test_cached_states_train_as_the_live_backbone_does(tmp_path):
    lm = make_lm()
    live, cached = head(lm), head()
    trainer_for(live, tmp_path / "live", num_train_epochs=2).train()
    trainer = trainer_for(cached, tmp_path / "cached", num_train_epochs=2)
    cache = StateCache(tmp_path / "states", torch.float32)
    trainer.train_dataset = cache.dataset(lm, cached.config, *dataset())
    trainer.eval_dataset = cache.dataset(lm, cached.config, *dataset(16, 1))
    trainer.train()
    for name, tensor in live.state_dict().items():
        torch.testing.assert_close(cached.state_dict()[name], tensor, atol=1e-4, rtol=1e-3)


def test_gradient_accumulation_equals_larger_batches(tmp_path):
    loss = {"train_sampling_strategy": "sequential", "num_train_epochs": 2, "max_grad_norm": 0.0}
    large, small = head(make_lm(), dropout=0.0), head(make_lm(), dropout=0.0)
    trainer_for(large, tmp_path / "a", per_device_train_batch_size=12, **loss).train()
    trainer_for(small, tmp_path / "b", per_device_train_batch_size=3, gradient_accumulation_steps=4, **loss).train()
    for name, tensor in large.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], tensor, atol=1e-4, rtol=1e-3)


def test_a_bf16_backbone_with_an_fp32_head(tmp_path):
    probe = head(make_lm().bfloat16())
    trainer_for(probe, tmp_path, num_train_epochs=1).train()
    assert {p.dtype for p in probe.parameters()} == {torch.float32} and probe.backbone.dtype == torch.bfloat16


def test_a_lora_adapted_backbone(tmp_path):
    from peft import LoraConfig, get_peft_model

    lm = get_peft_model(make_lm(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    before = snapshot(lm)
    probe = head(lm)
    trainer_for(probe, tmp_path, num_train_epochs=1).train()
    for name, tensor in lm.state_dict().items():
        assert torch.equal(tensor, before[name])
    plain = head(make_lm())
    plain.load_state_dict(probe.state_dict())
    data = PromptDataset(*dataset(4))
    assert not torch.allclose(predict_logits(probe, data), predict_logits(plain, data)), "the adapter is in the states"


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_other_problems_train(tmp_path, problem_type):
    prompts, labels = dataset()
    rows = np.stack([labels, 1 - labels], axis=1).astype(np.float32)
    probe = head(make_lm(), problem_type=problem_type, num_labels=2)
    metric = "auprc" if problem_type.startswith("multi") else "r2"
    trainer = trainer_for(probe, tmp_path, metric=metric, num_train_epochs=6)
    trainer.train_dataset = trainer.eval_dataset = PromptDataset(prompts, rows)
    trainer.train()
    assert trainer.evaluate()[f"eval_{metric}"] > 0.5


@pytest.mark.parametrize("steps", [1, 2])
def test_a_value_that_stands_for_no_label_elsewhere_counts_as_any_other(tmp_path, steps):
    prompts, _ = dataset(8)
    probe = head(make_lm(), probe_type="pooling", problem_type="regression", num_labels=1, dropout=0.0)
    changes = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    changes |= {"logging_strategy": "steps", "logging_steps": 1, "learning_rate": 0.0, "num_train_epochs": 1}
    changes |= {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
    trainer = trainer_for(probe, tmp_path, metric="r2", **changes)
    values = np.array([-100, 1, -100, 3, -100, -100, -100, -100], dtype=np.float32)
    trainer.train_dataset = PromptDataset(prompts, values)
    expected = np.mean((predict_logits(probe, trainer.train_dataset)[:, 0].numpy() - values) ** 2)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


class TestLoss:
    logits = torch.tensor([[2.0, -1.0], [0.5, 0.5], [-1.0, 1.0], [3.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 1])

    def outputs(self, rows=slice(None)):
        return ProbeOutput(logits=self.logits[rows])

    def test_parts_of_a_batch_add_up(self):
        config = head().config
        loss = ProbeLoss(config, [1.0, 3.0], label_smoothing=0.1, focal_gamma=1.0)
        parts = [loss(self.outputs(rows), self.labels[rows], torch.tensor(4)) for rows in (slice(0, 1), slice(1, 4))]
        torch.testing.assert_close(sum(parts), loss(self.outputs(), self.labels))

    def test_several_labels_count_rows_not_entries(self):
        config = head(problem_type="multi_label_classification").config
        on = torch.tensor([[0.0, 1.0]] * 4)
        found = ProbeLoss(config)(self.outputs(), on, torch.tensor(8))  # the Trainer counts entries
        torch.testing.assert_close(found, probe_loss(self.logits, on, config))

    def test_balanced_weights(self):
        config = head().config
        weights = balanced_weights(np.array([0, 0, 0, 1]), config)
        assert weights == [pytest.approx(4 / 6), pytest.approx(2.0)]
        several = config.replace(problem_type="multi_label_classification")
        assert balanced_weights(np.array([[1, 0], [1, 0], [0, 1], [1, 0]]), several) == [pytest.approx(1 / 3), 3.0]

    @pytest.mark.parametrize("name, value", [("class_weights", [1.0]), ("label_smoothing", 1.0), ("focal_gamma", -1)])
    def test_refusals(self, name, value):
        with pytest.raises(ProbeError, match=name):
            ProbeLoss(head().config, **{name: value})


def test_what_the_trainer_pushes_is_a_head(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("alice"))
    probe = head(make_lm(), id2label={0: "bad", 1: "good"})
    changes = {"push_to_hub": True, "hub_model_id": "alice/mood", "num_train_epochs": 1}
    trainer = trainer_for(probe, tmp_path, **changes)
    trainer.train()
    trainer.push_to_hub()
    back = ProbeModel.from_pretrained("alice/mood")
    assert back.config.id2label == {0: "bad", 1: "good"}
    for name, tensor in probe.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
