"""Novelty of a head: fitted on rows like its training data, and measured against other texts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from ..errors import ProbeError
from ..files import JSON
from ..heads.configuration import ProbeConfig
from ..heads.novelty import FAR, MAX_ROWS, MIN_ROWS, Novelty, novelty_layers
from ..heads.probe import ProbeModel
from .bootstrap import auroc
from .prediction import score_rows


_RANK = 64


def can_fit(config: ProbeConfig, train: Dataset, validation: Dataset) -> bool:
    """Return True if a head can tell novelty and there are rows enough to fit it."""
    return config.supports_novelty and min(len(train), len(validation)) >= MIN_ROWS


def held_quarter(rows: int) -> list[int]:
    """Return a random quarter of the numbers of rows, ascending, to calibrate novelty on: it is fitted on the others."""
    return sorted(np.random.default_rng(0).permutation(rows)[: rows // 4].tolist())


def fit_novelty(probe: ProbeModel, train: Dataset, validation: Dataset) -> JSON:
    """Fit a head's `Novelty` on training rows, and calibrate it on validation rows.

    At most 2,000 rows of each data set count. Rows in which the head reads nothing do not count, if there are 40 other rows.

    Args:
        probe: a trained head, bound to its backbone unless the data sets hold hidden states. It gets the novelty.
        train, validation: data sets of different rows, as for `predict_logits`.

    Returns:
        What `results.json` keeps under `novelty`: `rows`, the numbers of `train` and `validation` rows that counted.

    Raises:
        ProbeError: there are fewer than 40 rows, or the head type tells no novelty.
    """
    layers = novelty_layers(probe.config)
    for name, rows in (("training", train), ("validation", validation)):
        if len(rows) < MIN_ROWS:
            raise ProbeError(f"novelty needs at least {MIN_ROWS} {name} rows, not {len(rows)}")
    probe.set_novelty(Novelty(probe.config.replace(novelty={"layers": layers, "rank": 1})))  # to read the rows
    learned = _mean_states(probe, _random_part(train))
    held = _mean_states(probe, _random_part(validation))
    rows = {"train": learned[1].shape[1], "validation": held[1].shape[1]}
    rank = min(_RANK, rows["train"] // 8, len(layers) * probe.config.hidden_size // 2)
    config = probe.config.replace(novelty={"layers": layers, "rank": rank})
    probe.set_novelty(Novelty.fit(config, learned, held))
    return {"rows": rows}


def _random_part(dataset: Dataset) -> Subset:
    rows = np.random.default_rng(0).permutation(len(dataset))[:MAX_ROWS]
    return Subset(dataset, sorted(rows.tolist()))


def _mean_states(probe: ProbeModel, dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Return total and count of the rows in which the head reads something; see `MeanStates`."""
    total, count = score_rows(
        [probe], dataset, lambda output: [output.means.total.transpose(0, 1), output.means.count.T]
    )
    read = count[:, 0] > 0  # a chat may hold no result of a tool
    read |= read.sum() < MIN_ROWS
    return total[read].transpose(0, 1), count[read].T


def against_others(novelty: torch.Tensor, others: Mapping[str, torch.Tensor], resamples: int = 1000) -> JSON:
    """Measure how well novelty tells rows like the training data from other rows.

    Args:
        novelty (`[rows]`): novelty of rows like the training data.
        others: novelty of other rows, by name.
        resamples: number of resamples of the bootstrap that gives the 95 % intervals; 0 for no intervals.

    Returns:
        `own`: see `far_share`; `against`: the same by name, with `auroc` and its `interval`.
    """
    against: JSON = {}
    for name, other in others.items():
        scores = torch.cat([novelty, other]).numpy()
        is_other = np.repeat([False, True], [len(novelty), len(other)])
        area, interval = auroc(scores, is_other, resamples)
        against[name] = {**far_share(other), "auroc": area}
        if resamples:
            against[name]["interval"] = interval
    return {"own": far_share(novelty), "against": against}


def far_share(novelty: torch.Tensor) -> JSON:
    """Return the number of `rows` in which the head reads something, and `far`: the share of them with a novelty above 0.99."""
    rows = int((~novelty.isnan()).sum())
    return {"rows": rows, "far": int((novelty > FAR).sum()) / max(rows, 1)}
