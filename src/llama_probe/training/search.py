"""A search: configurations that Optuna draws, trained side by side."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..errors import ProbeError
from ..files import JSON
from ..heads import get_probe_type
from ..heads.configuration import ProbeConfig
from ..heads.rules import Rule, check_fields


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
_RULES: dict[str, Rule] = {
    "trials": ("at least 0", lambda value: value >= 0),
    "probe_types": ("at least one head type", bool),
}
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
        check_fields(self, _RULES)
        for name in self.probe_types:
            get_probe_type(name)  # raises


@dataclass
class Candidate:
    """A head to train.

    Attributes:
        values: what a search drew for it, by name.
        left_out: rows of `RecipeRows.train` that it does not learn from.
    """

    seed: int
    config: ProbeConfig
    values: JSON = field(default_factory=dict)
    left_out: Sequence[int] = ()

    @property
    def training(self) -> JSON:
        """The training arguments that differ from those of other heads."""
        return {name: self.values[name] for name in HEAD_ARGS if name in self.values}


def draw_candidates(search: Search, base: ProbeConfig, seed: int) -> dict[str, Candidate]:
    """Draw the configurations of a search over `SEARCH_SPACE` and the head types' own `search_space`, by head."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # A study for each head type, because types may give a field of the same name other choices.
    studies = {}
    for place, name in enumerate(search.probe_types):
        studies[name] = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed + place))
    candidates: dict[str, Candidate] = {}
    for number in range(search.trials):
        name = search.probe_types[number % len(search.probe_types)]
        candidates[f"trial-{number}"] = _draw_candidate(studies[name], name, base, seed)
    return candidates


def _draw_candidate(study: Any, name: str, base: ProbeConfig, seed: int) -> Candidate:
    """Draw configurations of a head type until one fits the backbone, whose sizes `base` has."""
    head_type = get_probe_type(name)
    for _ in range(_ATTEMPTS):
        values = _draw(study.ask(), SEARCH_SPACE | head_type.search_space)
        options = {field: value for field, value in values.items() if field in head_type.options}
        head = {field: value for field, value in values.items() if field not in HEAD_ARGS and field not in options}
        with suppress(ProbeError):
            config = base.replace(probe_type=name, **head, options=options)
            return Candidate(seed, config, {"probe_type": name, **values})
    raise ProbeError(f"probe_type={name!r} has no choices that fit hidden_size={base.hidden_size}")


def _draw(trial: Any, space: dict[str, tuple[float, float] | list[Any]]) -> JSON:
    """Let an Optuna trial draw a value for each name: of a range, or of a list of choices."""
    values: JSON = {}
    for name, choices in space.items():
        if isinstance(choices, list):
            values[name] = trial.suggest_categorical(name, choices)
        else:
            values[name] = trial.suggest_float(name, *choices, log=name == "learning_rate")
    return values
