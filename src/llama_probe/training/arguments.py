"""`ProbeTrainingArguments`: the arguments of a `ProbeTrainer`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from transformers import TrainingArguments

from ..data.sources import setting
from ..errors import ProbeError
from .recipe import Recipe


WARMUP = 0.1  # share of all steps


@dataclass
class ProbeTrainingArguments(TrainingArguments):
    """`TrainingArguments` for heads: cosine schedule, rows grouped by length, the best epoch kept.

    The arguments that are None are filled in by `ProbeTrainer`, from the kind of the head and the number of rows.

    Args:
        label_smoothing_factor, focal_gamma, class_weights: see `ProbeLoss` and `Recipe`.
        patience: stop after this many evaluations without a better metric. None: never.
        max_false_positive_rate, threshold_rule: how the threshold is chosen; see `Recipe`.
        cache_states: run the backbone once and keep its hidden states on disk while training.
        cache_dir: keep the states here for later runs. They can reveal the texts. Defaults to a folder that is deleted.
        novelty: fit how unlike the training data a prompt is, if the head can tell it and there are rows enough.
    """

    learning_rate: float | None = setting(None, "Peak learning rate. Default: by kind.")
    num_train_epochs: float | None = setting(None, "Epochs at most. Default: by number of rows.")
    per_device_train_batch_size: int | None = setting(None, "Rows a step and device. Default: by number of rows.")
    per_device_eval_batch_size: int = setting(32, "Rows a step and device in evaluation.")
    weight_decay: float = setting(0.05, "Weight decay.")
    label_smoothing_factor: float | None = setting(None, "Label smoothing. Default: by kind.")
    lr_scheduler_type: str = setting("cosine", "Schedule of the learning rate.")
    warmup_steps: float = setting(WARMUP, "Steps of the warmup; below 1 a share of all steps.")
    eval_strategy: str = setting("epoch", "When to evaluate. No, if there is no eval_dataset.")
    save_strategy: str = setting("epoch", "When to save a checkpoint, which holds only the head.")
    save_total_limit: int | None = setting(1, "Checkpoints to keep.")
    load_best_model_at_end: bool = setting(True, "Keep the epoch with the best metric.")
    restore_callback_states_from_checkpoint: bool = setting(True, "Resume the count of early stopping as well.")
    train_sampling_strategy: str = setting("group_by_length", "How rows are drawn.")
    remove_unused_columns: bool = setting(False, "Not for heads: their collator takes what it needs.")
    label_names: list[str] | None = setting(lambda: ["labels"], "Labels in a batch.")
    logging_strategy: str = setting("epoch", "When to log.")
    dataloader_pin_memory: bool = setting(torch.cuda.is_available, "Pin memory.")
    # Without it, processes of torchrun on a machine without an accelerator train apart.
    use_cpu: bool = setting(
        lambda: torch.accelerator.current_accelerator(check_available=True) is None, "Train on the CPU."
    )
    log_on_each_node: bool = setting(False, "Log on each node, or once.")
    hub_strategy: str = setting("end", "When to push: end, or every_save.")
    focal_gamma: float = setting(0.0, "Exponent of the focal loss; 0 for plain cross-entropy.")
    class_weights: str | None = setting(None, "'balanced', or one weight a label with commas.")
    patience: int | None = setting(3, "Stop after this many evaluations without a better metric.")
    max_false_positive_rate: float | None = setting(
        None, "Highest share of negative rows that the threshold may flag."
    )
    threshold_rule: str = setting("expected-f1", "expected-f1 or best-f1.")
    cache_states: bool = setting(True, "Run the backbone once and keep its hidden states on disk while training.")
    cache_dir: str | None = setting(None, "Keep the hidden states here for later runs.")
    novelty: bool = setting(True, "Fit novelty: how unlike the training data a prompt is.")

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
