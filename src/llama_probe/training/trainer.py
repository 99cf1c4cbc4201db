"""Training of a head with the stock `transformers.Trainer`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from ..backbone.decoder import is_tensor_parallel
from ..data.states import ProbeCollator
from ..errors import ProbeError
from ..evaluation.metrics import compute_metrics
from ..heads.configuration import ProbeConfig
from ..heads.decision import ProbeOutput, probe_loss
from ..heads.probe import ProbeModel


WARMUP = 0.1  # share of all steps


@dataclass
class ProbeLoss:
    """The Trainer's `compute_loss_func=` for heads: cross-entropy with class weights, label smoothing or focal weights.

    Args:
        config: of the head.
        class_weights: one weight a label (multi-label: of its positives), or `"balanced"` is resolved by
            `balanced_weights`; `None` for none.
        label_smoothing: 0 to below 1.
        focal_gamma: 0 for none.
    """

    config: ProbeConfig
    class_weights: Sequence[float] | None = None
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0

    def __post_init__(self):
        if self.class_weights is not None and len(self.class_weights) != self.config.num_labels:
            raise ProbeError(f"class_weights has {len(self.class_weights)} values for {self.config.num_labels} labels")
        if not 0 <= self.label_smoothing < 1:
            raise ProbeError(f"label_smoothing={self.label_smoothing} must be at least 0 and below 1")
        if self.focal_gamma < 0:
            raise ProbeError(f"focal_gamma={self.focal_gamma} must be at least 0")

    def __call__(self, outputs: ProbeOutput, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        """Mean loss over the rows of all accumulated batches, which the Trainer counts in `num_items_in_batch` labels."""
        weights = None if self.class_weights is None else torch.tensor(self.class_weights)
        total = probe_loss(
            outputs.learned_logits,
            labels,
            self.config,
            weights,
            self.label_smoothing,
            self.focal_gamma,
            reduction="sum",
            row_weights=outputs.row_weights,
        )
        rows = len(labels) if num_items_in_batch is None else num_items_in_batch * len(labels) / labels.numel()
        return total / rows


def balanced_weights(labels: np.ndarray, config: ProbeConfig) -> list[float]:
    """Weights that let every class count alike, with mean 1 over the rows; for multi-label heads negatives / positives."""
    if config.problem_type == "multi_label_classification":
        positives = labels.sum(axis=0)
        return ((len(labels) - positives) / np.maximum(positives, 1)).tolist()
    if config.problem_type == "regression":
        raise ProbeError("class weights have no meaning for regression")
    counts = np.bincount(labels, minlength=config.num_labels)
    return (len(labels) / (config.num_labels * np.maximum(counts, 1))).tolist()


def training_arguments(output_dir: str | os.PathLike, metric: str, **changes) -> TrainingArguments:
    """`TrainingArguments` that suit heads: cosine schedule, rows grouped by length, the best epoch kept.

    Args:
        output_dir: for checkpoints, which hold only the head.
        metric: the validation metric to choose by; larger is better.
        changes: any other argument of `TrainingArguments`.
    """
    values = {
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 32,
        "num_train_epochs": 8,
        "learning_rate": 3e-4,
        "weight_decay": 0.05,
        "lr_scheduler_type": "cosine",
        "warmup_steps": WARMUP,  # below 1: a share of all steps
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "restore_callback_states_from_checkpoint": True,  # for how many epochs the metric has not risen
        "metric_for_best_model": metric,
        "greater_is_better": True,
        "train_sampling_strategy": "group_by_length",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "logging_strategy": "epoch",
        "report_to": [],
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Said outright: processes that `torchrun` starts on a machine without an accelerator else train apart.
        "use_cpu": torch.accelerator.current_accelerator(check_available=True) is None,
        "log_on_each_node": False,
    }
    return TrainingArguments(output_dir=str(output_dir), **{**values, **changes})


class HeadOnPush(TrainerCallback):
    """Puts a head folder among what a Trainer pushes (`push_to_hub`), which by itself has the weights without their config."""

    def on_push_begin(self, args, state, control, model: ProbeModel, **kwargs) -> None:
        """Writes it where the Trainer pushes from."""
        if args.should_save:
            model.save_pretrained(args.output_dir)


def create_trainer(
    probe: ProbeModel,
    args: TrainingArguments,
    train_dataset: Dataset,
    eval_dataset: Dataset | None = None,
    loss: ProbeLoss | None = None,
    patience: int | None = None,
    **kwargs,
) -> Trainer:
    """A stock `Trainer` for a head.

    Under `torchrun` it trains with DDP, as for any model, and only the head is kept in step. The frozen backbone may be
    sharded: with FSDP (`fully_shard` of each layer and of the decoder, as in `fully_shard(lm.model)`, which is what heads
    run) every process reads rows of its own. With a `tp_plan` the processes run it together, on the same rows, which the
    Trainer does not give them: cache the states first (`StateCache`), and train a head without a backbone on these.

    Args:
        probe: the head; with a backbone where the rows are token ids, without where they are cached states.
        args: see `training_arguments`.
        train_dataset, eval_dataset: a `PromptDataset` or a `StateDataset`.
        loss: plain cross-entropy where left out.
        patience: stop after so many evaluations without a better metric.
        kwargs: further arguments of `Trainer`.

    Raises:
        ProbeError: the head has a backbone with a `tp_plan`.
    """
    if is_tensor_parallel(probe.backbone):
        raise ProbeError(
            "the backbone has a tp_plan, so all processes must run it on the same rows, and the Trainer gives each its own: cache "
            "the states first (StateCache), and train a head without a backbone on these"
        )
    callbacks = [HeadOnPush(), *kwargs.pop("callbacks", [])]
    if patience is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=patience))
    return Trainer(
        model=probe,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=ProbeCollator(),
        compute_loss_func=loss or ProbeLoss(probe.config),
        compute_metrics=compute_metrics(probe.config),
        callbacks=callbacks,
        **kwargs,
    )
