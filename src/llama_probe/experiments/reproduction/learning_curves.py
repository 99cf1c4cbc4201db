"""Quality of heads that learn from few labelled rows."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Subset

from ...evaluation.metrics import score_logits
from ...evaluation.prediction import predict_together
from ...heads.configuration import ProbeConfig
from ...training.learners import Candidate
from ...training.recipe import Recipe, complete
from ...training.shared import SharedTraining


SIZES = (16, 64, 256, 1024)


def train_on_few(
    config: ProbeConfig,
    train: tuple[Dataset, np.ndarray],
    test: tuple[Dataset, np.ndarray],
    heads: Mapping[str, dict[str, Any]],
    size: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Train heads on a few rows, as `llama-probe train` would, and score them on others.

    The seed draws the rows, the weights and the order. All heads learn from the same rows. No row is held back, so neither
    epoch nor threshold is chosen.

    Args:
        train, test: two `StateDataset` with their labels.
        heads: fields of `ProbeConfig` that replace those of `config`, by name.

    Returns:
        One entry a head: `rows`, `seed` and `head`, and the metrics of `score_logits`.
    """
    rows, candidates = draw_rows(train[1], size, seed), []
    for name, head in heads.items():
        recipe, head = complete(Recipe(), head, size)
        # The number gives the dropout. It must not depend on the heads beside this one.
        number = zlib.crc32(name.encode())
        candidates.append(Candidate.create(number, config.replace(**head), recipe, train[1], seed))
    epochs, part = int(complete(Recipe(), {}, size)[0].num_train_epochs), Subset(train[0], rows.tolist())
    training = SharedTraining(candidates, part, test[0], "accuracy", epochs, Path(), seed=seed)
    probes = [learner.probe for learner in training.run_unseen()]
    return [
        {"rows": size, "seed": seed, "head": name, **score_logits(logits, test[1], probe.config)}
        for name, probe, logits in zip(heads, probes, predict_together(probes, test[0]), strict=True)
    ]


def summarize_curve(curve: Sequence[dict[str, Any]], metric: str) -> dict[int, dict[str, Any] | None]:
    """Return `mean` and `std` (n - 1; `None` for one seed) of a metric by number of rows; `None` where it is not defined."""
    found: dict[int, dict[str, Any] | None] = {}
    for size in sorted({entry["rows"] for entry in curve}):
        values = [entry[metric] for entry in curve if entry["rows"] == size]
        spread = stdev(values) if len(values) > 1 and None not in values else None
        found[size] = None if None in values else {"mean": fmean(values), "std": spread}
    return found


def draw_rows(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Draw `size` rows, ascending, among them one of each label if `size` allows it.

    The rows of a smaller size are part of those of a larger one with the same seed.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    first = [int(np.argmax(labels[order] == label)) for label in np.unique(labels)]
    order = np.concatenate([order[first], np.delete(order, first)])
    return np.sort(order[:size])
