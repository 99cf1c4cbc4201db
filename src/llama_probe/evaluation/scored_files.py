"""Compares what a head says of served prompts with what it says of rows like its training data."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ProbeError, first_line
from ..files import JSON
from ..heads.novelty import FAR
from .bootstrap import share_interval


_DECILES = np.linspace(0, 1, 11)


def compare_scored_files(reference: str | os.PathLike, log: str | os.PathLike, head: str, top: int = 20) -> JSON:
    """Compare two files of scores of a head, as `llama-probe classify --input` writes them.

    Rows in which the head reads nothing do not count.

    Args:
        reference: scores of rows like the head's training data: a parquet file, or a folder of such files.
        log: scores of served prompts, in the same form.
        head: name of the head, with which the names of its columns begin.
        top: number of rows of the log to list as worth labelling.

    Returns:
        `rows`: by `reference` and `log` the number of rows.
        `novelty`, if the head tells it: by `reference` and `log` the `median`, and `far`, the share of rows above 0.99, with its
        95 % `interval`.
        `labels`, but for regression: by `reference` and `log` each label's `share` with its 95 % `interval`.
        `changed`, but for regression: the labels whose two intervals have no share in common.
        `scores`: by label the deciles of its probabilities (regression: of its values), by `reference` and `log`.
        `worth_labelling`: `file`, `row`, `novelty` and `unsure` of rows of the log that are new to the head, or whose two best
        labels are close, the most useful row first.

    Raises:
        ProbeError: a file cannot be read, has no scores of the head, or both have scores of different labels.
    """
    parts = {"reference": _Scored.read(reference, head), "log": _Scored.read(log, head)}
    names = parts["log"].names
    if parts["reference"].names != names:
        raise ProbeError(
            f"{reference} has scores of {', '.join(parts['reference'].names)}, {log} of {', '.join(names)}"
        )
    comparison: JSON = {"rows": {part: len(scored.rows) for part, scored in parts.items()}}
    if all(scored.novelty is not None for scored in parts.values()):
        comparison["novelty"] = {part: scored.novelty_summary() for part, scored in parts.items()}
    if parts["log"].labels is not None:
        labels = {part: scored.label_shares() for part, scored in parts.items()}
        comparison["labels"] = labels
        comparison["changed"] = [name for name in names if _are_apart(*(labels[part][name] for part in labels))]
    deciles = {part: np.quantile(scored.scores, _DECILES, axis=0).T.tolist() for part, scored in parts.items()}
    comparison["scores"] = {name: {part: deciles[part][index] for part in deciles} for index, name in enumerate(names)}
    comparison["worth_labelling"] = parts["log"].worth_labelling(top)
    return comparison


def _are_apart(part: JSON, other: JSON) -> bool:
    (low, high), (other_low, other_high) = part["interval"], other["interval"]
    return high < other_low or other_high < low


@dataclass
class _Scored:
    """The scores of a head for the rows of a file.

    Attributes:
        names: names of the labels.
        rows: `file` and `row` of each row.
        scores (`[rows, labels]`): probabilities, or the values of a regression head.
        labels: label of each row, or its labels; None for a regression head.
        novelty (`[rows]`): None if the head tells none.
    """

    names: list[str]
    rows: list[JSON]
    scores: np.ndarray
    labels: list[str] | list[list[str]] | None
    novelty: np.ndarray | None

    @classmethod
    def read(cls, path: str | os.PathLike, head: str) -> _Scored:
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise ProbeError(f"{path} cannot be read as parquet: {first_line(error)}") from error
        columns = {kind: f"{head}_{kind}" for kind in ("label", "probabilities", "values", "novelty")}
        columns = {kind: name for kind, name in columns.items() if name in table.column_names}
        scores = columns.get("probabilities", columns.get("values"))
        if scores is None:
            raise ProbeError(f"{path} has no scores of {head!r}; its columns: {', '.join(table.column_names)}")
        read = columns.get("novelty", scores)  # empty in rows in which the head reads nothing
        rows = [row for row in table.to_pylist() if row[read] is not None]
        if not rows:
            raise ProbeError(f"{path} has no row in which {head!r} reads something")
        names = [field.name for field in table.schema.field(scores).type]
        return cls(
            names=names,
            rows=[{"file": row.get("file"), "row": row.get("row", place)} for place, row in enumerate(rows)],
            scores=np.array([[row[scores][name] for name in names] for row in rows]),
            labels=[row[columns["label"]] for row in rows] if "label" in columns else None,
            novelty=np.array([row[columns["novelty"]] for row in rows]) if "novelty" in columns else None,
        )

    def novelty_summary(self) -> JSON:
        """Return `median`, and `far`, the share above 0.99, with its 95 % `interval`."""
        far = self.novelty > FAR
        interval = share_interval(int(far.sum()), len(far))
        return {"median": float(np.median(self.novelty)), "far": float(far.mean()), "interval": interval}

    def label_shares(self) -> JSON:
        """Return by label its `share` of the rows, and the 95 % `interval` of the share."""
        shares: JSON = {}
        for name in self.names:
            count = sum(name in label if isinstance(label, list) else name == label for label in self.labels or ())
            shares[name] = {"share": count / len(self.rows), "interval": share_interval(count, len(self.rows))}
        return shares

    def unsure(self) -> np.ndarray:
        """Return from 0 to 1 how unsure the head is of each row: 1 minus the gap between its two best labels."""
        if self.labels is not None and isinstance(self.labels[0], list):  # a row has each label, or has it not
            return 1 - np.abs(2 * self.scores - 1).min(axis=1)
        if self.labels is None or len(self.names) == 1:
            return np.zeros(len(self.rows))
        ranked = np.sort(self.scores, axis=1)
        return 1 - (ranked[:, -1] - ranked[:, -2])

    def worth_labelling(self, count: int) -> list[JSON]:
        unsure = self.unsure()
        novelty = np.zeros(len(self.rows)) if self.novelty is None else self.novelty
        best = np.argsort(-(novelty + unsure), kind="stable")[:count].tolist()
        return [self.rows[i] | {"novelty": float(novelty[i]), "unsure": float(unsure[i])} for i in best]
