"""Hyper-parameters of training, and defaults for those that the user does not set."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from ..backbone.loading import backbone_target, model_id
from ..data.sources import setting
from ..data.texts import LabelledTexts
from ..errors import ProbeError
from ..heads import get_probe_type, probe_types
from ..heads.configuration import ProbeConfig


AUTO = "auto"
Metric = Literal["accuracy", "f1", "precision", "recall", "auprc", "auroc", "r2"]


@dataclass
class Recipe:
    """Hyper-parameters of training. Fields of `TrainingArguments` have their names there.

    `complete` fills in the fields that default to None, except `patience`, `metric`, `class_weights` and
    `max_false_positive_rate`.

    Attributes:
        per_device_train_batch_size: rows of a step over all processes: each process gets an equal share, rounded up.
        patience: epochs. None, or training with folds: no head stops early.

    Raises:
        ProbeError: a number is not allowed.
    """

    learning_rate: float | None = setting(None, "Peak learning rate. Default: by kind.")
    num_train_epochs: float | None = setting(None, "Epochs at most. Default: by number of rows.", "epochs")
    per_device_train_batch_size: int | None = setting(
        None, "Rows a step, over all processes. Default: by number of rows.", "batch_size"
    )
    gradient_accumulation_steps: int = setting(1, "Steps to accumulate before each update.")
    weight_decay: float = setting(0.05, "Weight decay.")
    label_smoothing: float | None = setting(None, "Label smoothing. Default: by kind (0.05).")
    focal_gamma: float = setting(0.0, "Exponent of the focal loss; 0 for plain cross-entropy.")
    class_weights: str | None = setting(None, "'balanced', or one weight a label with commas.")
    patience: int | None = setting(3, "Stop after this many epochs without a better metric.")
    metric: Metric | None = setting(None, "Validation metric to choose by. Default: by problem type.")
    max_false_positive_rate: float | None = setting(
        None,
        "Choose the threshold of the highest recall that flags at most this share of the negative validation rows, "
        "such as 0.01. Default: --threshold-rule.",
    )
    threshold_rule: Literal["expected-f1", "best-f1"] = setting(
        "expected-f1",
        "expected-f1: the threshold of the best F1 that a logistic fit to the validation rows expects. best-f1: that of "
        "the rows themselves, which depends more on chance.",
    )

    def __post_init__(self):
        for name in ("learning_rate", "num_train_epochs"):
            self._check(name, lambda value: 0 < value < math.inf, "above 0")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "patience"):
            self._check(name, lambda value: 1 <= value < 2**31, "at least 1 and below 2**31")
        for name in ("weight_decay", "focal_gamma"):
            self._check(name, lambda value: 0 <= value < math.inf, "at least 0")

    def _check(self, name: str, is_allowed, allowed: str) -> None:
        value = getattr(self, name)
        if value is not None and not is_allowed(value):
            raise ProbeError(f"{name}={value} must be {allowed}")


# Hyper-parameters of every kind, with the ranges of arXiv 2601.13288. A tuple is a range, a list has choices.
COMMON = {
    "learning_rate": (1e-5, 3e-3),
    "batch_size": [8, 16, 32, 64],
    "weight_decay": (0.0, 0.05),
    "label_smoothing": (0.0, 0.1),
    "dropout": (0.0, 0.4),
    "layer_dropout": (0.0, 0.3),
}

# Rows at most, epochs, batch size. Chosen on validation rows of the demo backbone: fewer rows need more passes over them.
SCHEDULES = ((32, 40, 8), (128, 20, 16), (512, 12, 16), (math.inf, 8, 32))


def complete(recipe: Recipe, head: dict[str, Any], rows: int) -> tuple[Recipe, dict[str, Any]]:
    """Return copies in which the open fields are filled in, from the kind of the head and the number of rows.

    In `head`, fields of `ProbeConfig`, these are `probe_type="auto"` (or none) and dropouts that are None.
    """
    name = head.get("probe_type", AUTO)
    if name == AUTO:
        # As a class declares it itself: a kind that derives from another is not chosen in its place.
        suited = {name: vars(get_probe_type(name)).get("auto_up_to", 0) for name in probe_types()}
        name = min((name for name, up_to in suited.items() if rows <= up_to), key=suited.get)
    _, epochs, batch_size = next(entry for entry in SCHEDULES if rows <= entry[0])
    defaults = {"num_train_epochs": epochs, "per_device_train_batch_size": batch_size, **get_probe_type(name).recipe}
    own = {item.name for item in fields(Recipe)}
    found = {key: value for key, value in defaults.items() if key in own and getattr(recipe, key) is None}
    further = {key: value for key, value in defaults.items() if key not in own and head.get(key) is None}
    return replace(recipe, **found), {**head, "probe_type": name, **further}


def check_head(head: dict[str, Any]) -> None:
    """Raise `ProbeError` for fields of `ProbeConfig` that are not allowed. A kind that is not chosen yet allows all."""
    if head.get("probe_type", AUTO) != AUTO:
        ProbeConfig(**{name: value for name, value in head.items() if value is not None})


def head_config(head: dict[str, Any], rows: LabelledTexts, backbone: str | None) -> ProbeConfig:
    """Return the config of a new head for the labels of its training rows.

    Args:
        head: fields of `ProbeConfig`, as `complete` returns them. `token_scope` defaults to `"last_user"`.
        backbone: name of the backbone, whose sizes are checked before it is loaded. None: it is loaded.

    Raises:
        ProbeError: a field is not allowed or does not fit the backbone, or the Hub does not answer.
    """
    target = None if backbone is None else backbone_target(backbone)
    known = {
        "token_scope": "last_user",
        "hidden_size": target and target.hidden_size,
        "num_hidden_layers": target and target.num_hidden_layers,
        "base_model_name_or_path": backbone and model_id(backbone),
        "flagged": rows.flagged,
    }
    labels = {"id2label": dict(enumerate(rows.label_names)), "problem_type": rows.problem_type}
    return ProbeConfig(**{**known, **head, **labels})
