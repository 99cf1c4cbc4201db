"""The methods that are compared: heads with their recipes, and the baselines. This module is imported quickly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...heads import get_probe_type
from ...training.recipe import Recipe, complete
from .. import paper


@dataclass(frozen=True)
class HeadMethod:
    """A head and its training.

    Attributes:
        head: fields of `ProbeConfig`.
        recipe: a complete one. Its epochs are not read.
        each_layer: train one head a layer, and choose the layer by validation rows.
        every: read the states 0, `every`, 2 `every`, ...
    """

    head: dict[str, Any]
    recipe: Recipe
    each_layer: bool = False
    every: int = 1

    @classmethod
    def create(
        cls, kind: str, options: dict[str, Any] | None = None, learning_rate: float | None = None, **which
    ) -> HeadMethod:
        """Return a kind with its own recipe."""
        head = {"probe_type": kind, "normalize": get_probe_type(kind).normalize, "options": options or {}}
        recipe, head = complete(Recipe(learning_rate, per_device_train_batch_size=32), head, rows=0)
        return cls(head, recipe, **which)

    @property
    def convex(self) -> bool:
        """True if the head is fitted as a convex problem, without a seed."""
        return get_probe_type(self.head["probe_type"]).convex


# In the order of the tables.
HEADS: dict[str, HeadMethod] = {
    "layer-linear": HeadMethod.create("pooling", each_layer=True),
    "last-token": HeadMethod.create("last"),
    **{kind: HeadMethod.create(kind) for kind in ("muli", "pooling", "gate", "attentive", "mha")},
    "multimax-small": HeadMethod.create("multimax", {"num_maxima": 1, "num_members": 7}),
    "multimax-half": HeadMethod.create("multimax", {"num_maxima": 2, "num_members": 7}, learning_rate=5e-3, every=2),
    "multimax": HeadMethod.create("multimax"),
}
METHODS = ("tfidf", "zero-shot", "few-shot", "prototypes", *HEADS)  # the first four are scored by `baselines`


def downcast_methods(hidden_size: int) -> dict[str, HeadMethod]:
    """Return `mha` with each downcast that divides the hidden size: the paper's ablation (arXiv 2601.13288, table 7)."""
    base, found = HEADS["mha"], {}
    for value in paper.DOWNCAST:
        if hidden_size % value == 0:
            heads = next(number for number in (2, 3, 1) if hidden_size // value % number == 0)
            found[str(value)] = replace(base, head={**base.head, "downcast": value, "num_attention_heads": heads})
    return found
