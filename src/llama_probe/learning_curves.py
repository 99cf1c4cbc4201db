"""How good heads get with few labelled rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from .configuration import ProbeConfig
from .decision import probabilities
from .errors import ProbeError
from .evaluation import predict_logits
from .metrics import score
from .recipe import Recipe, complete
from .shared_training import Candidate, SharedTraining
from .training import ProbeLoss


SIZES = (16, 64, 256, 1024)


def learning_curves(
    config: ProbeConfig,
    train: Dataset,
    train_labels: np.ndarray,
    test: Dataset,
    test_labels: np.ndarray,
    kinds: Sequence[str],
    sizes: Sequence[int] = SIZES,
    seeds: Sequence[int] = (0, 1, 2),
    lm: nn.Module | None = None,
) -> list[dict[str, Any]]:
    """Trains each kind on a few rows, as `llama-probe train` would, and scores it on others.

    A seed draws the rows, the weights and the order. All kinds learn from the same rows, side by side; nothing is held
    back, so no epoch and no threshold is chosen.

    Args:
        config: of a head, with labels, prompts and backbone; kinds are put into it.
        train, test: both `PromptDataset` (with `lm`) or both `StateDataset`. train_labels, test_labels: see `LabelledTexts`.
        sizes: numbers of rows. Those above the number of training rows are left out.
        lm: the frozen backbone; `None` where the states are cached.

    Returns:
        One entry a size, seed and kind: these, and the metrics of `score`.

    Raises:
        ProbeError: there are fewer rows than the smallest size, or too few of some label.
    """
    sizes = [size for size in sizes if size <= len(train)]
    if not sizes:
        raise ProbeError(f"{len(train)} training rows are too few for a learning curve")
    draws = [(size, seed, draw_rows(train_labels, config, size, seed)) for size in sizes for seed in seeds]
    found = []
    for size, seed, rows in tqdm(draws, desc="learning curves", unit=" draws", leave=False):
        candidates = [_candidate(number, kind, config, size, seed) for number, kind in enumerate(kinds)]
        epochs = int(complete(Recipe(), {}, size)[0].num_train_epochs)
        part = Subset(train, rows.tolist())
        training = SharedTraining(candidates, part, test, "accuracy", epochs, Path(), lm, seed=seed)
        for kind, learner in zip(kinds, training.run_unseen(), strict=True):
            if lm is not None:
                learner.probe.set_backbone(lm)
            probs = probabilities(predict_logits(learner.probe, test), learner.probe.config).numpy()
            metrics = score(probs, test_labels, learner.probe.config)
            found.append({"rows": size, "seed": seed, "probe_type": kind, **metrics})
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


def _candidate(number: int, kind: str, config: ProbeConfig, rows: int, seed: int) -> Candidate:
    recipe, head = complete(Recipe(), {"probe_type": kind}, rows)
    config = config.replace(**head)
    return Candidate(
        number,
        config,
        ProbeLoss(config, None, recipe.label_smoothing),
        recipe.learning_rate,
        recipe.weight_decay,
        recipe.per_device_train_batch_size,
        seed,
    )
