"""How a head is trained, and what is chosen where the user leaves it open."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from ..errors import ProbeError
from ..evaluation.calibration import EXPECTED_F1


AUTO = "auto"


@dataclass
class Recipe:
    """How a head is trained; the fields of `TrainingArguments` have their names there.

    Attributes:
        learning_rate, num_train_epochs, per_device_train_batch_size, label_smoothing: `None` for what suits the kind and the
            number of rows; see `complete`. The batch is that of a single process; several share it (rounded up to a number
            that they can divide), so that a recipe means the same whatever it runs on.
        patience: epochs without a better metric after which a training stops. With folds no head is stopped.
        max_false_positive_rate, threshold_rule: how the threshold is chosen, see `calibrate`.

    Raises:
        ProbeError: a number is not allowed.
    """

    learning_rate: float | None = field(default=None, metadata={"help": "Peak learning rate. Default: by kind."})
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Maximum number of epochs. Default: by number of rows.", "option": "epochs"}
    )
    per_device_train_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows a step, over all processes. Default: by number of rows.", "option": "batch-size"},
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Steps to accumulate before each update."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay."})
    label_smoothing: float | None = field(
        default=None, metadata={"help": "Label smoothing. Default: by kind (0.05, for muli 0)."}
    )
    focal_gamma: float = field(default=0.0, metadata={"help": "Gamma of the focal loss; 0 for none."})
    class_weights: str | None = field(
        default=None, metadata={"help": "'balanced', or one weight a label with commas."}
    )
    patience: int | None = field(default=3, metadata={"help": "Stop after this many epochs without a better metric."})
    metric: str | None = field(
        default=None, metadata={"help": "Validation metric to choose by. Default: by problem type."}
    )
    max_false_positive_rate: float | None = field(
        default=None,
        metadata={
            "help": "Choose the threshold with the highest recall that flags at most this share of the negative validation rows, such as 0.01. Default: --threshold-rule."
        },
    )
    threshold_rule: str = field(
        default=EXPECTED_F1,
        metadata={
            "help": "expected-f1: threshold of the best F1 that a logistic fit to the validation rows expects; best-f1: threshold of the best F1 on these rows, which depends more on chance."
        },
    )

    def __post_init__(self):
        for name in ("learning_rate", "num_train_epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ProbeError(f"{name}={value} must be above 0")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "patience"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                raise ProbeError(f"{name}={value} must be at least 1 and below 2**31")
        for name in ("weight_decay", "focal_gamma"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ProbeError(f"{name}={value} must be at least 0")


@dataclass(frozen=True)
class Schedule:
    """Epochs and batch size that suit a number of training rows, and the kind that does best with so many."""

    up_to: float
    num_train_epochs: int
    per_device_train_batch_size: int
    probe_type: str


@dataclass(frozen=True)
class Regularization:
    """What suits a kind."""

    learning_rate: float
    dropout: float
    layer_dropout: float
    label_smoothing: float = 0.05


# Chosen by validation rows on the demo backbone: with few rows (`learning_curves` of SST-2 and ToxicChat, 3 draws) the kinds
# with few parameters do as well as any, and fewer rows need more passes over them. With thousands (4 folds of ToxicChat,
# validation rows of SST-2 and Emotion) `multimax` leads.
SCHEDULES = (
    Schedule(32, 40, 8, "pooling"),
    Schedule(128, 20, 16, "pooling"),
    Schedule(512, 12, 16, "gate"),
    Schedule(float("inf"), 8, 32, "multimax"),
)
KINDS = {
    "pooling": Regularization(1e-2, 0.1, 0.0),
    "gate": Regularization(1e-2, 0.1, 0.0),
    "last": Regularization(1e-2, 0.1, 0.0),
    "mha": Regularization(1e-3, 0.2, 0.1),
    "attentive": Regularization(1e-2, 0.2, 0.1),
    "multimax": Regularization(3e-3, 0.1, 0.1),
    "muli": Regularization(1e-3, 0.0, 0.0, label_smoothing=0.0),  # fitted: only its L1 penalty regularises
}
OTHER = KINDS["mha"]


def complete(recipe: Recipe, head: dict[str, Any], rows: int) -> tuple[Recipe, dict[str, Any]]:
    """Fills in what was left open.

    Args:
        recipe: fields that are `None` are chosen.
        head: fields of `ProbeConfig`. `probe_type="auto"`, `dropout=None` and `layer_dropout=None` are chosen.
        rows: number of training rows.

    Returns:
        Copies without anything open.
    """
    schedule = next(entry for entry in SCHEDULES if rows <= entry.up_to)
    kind = head.get("probe_type", AUTO)
    kind = schedule.probe_type if kind == AUTO else kind
    suited = KINDS.get(kind, OTHER)
    chosen = {
        "learning_rate": suited.learning_rate,
        "label_smoothing": suited.label_smoothing,
        "num_train_epochs": schedule.num_train_epochs,
        "per_device_train_batch_size": schedule.per_device_train_batch_size,
    }
    open_fields = {name: value for name, value in chosen.items() if getattr(recipe, name) is None}
    full = {**head, "probe_type": kind}
    for name in ("dropout", "layer_dropout"):
        if full.get(name) is None:
            full[name] = getattr(suited, name)
    return dataclasses.replace(recipe, **open_fields), full
