"""The configurations that a sweep draws: kinds of heads and their hyper-parameters. This module is imported quickly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import numpy as np

from ..data.sources import setting
from ..errors import ProbeError
from ..heads import get_probe_type
from ..heads.configuration import ProbeConfig
from .recipe import COMMON, Recipe


_RECIPE_FIELDS = {item.metadata.get("option", item.name): item.name for item in fields(Recipe)}


@dataclass
class SearchSpace:
    """Kinds to search, by default those of arXiv 2601.13288, each over `COMMON` and its own `Aggregator.search_space`."""

    probe_types: Sequence[str] = setting(
        ("pooling", "gate", "mha"), "A kind to search, unless it is fitted. Repeatable.", "probe-type"
    )

    def __post_init__(self):
        if not self.probe_types:
            raise ProbeError("probe_types=[] must name at least one kind of head")
        for name in self.probe_types:
            if get_probe_type(name).convex:
                raise ProbeError(f"probe_type={name!r} is fitted and cannot be searched: use llama-probe train")

    def draw(self, base: ProbeConfig, number: int, seed: int) -> dict[str, Any]:
        """Draw a configuration at random. Kinds take turns.

        Args:
            base: config that the choices must fit.
            number, seed: of the draw. It does not depend on other draws.

        Returns:
            `probe_type` and the hyper-parameters by name: fields of `ProbeConfig`, options of the kind, and options of
            `llama-probe train`.
        """
        rng = np.random.default_rng((seed, number))
        kind = self.probe_types[number % len(self.probe_types)]
        space = {"probe_type": [kind], **COMMON, **get_probe_type(kind).search_space}
        choices = {name: values for name, values in space.items() if isinstance(values, list)}
        combined = [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
        rng.shuffle(combined)
        fitting = next((drawn for drawn in combined if _fits(base, drawn)), None)
        if fitting is None:
            raise ProbeError(f"probe_type={kind!r} has no choices that fit hidden_size={base.hidden_size}: {choices}")
        return {name: fitting[name] if name in fitting else _draw_from(rng, name, space[name]) for name in space}


def _draw_from(rng: np.random.Generator, name: str, limits: tuple[float, float]) -> float:
    if name == "learning_rate":
        return float(np.exp(rng.uniform(*np.log(limits))))
    return float(rng.uniform(*limits))


def _fits(base: ProbeConfig, drawn: dict[str, Any]) -> bool:
    try:
        base.replace(**split_drawn(drawn)[0])
    except ProbeError:
        return False
    return True


def split_drawn(drawn: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide a configuration of `SearchSpace.draw` into fields of `ProbeConfig` and fields of `Recipe`."""
    known = get_probe_type(drawn["probe_type"]).options
    recipe = {_RECIPE_FIELDS[name]: value for name, value in drawn.items() if name in _RECIPE_FIELDS}
    options = {name: value for name, value in drawn.items() if name in known}
    head = {name: value for name, value in drawn.items() if name not in options and name not in _RECIPE_FIELDS}
    return head | {"options": options}, recipe
