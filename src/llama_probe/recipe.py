"""How a head is trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Recipe:
    """How a head is trained; the fields of `TrainingArguments` have their names there.

    Attributes:
        max_false_positive_rate: how the threshold is chosen, see `calibrate`.
    """

    learning_rate: float = 3e-4
    num_train_epochs: float = 8
    per_device_train_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    focal_gamma: float = 0.0
    class_weights: str | None = None
    patience: int | None = 3
    metric: str | None = None
    max_false_positive_rate: float | None = None
