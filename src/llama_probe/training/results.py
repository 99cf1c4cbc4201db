"""The contents of `results.json` that every trained head has: fitted thresholds, metrics, an inspection and novelty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch.utils.data import Dataset

from ..distributed import world_size
from ..evaluation.calibration import calibrate
from ..evaluation.metrics import summarize
from ..evaluation.novelty_fit import can_fit, fit_novelty
from ..evaluation.report import inspect_head, report
from ..files import JSON, environment
from ..heads.configuration import ProbeConfig
from ..heads.probe import ProbeModel
from .arguments import ProbeTrainingArguments
from .recipe import CardFacts
from .rows import labels_of


def decide(
    config: ProbeConfig, logits: torch.Tensor, labels: np.ndarray, args: ProbeTrainingArguments
) -> tuple[ProbeConfig, JSON]:
    """Return the config with temperature and threshold that fit validation rows, and their part of `results.json`."""
    config = calibrate(config, logits, torch.from_numpy(labels), args.max_false_positive_rate, args.threshold_rule)
    fitted = {"temperature": config.temperature, "threshold": config.threshold}
    return config, {**fitted, "validation": report(config, logits, labels)}


def basic_results(
    probe: ProbeModel, args: ProbeTrainingArguments, rows: dict[str, JSON], head_args: JSON, runs: list[JSON]
) -> JSON:
    """Return the `results` of a head whose config is decided; `head_args` differ from `args`, `runs` has a part a seed."""
    return {
        "backbone": probe.config.base_model_name_or_path,
        "probe_type": probe.config.probe_type,
        "flagged": probe.config.flagged or [],
        "num_parameters": probe.num_parameters(),
        "data": rows,
        "training": args.describe() | head_args,
        "runs": runs,
        "chosen_seed": runs[0]["seed"],
        "summary": summary_of(runs),
        "environment": environment() | ({"processes": world_size()} if world_size() > 1 else {}),
        "dtype": probe.config.base_model_dtype,
        "card": asdict(CardFacts()),
    }


def summary_of(runs: Sequence[JSON]) -> JSON:
    """Return mean and spread over the runs of results, by split."""
    splits = [name for name in ("validation", "test") if name in runs[0]]
    return {name: summarize([run[name] for run in runs]) for name in splits}


def inspection(
    probe: ProbeModel, split: str, dataset: Dataset, logits: torch.Tensor, config: ProbeConfig | None = None
) -> JSON:
    """Return what `inspect_head` finds on the rows of a split with these logits, and the name of the split."""
    return {"split": split, **inspect_head(probe, dataset, labels_of(dataset), logits=logits, config=config)}


def novelty(
    probe: ProbeModel, args: ProbeTrainingArguments, data: JSON, train: Dataset | None, held: Dataset
) -> dict[str, JSON]:
    """Fit the novelty of a head if the arguments say so and there are rows enough, and return its section of the results.

    Args:
        data: the section `data` of the results, which names the sources.
    """
    if not args.novelty or train is None or not can_fit(probe.config, train, held):
        return {}
    sources = [data[name]["source"] for name in ("train", "extra") if name in data]
    return {"novelty": {"sources": sources, **fit_novelty(probe, train, held)}}
