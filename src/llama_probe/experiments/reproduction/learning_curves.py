"""How good heads get with few labelled rows."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from ...errors import ProbeError
from ...evaluation.metrics import score_logits
from ...evaluation.report import predict_together
from ...heads.configuration import ProbeConfig
from ...training.learners import Candidate
from ...training.recipe import Recipe, complete
from ...training.shared import SharedTraining
from ...training.trainer import ProbeLoss


SIZES = (16, 64, 256, 1024)


def learning_curves(
    config: ProbeConfig,
    train: Dataset,
    train_labels: np.ndarray,
    test: Dataset,
    test_labels: np.ndarray,
    heads: Mapping[str, dict[str, Any]],
    sizes: Sequence[int] = SIZES,
    seeds: Sequence[int] = (0, 1, 2),
    lm: nn.Module | None = None,
    keep: Callable[[str, Callable[[], Any]], Any] = lambda name, work: work(),
) -> list[dict[str, Any]]:
    """Trains heads on a few rows, as `llama-probe train` would, and scores it on others.

    A seed draws the rows, the weights and the order. All heads learn from the same rows, side by side; nothing is held
    back, so no epoch and no threshold is chosen.

    Args:
        config: with labels, prompts and backbone. heads: by name, fields of `ProbeConfig` that are put into it.
        train, test: both `PromptDataset` (with `lm`) or both `StateDataset`. train_labels, test_labels: see `LabelledTexts`.
        sizes: numbers of rows. Those above the number of training rows are left out.
        lm: the frozen backbone; `None` where the states are cached.
        keep: takes the name of a draw and what works it out, and gives its entries: worked out, or kept from before.

    Returns:
        One entry a size, seed and head, `rows`, `seed` and `head`, with the metrics of `score`.

    Raises:
        ProbeError: there are fewer rows than the smallest size, or too few of some label.
    """
    sizes = [size for size in sizes if size <= len(train)]
    if not sizes:
        raise ProbeError(f"{len(train)} training rows are too few for a learning curve")
    draws = [(size, seed, draw_rows(train_labels, config, size, seed)) for size in sizes for seed in seeds]
    found = []

    def draw(size: int, seed: int, rows: np.ndarray) -> list[dict[str, Any]]:
        candidates = [_candidate(name, head, config, size, seed) for name, head in heads.items()]
        epochs = int(complete(Recipe(), {}, size)[0].num_train_epochs)
        part = Subset(train, rows.tolist())
        training = SharedTraining(candidates, part, test, "accuracy", epochs, Path(), lm, seed=seed)
        probes = [learner.probe for learner in training.run_unseen()]
        return [
            {"rows": size, "seed": seed, "head": name, **score_logits(logits, test_labels, probe.config)}
            for name, probe, logits in zip(heads, probes, predict_together(probes, test, lm), strict=True)
        ]

    for size, seed, rows in tqdm(draws, desc="learning curves", unit=" draws", leave=False):
        found += keep(f"{size}-rows-seed-{seed}", partial(draw, size, seed, rows))
    return found


def summarize_curves(curves: Sequence[dict[str, Any]], metric: str) -> dict[str, dict[int, dict[str, Any] | None]]:
    """By head and number of rows `mean`, `std` (n - 1; `None` for one seed) and `runs` of a metric over the seeds; `None` in
    their place where the test rows do not define it."""
    found: dict[str, dict[int, dict[str, Any] | None]] = {}
    for name in dict.fromkeys(entry["head"] for entry in curves):
        for size in sorted({entry["rows"] for entry in curves}):
            values = [e[metric] for e in curves if e["head"] == name and e["rows"] == size]
            sizes = found.setdefault(name, {})
            if None in values:
                sizes[size] = None
                continue
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            sizes[size] = {"mean": float(np.mean(values)), "std": spread, "runs": len(values)}
    return found


def draw_rows(labels: np.ndarray, config: ProbeConfig, size: int, seed: int) -> np.ndarray:
    """`size` rows at random, ascending, among them one of each label that occurs where `size` allows it.

    Rows of a smaller size are a part of those of a larger one with the same seed.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    if config.problem_type == "single_label_classification":
        first = [int(np.argmax(labels[order] == label)) for label in np.unique(labels)]
        order = np.concatenate([order[first], np.delete(order, first)])
    return np.sort(order[:size])


def _candidate(name: str, head: dict[str, Any], config: ProbeConfig, rows: int, seed: int) -> Candidate:
    recipe, head = complete(Recipe(), head, rows)
    config = config.replace(**head)
    return Candidate(
        zlib.crc32(name.encode()),  # of its dropout: not the place among those that are trained beside it
        config,
        ProbeLoss(config, None, recipe.label_smoothing),
        recipe.learning_rate,
        recipe.weight_decay,
        recipe.per_device_train_batch_size,
        seed,
    )
