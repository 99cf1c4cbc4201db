"""Scores a head on labelled rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .calibration import reliability, threshold_table
from .configuration import ProbeConfig
from .decision import probabilities
from .features import ProbeCollator
from .metrics import score
from .probe import ProbeModel


def predict_logits(probe: ProbeModel, dataset: Dataset, batch_size: int = 32, progress: bool = False) -> torch.Tensor:
    """Logits `[rows, num_labels]` of a `PromptDataset` or `StateDataset`, in its order."""
    logits = torch.empty(len(dataset), probe.config.num_labels)
    for rows, output in _outputs(probe, dataset, batch_size, progress):
        logits[rows] = output.logits.cpu()
    return logits


def inspect_head(probe: ProbeModel, dataset: Dataset, labels: np.ndarray, batch_size: int = 32) -> dict[str, Any]:
    """What a card shows of a head beyond its metrics.

    Returns:
        `layer_weights`: for each label that occurs the mean weight of each layer over its rows, `[layers_read]`;
        `calibration`: see `reliability`; `thresholds`: see `threshold_table`, by label name. The last two are left out
        where they have no meaning (regression; thresholds of more than two labels).
    """
    config = probe.config
    logits = torch.empty(len(dataset), config.num_labels)
    weights = torch.empty(len(dataset), len(probe.layer_indices))
    for rows, output in _outputs(probe, dataset, batch_size, output_attentions=True):
        logits[rows], weights[rows] = output.logits.cpu(), output.layer_weights.cpu()
    by_label = {}
    for index, name in config.id2label.items():
        multi_label = config.problem_type == "multi_label_classification"
        chosen = labels[:, index] > 0 if multi_label else labels == index
        if config.problem_type == "regression":
            chosen = np.ones(len(labels), dtype=bool)
        if chosen.any():
            by_label[name] = [round(float(value), 5) for value in weights[torch.from_numpy(chosen)].mean(dim=0)]
    found: dict[str, Any] = {"layer_weights": {"layers": probe.layer_indices, "by_label": by_label}}
    if config.problem_type != "regression":
        found["calibration"] = reliability(logits, labels, config)
        thresholds = threshold_table(logits, labels, config)
        if thresholds:
            found["thresholds"] = thresholds
    return found


def _outputs(probe: ProbeModel, dataset: Dataset, batch_size: int, progress: bool = False, **kwargs):
    """Row numbers and `ProbeOutput` of each batch; rows of like length go together."""
    probe.eval()
    order = sorted(range(len(dataset)), key=lambda row: len(dataset[row]["input_ids"]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=ProbeCollator())
    for rows, batch in zip(batches, tqdm(loader, desc="scoring", disable=not progress, leave=False), strict=True):
        batch.pop("labels")
        with torch.no_grad():
            yield rows, probe(**batch, **kwargs)


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
