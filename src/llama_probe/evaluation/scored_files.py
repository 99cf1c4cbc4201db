"""Compare what a head says of served prompts with what it says of rows like its training data."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ProbeError, first_line
from ..files import JSON
from ..heads.novelty import FAR
from .bootstrap import share_of


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
        `novelty`, if the head tells novelty: by `reference` and `log` the `median`, and `far`, the share of rows above 0.99, with
        its 95 % `interval`.
        `labels`, but for regression: by `reference` and `log` each label's `share` with its 95 % `interval`.
        `changed`, but for regression: the labels whose two intervals have no share in common.
        `scores`: by label the deciles of its probabilities (regression: of its values), by `reference` and `log`.
        `worth_labelling`: `file`, `row`, `novelty` and `unsure` of rows of the log that are new to the head, or whose two best
        labels are close, the most useful row first.

    Raises:
        ProbeError: a file cannot be read or has no scores of the head, or the two files have scores of different labels.
    """
    parts = {"reference": _read(reference, head), "log": _read(log, head)}
    names = list(parts["log"][0]["scores"])
    other_names = list(parts["reference"][0]["scores"])
    if other_names != names:
        raise ProbeError(f"{reference} has scores of {', '.join(other_names)}, {log} of {', '.join(names)}")
    comparison: JSON = {"rows": {part: len(rows) for part, rows in parts.items()}}
    if all("novelty" in rows[0] for rows in parts.values()):
        comparison["novelty"] = {part: _novelty_summary(rows) for part, rows in parts.items()}
    if "label" in parts["log"][0]:
        shares = {part: _label_shares(rows, names) for part, rows in parts.items()}
        comparison["labels"] = shares
        comparison["changed"] = [name for name in names if _differ(shares["reference"][name], shares["log"][name])]
    comparison["scores"] = {name: {} for name in names}
    for part, rows in parts.items():
        for name in names:
            deciles = np.quantile([row["scores"][name] for row in rows], _DECILES)
            comparison["scores"][name][part] = deciles.tolist()
    comparison["worth_labelling"] = _worth_labelling(parts["log"], top)
    return comparison


def _read(path: str | os.PathLike, head: str) -> list[dict[str, Any]]:
    """Return `file`, `row` and `scores` of each row in which the head reads something, and `label` and `novelty` if it has them."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ProbeError(f"{path} cannot be read as parquet: {first_line(error)}") from error
    names = {"probabilities": "scores", "values": "scores", "label": "label", "novelty": "novelty"}
    columns = {new: f"{head}_{old}" for old, new in names.items() if f"{head}_{old}" in table.column_names}
    if "scores" not in columns:
        raise ProbeError(f"{path} has no scores of {head!r}; its columns: {', '.join(table.column_names)}")
    rows = []
    for place, row in enumerate(table.to_pylist()):
        found = {name: row[column] for name, column in columns.items()}
        if found.get("novelty", found["scores"]) is not None:  # None if the head reads nothing
            rows.append({"file": row.get("file"), "row": row.get("row", place), **found})
    if not rows:
        raise ProbeError(f"{path} has no row in which {head!r} reads something")
    return rows


def _novelty_summary(rows: list[dict[str, Any]]) -> JSON:
    novelty = np.array([row["novelty"] for row in rows])
    share = share_of(novelty > FAR)
    return {"median": float(np.median(novelty)), "far": share["share"], "interval": share["interval"]}


def _label_shares(rows: list[dict[str, Any]], names: list[str]) -> JSON:
    labels = [row["label"] if isinstance(row["label"], list) else [row["label"]] for row in rows]
    return {name: share_of(np.array([name in given for given in labels])) for name in names}


def _differ(part: JSON, other: JSON) -> bool:
    (low, high), (other_low, other_high) = part["interval"], other["interval"]
    return high < other_low or other_high < low


def _worth_labelling(rows: list[dict[str, Any]], count: int) -> list[JSON]:
    found = []
    for row in rows:
        place = {"file": row["file"], "row": row["row"]}
        found.append({**place, "novelty": row.get("novelty", 0.0), "unsure": _unsure(row)})
    return sorted(found, key=lambda row: -(row["novelty"] + row["unsure"]))[:count]


def _unsure(row: dict[str, Any]) -> float:
    """Return from 0 to 1 how unsure the head is: 1 minus the gap between its two best labels, or a label and its absence."""
    scores = sorted(row["scores"].values())
    if isinstance(row.get("label"), list):  # multi-label
        return 1 - min(abs(2 * score - 1) for score in scores)
    if "label" not in row or len(scores) == 1:
        return 0.0
    return 1 - (scores[-1] - scores[-2])
