"""The options of `llama-probe reproduce`. This module is imported quickly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...data.sources import setting
from ...errors import ProbeError
from ...heads import get_probe_type
from ...training.options import SWEEP_NAME
from .methods import HEADS, METHODS
from .workbench import SAFETY, known_source


PARTS = ("main", "ood", "downcast", "layers", "sensitivity", "few-labels")
DATA = ("toxicchat", "sst2", "emotion", "imdb")


@dataclass
class ReproductionOptions:
    """Options of a reproduction. The metadata of a field has its help.

    Attributes:
        data: data sets, see `Workbench.task`. `ood` uses the first safety data set. `downcast` and `sensitivity` use it too, or
            else the first data set.
        methods: some of `METHODS`. Defaults to all.
        only: some of `PARTS`. Defaults to all.

    Raises:
        ProbeError: a name is unknown, or a value not allowed.
    """

    output: Path = field(metadata={"help": "Folder for the report, the plots and the heads."})
    data: Sequence[str] = setting(DATA, "Data sets with commas, each NAME or NAME:SPLIT (the split to train on).")
    methods: Sequence[str] | None = setting(None, f"{', '.join(METHODS)}, with commas. Default: all.")
    only: Sequence[str] | None = setting(None, f"{', '.join(PARTS)}, with commas. Default: all.")
    epochs: int = setting(6, "Maximum number of epochs of each head.")
    patience: int = setting(3, "Stop a head after this many epochs without gain.")
    shots: int = setting(4, "Examples of each label in few-shot prompts.")
    trials: int = setting(12, "Configurations of the sweep for sensitivity.")
    sweep: Path | None = setting(None, "Folder of a finished sweep to read sensitivity from, instead of a new one.")

    def __post_init__(self):
        wanted = METHODS if self.methods is None else self.methods
        if not wanted or set(wanted) - set(METHODS):
            raise ProbeError(f"methods={','.join(wanted)!r} must name some of: {', '.join(METHODS)}")
        self.methods = [name for name in METHODS if name in wanted]  # in the order of the tables
        for name in self.only or ():
            if name not in PARTS:
                raise ProbeError(f"only={name!r} is not allowed; allowed: {', '.join(PARTS)}")
        if not self.data or len(set(self.data)) != len(self.data):
            raise ProbeError(f"data={','.join(self.data)!r} must name at least one data set, each once")
        for source in self.data:
            known_source(source)
        for name in ("epochs", "patience", "shots", "trials"):
            if (value := getattr(self, name)) < 1:
                raise ProbeError(f"{name}={value} must be at least 1")
        if self.sweep is not None and "sensitivity" not in (self.only or PARTS):
            raise ProbeError(f"sweep={self.sweep} is read for sensitivity: add it to only, or leave sweep out")
        if self.sweep is not None and not (self.sweep / SWEEP_NAME).is_file():
            raise ProbeError(f"sweep={self.sweep} holds no {SWEEP_NAME}: give the folder of a finished sweep")
        ood = self._safety_source and self._ood_methods
        for name, found in {"ood": ood, "layers": self._layered, "few-labels": self._trained_kinds}.items():
            if name in (self.only or ()) and not found:
                raise ProbeError(f"only={name!r} has nothing to do with these data and methods")
        self.only = list(self.only or PARTS)

    @property
    def _safety_source(self) -> str | None:
        return next((source for source in self.data if known_source(source).name in SAFETY), None)

    @property
    def _primary(self) -> str:
        return self._safety_source or self.data[0]

    @property
    def _ood_methods(self) -> list[str]:
        return [name for name in self.methods if name in HEADS or name == "tfidf"]

    @property
    def _layered(self) -> list[str]:
        kinds = {name: method.head["probe_type"] for name, method in HEADS.items()}
        weighted = {name for name, kind in kinds.items() if kind != "pooling" and get_probe_type(kind).reads == "all"}
        return [name for name in self.methods if name in weighted]

    @property
    def _trained_kinds(self) -> list[str]:
        """Trained methods that are a kind of head without changes, for the comparison on few labels."""
        kinds = [name for name, method in HEADS.items() if method.head["probe_type"] == name and not method.convex]
        return [name for name in self.methods if name in kinds]
