"""The methods that are compared, in one table: heads with their recipes, and the baselines."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ...errors import ProbeError
from ...experiments import paper
from ...heads import get_probe_type, probe_types
from ...heads.configuration import ProbeConfig
from ...training.learners import Candidate
from ...training.trainer import ProbeLoss
from .baselines import BASELINES


@dataclass(frozen=True)
class HeadMethod:
    """A head and how it is trained.

    Attributes:
        head: fields of `ProbeConfig`.
        learning_rate, weight_decay, label_smoothing, batch_size: as in `Recipe`.
        each_layer: one head a layer is trained, and the layer chosen by validation rows.
        every: the head reads the states 0, `every`, 2 `every`, ...
    """

    head: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    batch_size: int = 32
    each_layer: bool = False
    every: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        """What its results depend on."""
        return asdict(self)

    @property
    def convex(self) -> bool:
        """Whether the head is fitted, and not trained: it then has no seed."""
        return get_probe_type(self.head["probe_type"]).convex

    def candidates(self, name: str, base: ProbeConfig, seed: int) -> list[Candidate]:
        """What to train for a seed: one candidate, or one a layer.

        A candidate's number, on which its dropout depends, follows from its name and seed: results do not depend on which
        other methods are trained beside it.
        """
        config = base.replace(**self.head)
        states = range(0, config.num_hidden_layers + 1, self.every)
        if self.every > 1:
            config = config.replace(layers=list(states))
        found = []
        for layer in states if self.each_layer else [None]:
            own = config if layer is None else config.replace(layers=[layer])
            number = zlib.crc32(f"{name}/{layer}/{seed}".encode())
            loss = ProbeLoss(own, label_smoothing=self.label_smoothing)
            rates = {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}
            found.append(Candidate(number, own, loss, **rates, batch_size=self.batch_size, seed=seed))
        return found


def _suited(kind: str, options: dict[str, Any] | None = None, **further) -> HeadMethod:
    """A kind with what suits it, but for what is said; see `llama_probe.training.recipe`."""
    suited = get_probe_type(kind).recipe
    head: dict[str, Any] = {"probe_type": kind, **{name: suited[name] for name in ("dropout", "layer_dropout")}}
    if options:
        head["options"] = options
    own = {name: suited[name] for name in ("learning_rate", "label_smoothing")}
    return HeadMethod(head, **own | further)


HEADS: dict[str, HeadMethod] = {
    "layer-linear": _suited("pooling", each_layer=True),
    "last-token": _suited("last"),
    "muli": HeadMethod({"probe_type": "muli", "normalize": "none"}, label_smoothing=0.0),
    **{kind: _suited(kind) for kind in ("pooling", "gate", "attentive", "mha")},
    "multimax-small": _suited("multimax", options={"num_maxima": 1, "num_members": 7}),
    "multimax-half": _suited("multimax", {"num_maxima": 2, "num_members": 7}, every=2, learning_rate=5e-3),
    "multimax": _suited("multimax"),
}


def head_methods() -> dict[str, HeadMethod]:
    """Those of `HEADS` whose kind is registered, and every other registered kind."""
    kinds = probe_types()
    found = {name: method for name, method in HEADS.items() if method.head["probe_type"] in kinds}
    covered = {method.head["probe_type"] for method in found.values()}
    for kind in kinds:
        if kind not in covered:
            found[kind] = _suited(kind)
    return found


def method_names() -> list[str]:
    """All methods: baselines, then heads."""
    return [*BASELINES, *head_methods()]


def check_methods(names: Iterable[str]) -> list[str]:
    """The names, in the order of the table.

    Raises:
        ProbeError: there is none, or one is not known.
    """
    wanted = list(names)
    for name in wanted:
        if name not in method_names():
            raise ProbeError(f"method {name!r} is not known; allowed: {', '.join(method_names())}")
    if not wanted:
        raise ProbeError(f"there is no method to compare; allowed: {', '.join(method_names())}")
    return [name for name in method_names() if name in wanted]


def downcast_methods(hidden_size: int) -> dict[str, HeadMethod]:
    """`mha` with each downcast that divides the hidden size: the paper's ablation (arXiv 2601.13288, table 7)."""
    base = HEADS["mha"]
    found = {}
    for value in paper.DOWNCAST:
        if hidden_size % value == 0:
            heads = next(number for number in (2, 3, 1) if hidden_size // value % number == 0)
            head = {**base.head, "downcast": value, "num_attention_heads": heads}
            found[str(value)] = replace(base, head=head)
    return found
