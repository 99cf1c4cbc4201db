"""`ProbeTrainingArguments`: the arguments of a `ProbeTrainer`."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from ..evaluation.metrics import default_metric
from ..files import JSON
from ..heads import get_probe_type
from ..heads.configuration import ProbeConfig
from ..heads.rules import Rule, check_fields
from .defaults import SCHEDULES
from .loss import MONOTONE


_POSITIVE: Rule = ("above 0", lambda value: 0 < value < math.inf)
_NOT_NEGATIVE: Rule = ("at least 0", lambda value: 0 <= value < math.inf)
_COUNT: Rule = ("at least 1 and below 2**31", lambda value: 1 <= value < 2**31)
_RULES: dict[str, Rule] = {
    "learning_rate": _POSITIVE,
    "num_train_epochs": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "focal_gamma": _NOT_NEGATIVE,
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "patience": ("at least 1, or None", lambda value: value is None or 1 <= value < 2**31),
    "cache_states": ("True, False or 'auto'", lambda value: value in (True, False, "auto")),
    "token_loss": (f"{MONOTONE!r}, or left out", lambda value: value == MONOTONE),
}


@dataclass
class ProbeTrainingArguments(TrainingArguments):
    """`TrainingArguments` for heads: a cosine schedule, rows grouped by length, and the weights of the best epoch.

    Args:
        learning_rate: step size of the optimizer. Defaults to the learning rate of the head type.
        num_train_epochs: epochs at most. Defaults to a choice by the number of rows.
        per_device_train_batch_size: rows of a step on a device; in a recipe on all devices. Defaults to a choice by the number of rows.
        label_smoothing_factor: share of the target that is spread over the labels. Defaults to the factor of the head type.
        train_sampling_strategy: rows of similar length in a batch, which pads less.
        load_best_model_at_end: keep the weights of the best evaluation, in memory and in checkpoints. It needs evaluations,
            and no checkpoints.
        focal_gamma: exponent of the focal loss; 0 for plain cross-entropy.
        token_loss: for heads that follow replies. `"monotone"`: learn from the score after each token; see `monotone_loss`.
            None: learn from the score of the whole reply, half of the time of a part of the reply.
        class_weights: `"balanced"`, or one weight a label: a list, or numbers with commas.
        patience: stop after this many evaluations without a better metric. None: never. It needs `load_best_model_at_end`.
        max_false_positive_rate: choose the threshold of the highest recall that flags at most this share of the negative
            evaluation rows. Defaults to `threshold_rule`.
        threshold_rule: `"expected-f1"`, the threshold of the best F1 that a logistic fit to the evaluation rows expects, or
            `"best-f1"`, the threshold of the best F1 on these rows, which depends more on chance.
        hub_strategy: when to push: `"end"` or `"every_save"`.
        cache_states: run the backbone once and keep its hidden states on disk while training. `"auto"`: if they fit on the disk,
            and there is more than one epoch or a `cache_dir`.
        cache_dir: folder that keeps the states for later runs. States can reveal the texts. Defaults to a folder that is deleted.
        novelty: fit how unlike the training data a prompt is, if the head can tell it and there are rows enough.

    Raises:
        ProbeError: a number is not allowed.
    """

    learning_rate: float | None = None
    num_train_epochs: float | None = None
    per_device_train_batch_size: int | None = None
    per_device_eval_batch_size: int = 32
    weight_decay: float = 0.05
    label_smoothing_factor: float | None = None
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1  # share of all steps
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int | None = 1
    load_best_model_at_end: bool = True
    train_sampling_strategy: str = "group_by_length"
    remove_unused_columns: bool = False  # the collator takes the columns that a batch needs
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])
    logging_strategy: str = "epoch"
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)
    # Processes of torchrun on a machine without an accelerator train apart unless `use_cpu` is set.
    use_cpu: bool = field(default_factory=lambda: torch.accelerator.current_accelerator(check_available=True) is None)
    log_on_each_node: bool = False
    hub_strategy: str = "end"
    focal_gamma: float = 0.0
    token_loss: str | None = None
    class_weights: str | None = None  # or a list; `HfArgumentParser` takes one type
    patience: int | None = 3
    max_false_positive_rate: float | None = None
    threshold_rule: str = "expected-f1"
    cache_states: Literal["auto", True, False] = "auto"  # `HfArgumentParser` takes no `bool | str`
    cache_dir: str | None = None
    novelty: bool = True

    def __post_init__(self):
        check_fields(self, _RULES)
        if self.cache_dir is not None:
            self.cache_dir = os.path.expanduser(self.cache_dir)
        chosen = self.metric_for_best_model, self.greater_is_better, self.load_best_model_at_end
        self.load_best_model_at_end = False  # the parent's needs a checkpoint for each evaluation
        super().__post_init__()
        # The parent takes the loss if no metric is given. The metric depends on the labels, which are not known yet.
        self.metric_for_best_model, self.greater_is_better, self.load_best_model_at_end = chosen
        self.gradient_checkpointing = self.activation_checkpointing = False  # a frozen backbone keeps no activations

    def fill(self, config: ProbeConfig, rows: int, batch_size: int | None = None) -> None:
        """Choose the arguments that are open by the head and the number of training rows. `batch_size` counts all devices."""
        epochs, default_size = next(entry[1:] for entry in SCHEDULES if rows <= entry[0])
        open_fields = {
            "num_train_epochs": epochs,
            "per_device_train_batch_size": math.ceil((batch_size or default_size) / self.world_size),
            "metric_for_best_model": default_metric(config),
            **self.open_for(config),
        }
        for name, value in open_fields.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")

    def open_for(self, config: ProbeConfig) -> JSON:
        """Return the arguments that are open and follow from the type of a head."""
        defaults = get_probe_type(config.probe_type).training_defaults
        return {name: value for name, value in defaults.items() if hasattr(self, name) and getattr(self, name) is None}

    def check(self) -> None:
        """Raise now for a logger, an optimizer or a schedule that the Trainer could not make after the pass of the backbone."""
        for callback in get_reporting_integration_callbacks(self.report_to):
            callback()
        Trainer.get_optimizer_cls_and_kwargs(self)
        get_scheduler(self.lr_scheduler_type, torch.optim.SGD([torch.zeros(1)]), 1, 1000, self.lr_scheduler_kwargs)

    @property
    def n_gpu(self) -> int:
        """The accelerators of this process, one at most: the parent would divide each batch among several accelerators."""
        return min(super().n_gpu, 1)

    @property
    def replies(self) -> Literal["cut", "tokens"]:
        """The argument `replies` of the `TrainingRows` that a head learns from."""
        return "cut" if self.token_loss is None else "tokens"

    @property
    def metric(self) -> str:
        """The metric that chooses a head, by its name in results."""
        return self.metric_for_best_model.removeprefix("eval_")

    def describe(self) -> JSON:
        """Return the arguments that `results.json` keeps, with the rows of a step on all processes."""
        names = ["learning_rate", "num_train_epochs", "gradient_accumulation_steps", "weight_decay", "focal_gamma"]
        names += ["class_weights", "patience", "metric", "max_false_positive_rate", "threshold_rule"]
        described = {name: getattr(self, name) for name in [*names, "label_smoothing_factor"]}
        described["per_device_train_batch_size"] = self.train_batch_size * self.world_size
        if self.token_loss is not None:
            described["token_loss"] = self.token_loss
        return described
