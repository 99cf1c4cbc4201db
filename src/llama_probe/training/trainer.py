"""Training of a head with the stock `transformers.Trainer`."""

from __future__ import annotations

import math
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
from .recipe import Recipe


WARMUP = 0.1  # share of all steps


@dataclass
class ProbeLoss:
    """The Trainer's `compute_loss_func=` for heads: cross-entropy with class weights, label smoothing or focal weights.

    Args:
        config: config of the head.
        class_weights: one weight a label; for a multi-label head that of its positives. None: all 1.
        label_smoothing: 0 to below 1.
        focal_gamma: 0 for plain cross-entropy.

    Raises:
        ProbeError: a value is not allowed.
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

    @classmethod
    def create(cls, recipe: Recipe, config: ProbeConfig, labels: np.ndarray) -> ProbeLoss:
        """Build the loss of a recipe. Balanced class weights are those of `labels`.

        Raises:
            ProbeError: the recipe's class weights are not allowed.
        """
        weights = recipe.class_weights
        if weights == "balanced":
            weights = balanced_weights(labels, config)
        elif weights is not None:
            try:
                weights = [float(value) for value in weights.split(",")]
            except ValueError:
                weights = []
            if not any(weights) or not all(0 <= weight < math.inf for weight in weights):
                raise ProbeError(
                    f"class_weights={recipe.class_weights!r} must be 'balanced', or numbers of at least 0 with commas, "
                    "not all 0"
                )
        return cls(config, weights, recipe.label_smoothing, recipe.focal_gamma)

    def __call__(self, outputs: ProbeOutput, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        """Return the mean loss over the rows of all accumulated batches; the Trainer counts their labels."""
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
    """Return class weights with mean 1 over the rows; for a multi-label head negatives / positives of each label."""
    if config.problem_type == "multi_label_classification":
        positives = labels.sum(axis=0)
        return ((len(labels) - positives) / np.maximum(positives, 1)).tolist()
    if config.problem_type == "regression":
        raise ProbeError("class_weights must be None for regression")
    counts = np.bincount(labels, minlength=config.num_labels)
    return (len(labels) / (config.num_labels * np.maximum(counts, 1))).tolist()


def training_arguments(output_dir: str | os.PathLike, metric: str, **changes) -> TrainingArguments:
    """Return `TrainingArguments` for heads: cosine schedule, rows grouped by length, the best epoch kept.

    Args:
        output_dir: folder for checkpoints, which hold only the head.
        metric: validation metric to choose by; larger is better.
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
        "restore_callback_states_from_checkpoint": True,  # the count of early stopping
        "metric_for_best_model": metric,
        "greater_is_better": True,
        "train_sampling_strategy": "group_by_length",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "logging_strategy": "epoch",
        "report_to": [],
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Without it, processes of torchrun on a machine without an accelerator train apart.
        "use_cpu": torch.accelerator.current_accelerator(check_available=True) is None,
        "log_on_each_node": False,
    }
    return TrainingArguments(output_dir=str(output_dir), **{**values, **changes})


class HeadOnPush(TrainerCallback):
    """Adds the head's folder to what `push_to_hub` of a Trainer uploads; by itself it uploads weights without a config."""

    def on_push_begin(self, args, state, control, model: ProbeModel, **kwargs) -> None:
        """Write the head into the folder that the Trainer uploads."""
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
    """Return a stock `Trainer` for a head.

    Under `torchrun` it trains with DDP, which synchronises only the head. The frozen backbone may be sharded with FSDP:
    apply `fully_shard` to each layer and to the decoder (`lm.model`), which is what heads run.

    Args:
        probe: a head; with a backbone if the rows are token ids, without one if they are cached states.
        args: see `training_arguments`.
        train_dataset, eval_dataset: a `PromptDataset` or a `StateDataset`.
        loss: defaults to plain cross-entropy.
        patience: stop after so many evaluations without a better metric. None: never.
        kwargs: further arguments of `Trainer`.

    Raises:
        ProbeError: the head's backbone has a `tp_plan`.
    """
    if is_tensor_parallel(probe.backbone):
        raise ProbeError(
            "a backbone with a tp_plan needs the same rows in all processes, and a Trainer divides them: "
            "cache the states first (StateCache)"
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
