"""`ProbeTrainingArguments`: the arguments of a `ProbeTrainer`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import torch
from transformers import TrainingArguments

from ..errors import ProbeError
from .recipe import Recipe


WARMUP = 0.1  # share of all steps


@dataclass
class ProbeTrainingArguments(TrainingArguments):
    """`TrainingArguments` for heads: cosine schedule, rows grouped by length, the best epoch kept.

    Args:
        learning_rate, num_train_epochs, per_device_train_batch_size, label_smoothing_factor: default to a choice by the kind
            of the head and the number of rows.
        focal_gamma, class_weights, max_false_positive_rate, threshold_rule: see `Recipe`.
        hub_strategy: when to push: `"end"` or `"every_save"`.
        patience: stop after this many evaluations without a better metric. None: never.
        cache_states: run the backbone once and keep its hidden states on disk while training.
        cache_dir: keep the states here for later runs. They can reveal the texts. Defaults to a folder that is deleted.
        novelty: fit how unlike the training data a prompt is, if the head can tell it and there are rows enough.
    """

    learning_rate: float | None = None
    num_train_epochs: float | None = None
    per_device_train_batch_size: int | None = None
    per_device_eval_batch_size: int = 32
    weight_decay: float = 0.05
    label_smoothing_factor: float | None = None
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = WARMUP
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int | None = 1
    load_best_model_at_end: bool = True
    restore_callback_states_from_checkpoint: bool = True  # early stopping counts on
    train_sampling_strategy: str = "group_by_length"
    remove_unused_columns: bool = False  # the collator takes what it needs
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])
    logging_strategy: str = "epoch"
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)
    # Without it, processes of torchrun on a machine without an accelerator train apart.
    use_cpu: bool = field(default_factory=lambda: torch.accelerator.current_accelerator(check_available=True) is None)
    log_on_each_node: bool = False
    hub_strategy: str = "end"
    focal_gamma: float = 0.0
    class_weights: str | None = None
    patience: int | None = 3
    max_false_positive_rate: float | None = None
    threshold_rule: str = "expected-f1"
    cache_states: bool = True
    cache_dir: str | None = None
    novelty: bool = True

    def __post_init__(self):
        if self.cache_dir is not None and not self.cache_states:
            raise ProbeError(f"cache_dir={self.cache_dir!r} and cache_states=False exclude each other")
        given = self.metric_for_best_model, self.greater_is_better
        super().__post_init__()
        # The parent takes the loss if no metric is given. The metric depends on the labels, which are not known yet.
        self.metric_for_best_model, self.greater_is_better = given
        self.recipe()

    def recipe(self) -> Recipe:
        """Return the hyper-parameters of training, with open fields."""
        return Recipe(
            label_smoothing=self.label_smoothing_factor,
            metric=self.metric_for_best_model,
            **{name: getattr(self, name) for name in SHARED},
        )

    def fill(self, recipe: Recipe) -> None:
        """Take what is open from a complete recipe, whose batch size is that of all processes."""
        self.label_smoothing_factor = 0.0  # the parent would smooth a second time
        if self.per_device_train_batch_size is None:
            devices = max(1, self.n_gpu) * self.world_size
            self.per_device_train_batch_size = math.ceil(recipe.per_device_train_batch_size / devices)
        for name in ("learning_rate", "num_train_epochs"):
            setattr(self, name, getattr(recipe, name))


# Fields of `Recipe` that are fields of `ProbeTrainingArguments` by the same name.
SHARED = tuple(item.name for item in fields(Recipe) if item.name not in ("label_smoothing", "metric"))
