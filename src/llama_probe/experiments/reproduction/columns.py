"""Metrics that `llama-probe reproduce` shows of each data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...data.known import find_benchmark
from .workbench import SAFETY


@dataclass(frozen=True)
class Column:
    """A metric of the test rows: its title, its path in a summary, and the paper's metric beside it."""

    title: str
    path: tuple[str, ...]
    paper: str | None = None

    def find(self, result: dict[str, Any]) -> dict[str, Any] | None:
        """Return `mean`, `std` (`None` for one run) and `runs`, or `None` if the metric is not defined."""
        value: Any = result["summary"]["test"]
        for key in self.path:
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, dict):
            return None
        runs = len(result["runs"])
        return {"mean": value["mean"], "std": value["std"] if runs > 1 else None, "runs": runs}


def columns(source: str) -> list[Column]:
    """Return the columns of a data set, as in the paper: F1 and AUPRC for safety, accuracy and F1 for the others."""
    name = find_benchmark(source)[0].name
    if name == "toxicchat":  # the paper tests on the human-annotated rows
        human = ("slices", "human_annotation", "True")
        return [
            Column("F1", ("f1",)),
            Column("AUPRC", ("auprc",)),
            Column("F1, human-annotated rows", (*human, "f1"), "f1"),
            Column("AUPRC, human-annotated rows", (*human, "auprc"), "auprc"),
        ]
    if name in SAFETY:
        return [Column("F1", ("f1",), "f1"), Column("AUPRC", ("auprc",), "auprc")]
    return [Column("accuracy", ("accuracy",), "accuracy"), Column("F1", ("f1",))]


def cell(value: dict[str, Any] | None) -> str:
    """Format a mean and its standard deviation."""
    if value is None:
        return "-"
    return f"{value['mean']:.3f}" + ("" if value["std"] is None else f" ± {value['std']:.3f}")
