"""Results of a training run: what is written to `results.json` of a head folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..distributed import world_size
from ..evaluation.calibration import calibrate
from ..evaluation.detection import MAX_FALSE_HALTS, apply_rules, follow_replies, halting_rules
from ..evaluation.metrics import summarize
from ..evaluation.novelty import can_fit, fit_novelty
from ..evaluation.prediction import predict_logits
from ..evaluation.report import inspect_head, report
from ..files import environment
from ..heads.configuration import ProbeConfig
from ..heads.probe import ProbeModel
from ..hub.card import CardFacts
from .recipe import Recipe
from .rows import TrainingData, labels_of


def judge(probe: ProbeModel, data: TrainingData, logits: torch.Tensor) -> dict[str, Any]:
    """Fit the head's temperature and threshold on the validation rows, and measure it on these and the test rows.

    Args:
        probe: a trained head. Its config is replaced.
        logits (`[rows, num_labels]`): logits of the validation rows.

    Returns:
        What `decide` returns; with test rows `test`, see `report`; for a head that follows replies `halting`, see
        `halting_rules`.
    """
    parts = data.parts
    probe.config, result = decide(probe.config, logits, parts["validation"].labels, data.recipe)
    if "test" in parts:
        slices = {column: parts["test"].columns[column] for column in data.sources.slice_columns}
        logits = predict_logits(probe, data.datasets["test"])
        result["test"] = report(probe.config, logits, parts["test"].labels, slices)
    if probe.config.reads_reply and not data.folds:  # with folds the head has learned from the validation rows
        result["halting"] = _halting(probe, data)
    return result


def decide(
    config: ProbeConfig, logits: torch.Tensor, labels: np.ndarray, recipe: Recipe
) -> tuple[ProbeConfig, dict[str, Any]]:
    """Fit temperature and threshold on validation rows, and measure these.

    Returns:
        The config with both, and `temperature`, `threshold` and `validation`.
    """
    rules = recipe.max_false_positive_rate, recipe.threshold_rule
    config = calibrate(config, logits, torch.from_numpy(labels), *rules)
    fitted = {"temperature": config.temperature, "threshold": config.threshold}
    return config, {**fitted, "validation": report(config, logits, labels)}


def _halting(probe: ProbeModel, data: TrainingData) -> dict[str, Any]:
    """Choose halting rules on the validation rows, and measure them on the test rows; see `halting_rules`."""
    rate = data.recipe.max_false_positive_rate
    limit = MAX_FALSE_HALTS if rate is None else rate
    labels = {name: data.parts[name].labels for name in ("validation", "test") if name in data.parts}
    followed = {name: follow_replies(probe, data.datasets[name], data.reply_lengths[name]) for name in labels}
    rules = halting_rules(probe.config, followed["validation"], labels["validation"], limit)
    if "test" in followed:
        rules = apply_rules(probe.config, rules, followed["test"], labels["test"])
    return {"max_false_halts": limit, "labels": rules}


def add_results(
    probe: ProbeModel,
    rows: dict[str, dict[str, Any]],
    recipe: Recipe,
    runs: list[dict[str, Any]],
    inspected: tuple[str, Dataset, torch.Tensor | None],
    novelty: tuple[Dataset, Dataset, torch.Tensor] | None,
    dtype: str | None,
    card: CardFacts,
    chosen: int | None = None,
) -> None:
    """Inspect a head whose config is decided, fit its novelty, and set its `results`, the contents of `results.json`.

    Args:
        rows: of each part its `source` and the number of its `rows`.
        runs: results of each seed. chosen: seed of `probe`. Defaults to the first.
        inspected: split, data set and, if known, logits `[rows, num_labels]`; see `inspect_head`.
        novelty: arguments of `fit_novelty`, which is skipped if there are too few rows. None: it is not wanted.
        dtype: of the backbone.
    """
    split, dataset, logits = inspected
    splits = [name for name in ("validation", "test") if name in runs[0]]
    results = {
        "backbone": probe.config.base_model_name_or_path,
        "probe_type": probe.config.probe_type,
        "flagged": probe.config.flagged_labels,
        "num_parameters": probe.num_parameters(),
        "data": rows,
        "recipe": asdict(recipe),
        "runs": runs,
        "chosen_seed": runs[0]["seed"] if chosen is None else chosen,
        "summary": {name: summarize([run[name] for run in runs]) for name in splits},
        "environment": environment() | ({"processes": world_size()} if world_size() > 1 else {}),
        "dtype": dtype,
        "card": asdict(card),
        "inspection": {"split": split, **inspect_head(probe, dataset, labels_of(dataset), logits=logits)},
    }
    if novelty is not None and can_fit(probe.config, *novelty[:2]):
        sources = [rows[name]["source"] for name in ("train", "extra") if name in rows]
        results["novelty"] = {"sources": sources, **fit_novelty(probe, *novelty)}
    probe.results = results


def describe_rows(data: TrainingData) -> dict[str, dict[str, Any]]:
    """Return `source` and `rows` of each part, and the `weights` of further rows."""
    rows = {name: {"source": _source(name, data), "rows": len(part)} for name, part in data.parts.items()}
    if "extra" in rows and data.sources.extra_weights != [1.0]:
        rows["extra"]["weights"] = data.sources.extra_weights
    return rows


def _source(name: str, data: TrainingData) -> str:
    given = data.sources
    found = {"train": given.train, "validation": [given.eval], "test": [given.test], "extra": given.extra}[name]
    if found == [None]:
        if name == "validation" and data.folds:
            return f"{len(data.folds)} folds of train"
        share = given.validation_share if name == "validation" else given.test_share
        return f"{share or 0:.0%} of train"
    # Paths differ between machines; the last two parts identify the file.
    return ", ".join("/".join(Path(source).parts[-2:]) for source in found)
