"""Novelty of a head: fitted on cached or new states, measured against other texts, and compared with a log of prompts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from ..errors import ProbeError
from ..files import JSON
from ..heads.configuration import ProbeConfig
from ..heads.decision import predictions, probabilities
from ..heads.novelty import FAR, MAX_ROWS, MIN_ROWS, Novelty, novelty_layers
from ..heads.probe import ProbeModel
from .bootstrap import auroc, share_interval
from .prediction import score_rows


_RANK = 64
_LEVELS = tuple(round(0.1 * i, 1) for i in range(11))  # quantiles of scores that are kept


def can_fit(config: ProbeConfig, train: Dataset, validation: Dataset) -> bool:
    """Return True if a head can tell novelty and there are rows enough to fit it."""
    return config.supports_novelty and min(len(train), len(validation)) >= MIN_ROWS


def fit_novelty(probe: ProbeModel, train: Dataset, validation: Dataset, logits: torch.Tensor | None = None) -> JSON:
    """Fit a head's `Novelty` on training rows and calibrate it on validation rows. At most 2,000 of each count.

    Rows that hold nothing to read do not count, if 40 others do.

    Args:
        probe: a trained head, bound to its backbone unless the data sets hold hidden states. It gets the novelty.
        train, validation: different rows, as for `predict_logits`.
        logits (`[rows, num_labels]`, *optional*): of the validation rows.

    Returns:
        What `results.json` keeps under `novelty`: `rows`: numbers of rows; `labels`: share of the validation rows with each label at
        the head's `threshold`, for the `flagged` ones; `scores`: quantiles 0, 10, ..., 100 % of each label's probability
        (regression: value).
    """
    layers = novelty_layers(probe.config)
    for name, rows in (("training", train), ("validation", validation)):
        if len(rows) < MIN_ROWS:
            raise ProbeError(f"novelty needs at least {MIN_ROWS} {name} rows, not {len(rows)}")
    logits = None if logits is None else logits[_places(validation)]
    train, validation = (Subset(rows, _places(rows)) for rows in (train, validation))
    probe.set_novelty(Novelty(probe.config.replace(novelty={"layers": layers, "rank": 1})))  # to read the rows
    learned, _ = _mean_states(probe, train)
    held, logits = _mean_states(probe, validation, logits)
    rows = {"train": learned[1].shape[1], "validation": len(logits)}
    settings = {"layers": layers, "rank": min(_RANK, rows["train"] // 8, len(layers) * probe.config.hidden_size // 2)}
    probe.set_novelty(Novelty.fit(probe.config.replace(novelty=settings), learned, held))
    decided = {"threshold": probe.config.threshold, "flagged": probe.config.flagged_labels}
    return {"rows": rows, **decided, **_summarize(probe.config, logits)}


def _places(dataset: Dataset) -> list[int]:
    rows = np.random.default_rng(0).permutation(len(dataset))[:MAX_ROWS]
    return sorted(rows.tolist())


def _mean_states(
    probe: ProbeModel, dataset: Dataset, logits: torch.Tensor | None = None
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return total and count of the rows that hold something to read, see `MeanStates`, and their logits."""
    total, count, own = score_rows(
        [probe], dataset, lambda output: [output.means.total.transpose(0, 1), output.means.count.T, output.logits]
    )
    read = count[:, 0] > 0  # a chat may hold no result of a tool
    read |= read.sum() < MIN_ROWS
    return (total[read].transpose(0, 1), count[read].T), (own if logits is None else logits)[read]


def _summarize(config: ProbeConfig, logits: torch.Tensor) -> JSON:
    """Return the share of rows with each label, and quantiles of each label's probability."""
    probs, names = probabilities(logits.float(), config), config.id2label.values()
    levels = np.quantile(probs.numpy(), _LEVELS, axis=0).round(5)  # [levels, num_labels]
    scores = dict(zip(names, levels.T.tolist(), strict=True))
    if config.problem_type == "regression":
        return {"scores": scores}
    labels = predictions(probs, config)
    if config.problem_type == "single_label_classification":
        labels = torch.nn.functional.one_hot(labels, config.num_labels)
    return {"labels": dict(zip(names, labels.double().mean(dim=0).tolist(), strict=True)), "scores": scores}


def against_others(novelty: torch.Tensor, others: Mapping[str, torch.Tensor], resamples: int = 1000) -> JSON:
    """Measure how well novelty tells a head's own kind of rows from others.

    Args:
        novelty (`[rows]`): of rows like the training data. others: novelty of other rows, by name.
        resamples: of the bootstrap that gives the 95 % intervals; no intervals with 0.

    Returns:
        `own`: `rows`, and `far`, the share above 0.99; `against`: the same by name, with `auroc` and its `interval`.
    """
    against: JSON = {}
    for name, other in others.items():
        scores, truth = torch.cat([novelty, other]).numpy(), np.repeat([False, True], [len(novelty), len(other)])
        area, interval = auroc(scores, truth, resamples)
        against[name] = far_share(other) | {"auroc": area} | ({"interval": interval} if resamples else {})
    return {"own": far_share(novelty), "against": against}


def far_share(novelty: torch.Tensor) -> JSON:
    """Return the number of `rows` in which the head reads something, and the share of them that is `far`: above 0.99."""
    rows = int((~novelty.isnan()).sum())
    return {"rows": rows, "far": int((novelty > FAR).sum()) / max(rows, 1)}


def compare_log(
    config: ProbeConfig, reference: JSON, logits: torch.Tensor, novelty: torch.Tensor, top: int = 20
) -> JSON:
    """Compare what a head says of a log of prompts with what it said of its validation rows.

    Args:
        config, reference: of the head, and what `fit_novelty` returned.
        logits (`[rows, num_labels]`), novelty (`[rows]`): of the log's rows, in their order. Rows without a number for novelty
            hold nothing that the head reads, and do not count.
        top: number of rows to name as most worth labelling.

    Returns:
        `rows`; `novelty`: `median`, `far` (share above 0.99, 1 % of validation rows) and its 95 % `interval`; `labels`: for each label
        its `share` in the log, its 95 % `interval`, its `expected` share, and if the interval excludes that, `changed`, at the
        threshold of the expected one (none if that is not known);
        `scores`: for each label quantiles in the log and `expected` ones; `worth_labelling`: `row`, `novelty` and `unsure` of
        rows, the most useful ones first.
    """
    places = (~novelty.isnan()).nonzero().flatten()
    if not len(places):
        raise ProbeError("the log has no row with something that the head reads")
    logits, novelty = logits[places], novelty[places]
    if "threshold" in reference:
        flagged = [name for name in reference.get("flagged", ()) if name in config.label2id]  # it was not renamed
        config = config.replace(threshold=reference["threshold"], flagged=flagged or config.flagged)
    summary, rows, far = _summarize(config, logits), len(novelty), far_share(novelty)
    far |= {"interval": share_interval(int((novelty > FAR).sum()), rows), "median": float(novelty.median())}
    comparison: JSON = {"rows": rows, "novelty": far}
    # Thresholds that were fitted later give other shares than those that were counted.
    is_known = "threshold" in reference or not config.thresholds
    for name, share in summary.get("labels", {}).items() if is_known else ():
        if name not in reference["labels"]:  # it was renamed
            continue
        low, high = share_interval(round(share * rows), rows)
        expected = reference["labels"][name]
        part = {"share": share, "interval": [low, high], "expected": expected, "changed": not low <= expected <= high}
        comparison.setdefault("labels", {})[name] = part
    quantiles, expected = summary["scores"].items(), reference["scores"]
    comparison["scores"] = {
        name: {"found": part, **({"expected": expected[name]} if name in expected else {})} for name, part in quantiles
    }
    unsure = _unsure(config, probabilities(logits.float(), config))
    order = (novelty.double() + unsure).argsort(descending=True, stable=True)[:top].tolist()
    comparison["worth_labelling"] = [
        {"row": int(places[row]), "novelty": float(novelty[row]), "unsure": float(unsure[row])} for row in order
    ]
    return comparison


def _unsure(config: ProbeConfig, probs: torch.Tensor) -> torch.Tensor:
    """Return how unsure a head is of each row, from 0 to 1: 1 minus the gap between its two best labels."""
    if config.problem_type == "regression":
        return torch.zeros(len(probs), dtype=torch.float64)
    if config.problem_type == "multi_label_classification":
        return 1 - (2 * probs.double() - 1).abs().amin(dim=1)
    best = probs.double().topk(min(2, config.num_labels), dim=1).values
    return 1 - best[:, 0] + (best[:, 1] if config.num_labels > 1 else 0)
