"""Quality of heads that learn from few labelled rows."""

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
from ...training.loss import ProbeLoss
from ...training.recipe import Recipe, complete
from ...training.shared import SharedTraining


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
    """Train heads on a few rows, as `llama-probe train` would, and score them on others.

    A seed draws the rows, the weights and the order. All heads learn from the same rows. No row is held back, so neither epoch
    nor threshold is chosen.

    Args:
        config: config with labels, prompts and backbone.
        heads: fields of `ProbeConfig` that replace the config's, by name.
        train, test: both `PromptDataset` (with `lm`) or both `StateDataset`, with their labels.
        sizes: numbers of rows. Those above the number of training rows are left out.
        lm: the frozen backbone; `None` for cached states.
        keep: called with the name of a draw and the work. It returns the work's entries, or those it kept before.

    Returns:
        One entry a size, seed and head: `rows`, `seed` and `head`, and the metrics of `score_logits`.

    Raises:
        ProbeError: there are fewer rows than the smallest size.
    """
    sizes = [size for size in sizes if size <= len(train)]
    if not sizes:
        raise ProbeError(f"{len(train)} training rows are too few for a learning curve")
    found = []

    def draw(size: int, seed: int) -> list[dict[str, Any]]:
        rows = draw_rows(train_labels, config, size, seed)
        candidates = [_candidate(name, head, config, size, seed) for name, head in heads.items()]
        epochs = int(complete(Recipe(), {}, size)[0].num_train_epochs)
        part = Subset(train, rows.tolist())
        training = SharedTraining(candidates, part, test, "accuracy", epochs, Path(), lm, seed=seed)
        probes = [learner.probe for learner in training.run_unseen()]
        return [
            {"rows": size, "seed": seed, "head": name, **score_logits(logits, test_labels, probe.config)}
            for name, probe, logits in zip(heads, probes, predict_together(probes, test, lm), strict=True)
        ]

    draws = [(size, seed) for size in sizes for seed in seeds]
    for size, seed in tqdm(draws, desc="learning curves", unit=" draws", leave=False):
        found += keep(f"{size}-rows-seed-{seed}", partial(draw, size, seed))
    return found


def summarize_curves(curves: Sequence[dict[str, Any]], metric: str) -> dict[str, dict[int, dict[str, Any] | None]]:
    """Return `mean`, `std` (n - 1; `None` for one seed) and `runs` of a metric, by head and number of rows.

    A metric that the test rows do not define gives `None`.
    """
    found: dict[str, dict[int, dict[str, Any] | None]] = {}
    for name in dict.fromkeys(entry["head"] for entry in curves):
        sizes = found[name] = {}
        for size in sorted({entry["rows"] for entry in curves}):
            values = [entry[metric] for entry in curves if entry["head"] == name and entry["rows"] == size]
            if None in values:
                sizes[size] = None
                continue
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            sizes[size] = {"mean": float(np.mean(values)), "std": spread, "runs": len(values)}
    return found


def draw_rows(labels: np.ndarray, config: ProbeConfig, size: int, seed: int) -> np.ndarray:
    """Draw `size` rows, ascending, among them one of each label if `size` allows it.

    The rows of a smaller size are part of those of a larger one with the same seed.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    if config.problem_type == "single_label_classification":
        first = [int(np.argmax(labels[order] == label)) for label in np.unique(labels)]
        order = np.concatenate([order[first], np.delete(order, first)])
    return np.sort(order[:size])


def _candidate(name: str, head: dict[str, Any], config: ProbeConfig, rows: int, seed: int) -> Candidate:
    recipe, head = complete(Recipe(), head, rows)
    config = config.replace(**head)
    rates = recipe.learning_rate, recipe.weight_decay, recipe.per_device_train_batch_size
    # The number gives the dropout. It must not depend on the heads beside this one.
    number = zlib.crc32(name.encode())
    return Candidate(number, config, ProbeLoss(config, None, recipe.label_smoothing), *rates, seed)
