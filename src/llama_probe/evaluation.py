"""Scores a head on labelled rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .configuration import ProbeConfig
from .decision import probabilities
from .features import ProbeCollator
from .metrics import score
from .probe import ProbeModel


def predict_logits(probe: ProbeModel, dataset: Dataset, batch_size: int = 32, progress: bool = False) -> torch.Tensor:
    """Logits `[rows, num_labels]` of a `PromptDataset` or `StateDataset`, in its order."""
    probe.eval()
    order = sorted(range(len(dataset)), key=lambda row: len(dataset[row]["input_ids"]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    logits = torch.empty(len(dataset), probe.config.num_labels)
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=ProbeCollator())
    for rows, batch in zip(batches, tqdm(loader, desc="scoring", disable=not progress, leave=False), strict=True):
        batch.pop("labels")
        with torch.no_grad():
            logits[rows] = probe(**batch).logits.cpu()
    return logits


def report(
    config: ProbeConfig, logits: torch.Tensor, labels: np.ndarray, slices: dict[str, Sequence[Any]] | None = None
) -> dict[str, Any]:
    """Metrics of all rows, and of each group of rows with the same value in a column.

    Args:
        config: with the temperature and threshold to judge by.
        logits (`[rows, num_labels]`), labels: see `LabelledTexts`.
        slices: columns by name, one value a row.

    Returns:
        The metrics of `ProbeMetric` with `rows`, and `slices`: column -> value -> the same.
    """
    probs = probabilities(logits.float(), config).numpy()
    result: dict[str, Any] = {"rows": len(labels), **score(probs, labels, config)}
    for column, values in (slices or {}).items():
        groups = result.setdefault("slices", {}).setdefault(column, {})
        for value in sorted({str(value) for value in values}):
            rows = np.array([str(item) == value for item in values])
            groups[value] = {"rows": int(rows.sum()), **score(probs[rows], labels[rows], config)}
    return result
