"""A search: configurations that are drawn at random and trained side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from ..errors import ProbeError
from ..files import JSON
from ..heads import get_probe_type
from ..heads.configuration import ProbeConfig


# Hyper-parameters of every head type, with the ranges of arXiv 2601.13288. A tuple is a range, a list has choices.
SEARCH_SPACE = {
    "learning_rate": (1e-5, 3e-3),
    "weight_decay": (0.0, 0.05),
    "label_smoothing_factor": (0.0, 0.1),
    "dropout": (0.0, 0.4),
    "layer_dropout": (0.0, 0.3),
}
# Training arguments that may differ among heads side by side.
HEAD_ARGS = ("learning_rate", "weight_decay", "label_smoothing_factor", "focal_gamma", "class_weights")
_ATTEMPTS = 100  # draws for one trial that fits the backbone


@dataclass(kw_only=True)
class Search:
    """Configurations to try beside each other. The best by validation is kept.

    Args:
        trials: number of configurations; 0 for no search.
        probe_types: head types to draw from.
    """

    trials: int = 0
    probe_types: list[str] = field(default_factory=lambda: ["pooling", "gate", "mha"])

    def __post_init__(self):
        for name in self.probe_types:
            get_probe_type(name)  # raises


@dataclass
class Candidate:
    """A head to train, with the values that a search drew, and the rows of `train` that the head does not learn from."""

    seed: int
    config: ProbeConfig
    values: JSON = field(default_factory=dict)
    left_out: Sequence[int] = ()

    @property
    def training(self) -> JSON:
        """The training arguments that differ from those of other heads."""
        return {name: self.values[name] for name in HEAD_ARGS if name in self.values}


def draw_candidates(search: Search, base: ProbeConfig, seed: int) -> dict[str, Candidate]:
    """Draw the configurations of a search at random, for the head types in turn."""
    generator = np.random.default_rng(seed)
    candidates: dict[str, Candidate] = {}
    for number in range(search.trials):
        name = search.probe_types[number % len(search.probe_types)]
        candidates[f"trial-{number}"] = _draw_candidate(generator, name, base, seed)
    return candidates


def _draw_candidate(generator: np.random.Generator, name: str, base: ProbeConfig, seed: int) -> Candidate:
    """Draw configurations of a head type until one fits the backbone, whose sizes `base` has."""
    head_type = get_probe_type(name)
    for _ in range(_ATTEMPTS):
        values: JSON = {}
        for field_name, choices in (SEARCH_SPACE | head_type.search_space).items():
            if isinstance(choices, list):
                values[field_name] = choices[generator.integers(len(choices))]
            elif field_name == "learning_rate":
                values[field_name] = math.exp(generator.uniform(*map(math.log, choices)))
            else:
                values[field_name] = generator.uniform(*choices)
        options = {field: value for field, value in values.items() if field in head_type.options}
        head = {field: value for field, value in values.items() if field not in HEAD_ARGS and field not in options}
        with suppress(ProbeError):
            config = base.replace(probe_type=name, **head, options=options)
            return Candidate(seed, config, {"probe_type": name, **values})
    raise ProbeError(f"probe_type={name!r} has no choices that fit hidden_size={base.hidden_size}")
