"""Results of a training: thresholds, measurements, the choice of the head, and the files of its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers.utils import logging

from ..backbone.loading import DEMO, DEMO_NOTE
from ..distributed import world_size
from ..errors import ProbeError
from ..evaluation.calibration import calibrate, length_groups, thresholds_from, with_rates
from ..evaluation.detection import MAX_FALSE_HALTS, apply_rules, halting_rules
from ..evaluation.metrics import summarize
from ..evaluation.novelty_fit import can_fit, fit_novelty
from ..evaluation.plots import write_plots
from ..evaluation.prediction import follow_replies, predict_logits, predict_together
from ..evaluation.report import inspect_head, report
from ..files import JSON, environment, write_atomically
from ..heads.configuration import ProbeConfig
from ..heads.probe import ProbeModel
from ..hub.card import write_card
from ..hub.folder import RECIPE_NAME
from .arguments import ProbeTrainingArguments
from .prepared import PreparedRun
from .progress import Progress
from .recipe import CardFacts
from .rows import TrainingRows, labels_of


logger = logging.get_logger(__name__)


def save_head(run: PreparedRun, head: ProbeModel, folder: Path) -> None:
    """Write the folder of the head of a recipe: weights, config, results, recipe, plots and card."""
    head.save_pretrained(folder)
    write_atomically(folder / RECIPE_NAME, run.recipe.write())
    if write_plots(folder):
        write_card(folder)  # shows the plots


@dataclass
class Choice:
    """The head that a recipe has chosen among its candidates."""

    name: str  # of the candidate
    head: ProbeModel
    logits: torch.Tensor  # [rows, num_labels] of the validation rows
    runs: dict[str, JSON]  # results of each seed, by candidate; of a search those of the chosen head alone


def choose_head(run: PreparedRun, progress: Mapping[str, Progress], epochs: float) -> Choice:
    """Fit temperature and thresholds of the heads of a recipe, and choose the best by the validation rows.

    The head that is chosen can be saved: its `results` have all that follows from the validation and calibration rows.
    """
    metric = run.args.metric
    runs = {}
    logits_by_head = _judged_logits(run)
    for name, candidate in run.candidates.items():
        probe = run.heads[name]
        logits = logits_by_head[name]
        if not bool(logits.isfinite().all()):
            continue  # the head diverged
        probe.config, decided = decide(probe.config, logits, run.rows.judged.labels, run.args)
        runs[name] = {"seed": candidate.seed, "epochs": progress[name].epochs or epochs, **decided}
    if not runs:
        raise ProbeError(f"no head of {len(run.candidates)} gives a number for {metric}: use a smaller learning_rate")
    chosen = max(runs, key=lambda name: runs[name]["validation"][metric])
    head = run.heads[chosen]
    head.set_backbone(run.lm)
    is_search = run.recipe.search.trials > 0
    kept = {chosen: runs[chosen]} if is_search else runs
    own_args = run.candidates[chosen].training
    head.results = basic_results(head, run.args, run.rows.described, own_args, list(kept.values()))
    head.results |= {"chosen_seed": runs[chosen]["seed"], "dtype": run.dtype, "card": asdict(_card(run))}
    if is_search:
        head.results["search"] = _describe_search(run, runs)
    if run.rows.calibration is not None and (fitted := _calibrate(run, head)) is not None:
        head.results["thresholds_from"] = fitted
    return Choice(chosen, head, logits_by_head[chosen], kept)


def complete_results(run: PreparedRun, choice: Choice) -> None:
    """Measure the seeds on the test rows, inspect the chosen head, and fit its novelty."""
    rows = run.rows
    head = choice.head
    shown = "validation" if rows.test is None else "test"
    calibrated = head.config
    # These figures are for the threshold of the validation rows, which each seed has.
    head.config = calibrated.replace(threshold=choice.runs[choice.name]["threshold"], thresholds=None)
    inspected = choice.logits
    for name, results in choice.runs.items():
        probe = run.heads[name]
        if rows.test is not None:
            tested = predict_logits(probe, run.datasets["test"])
            results["test"] = report(probe.config, tested, rows.test.labels, rows.slices)
            if name == choice.name:
                inspected = tested
        if run.config.reads_reply and not rows.folds:  # with folds the head has learned from the validation rows
            results["halting"] = _halting(probe, run)
    add_summary(head.results)
    inspect(head, shown, run.datasets[shown], inspected)
    add_novelty(head, run.args, *_novelty_rows(run))
    head.config = head.config.replace(threshold=calibrated.threshold, thresholds=calibrated.thresholds)


def _judged_logits(run: PreparedRun) -> dict[str, torch.Tensor]:
    """Return logits of the judged rows, by head; with folds by heads that have not learned from the rows."""
    heads = {name: head for name, head in run.heads.items() if not name.startswith("ablation-")}
    logits = predict_together(list(heads.values()), run.datasets["validation"])
    by_head = dict(zip(heads, logits, strict=True))
    for name in run.candidates:
        for number, fold in enumerate(run.rows.folds):
            by_head[name][fold] = by_head[f"{name}-fold-{number}"][fold]
    return by_head


def _novelty_rows(run: PreparedRun) -> tuple[Dataset, Dataset]:
    """Return rows to fit novelty on, and rows to calibrate it on: with folds a quarter of the plain rows."""
    train = run.datasets["train"]
    plain = run.rows.num_plain
    if not run.rows.folds:
        return train, run.datasets["validation"]
    held = sorted(np.random.default_rng(0).permutation(plain).tolist()[: plain // 4])
    rest = sorted(set(range(len(train))) - set(held))
    return TrainingRows(train, rest), TrainingRows(train, held)


def _calibrate(run: PreparedRun, probe: ProbeModel) -> JSON | None:
    """Fit the thresholds of a head on the calibration rows, and return what `results.json` says of them.

    The last rates are left out if they do not fit. None is returned if no rate fits: the head keeps its own threshold.
    """
    rates = run.recipe.calibration.rates
    sources = [source.name for source in run.recipe.calibration.sources]
    dataset = run.datasets["calibration"]
    logits = predict_logits(probe, dataset)
    groups = length_groups(probe.config, dataset)
    while rates:
        try:
            probe.config = with_rates(probe.config, logits, rates, groups)
            return thresholds_from(probe.config, rates, sources, logits, groups)
        except ProbeError as error:
            logger.warning(f"no threshold for {rates[-1]:g} was fitted on the calibration rows: {error}")
            rates = rates[:-1]
    return None


def calibrated_ablations(run: PreparedRun) -> dict[str, ProbeModel]:
    """Return the ablations with temperature and thresholds, fitted without the sources that they leave out."""
    if not run.rows.ablations:
        return {}
    judged = run.rows.judged
    heads = [run.heads[f"ablation-{name}"] for name in run.rows.ablations]
    logits_by_head = predict_together(heads, run.datasets["validation"])
    ablations: dict[str, ProbeModel] = {}
    for (name, ablation), probe, logits in zip(run.rows.ablations.items(), heads, logits_by_head, strict=True):
        known = np.setdiff1d(np.arange(len(judged)), ablation.excluded_from_validation)
        logits = logits[known]
        if not bool(logits.isfinite().all()):
            logger.warning(f"the ablation without {name} is not measured: it diverged")
            continue
        probe.config, _ = decide(probe.config, logits, judged.labels[known], run.args)
        if run.rows.calibration is not None:
            _calibrate(run, probe)
        ablations[name] = probe
    return ablations


def _card(run: PreparedRun) -> CardFacts:
    facts = run.recipe.card
    sources = [*run.recipe.train, *run.recipe.augmentations.documents]
    notes = dict.fromkeys(source.note for source in sources if source.note)
    stated = facts.data_note
    further = [note for note in notes if note not in (stated or "")]
    if further and any(source.licence is None for source in run.recipe.train):
        stated = stated or "No licence of the training rows was stated."
    sentences = [stated, "Further rows:" if stated and further else None, *further]
    if left_out := run.rows.described["train"].get("not_commercial"):
        words = ", ".join(f"{count:,} rows of {name}" for name, count in left_out.items())
        sentences.append(f"Left out, because their licences forbid commercial use or are not known: {words}.")
    limits = [*facts.limits, *([DEMO_NOTE] if run.backbone == DEMO else [])]
    return replace(facts, limits=limits, data_note=" ".join(filter(None, sentences)) or None)


def _describe_search(run: PreparedRun, runs: Mapping[str, JSON]) -> list[JSON]:
    """Return the trials of a search, best first; a trial that diverged has the score None."""
    trials = [
        {
            "name": name,
            "score": runs[name]["validation"][run.args.metric] if name in runs else None,
            "epochs": runs[name]["epochs"] if name in runs else None,
            "num_parameters": run.heads[name].num_parameters(),
            "values": candidate.values,
        }
        for name, candidate in run.candidates.items()
    ]
    return sorted(trials, key=lambda trial: -math.inf if trial["score"] is None else trial["score"], reverse=True)


def decide(
    config: ProbeConfig, logits: torch.Tensor, labels: np.ndarray, args: ProbeTrainingArguments
) -> tuple[ProbeConfig, JSON]:
    """Return the config with temperature and threshold that fit validation rows, and their part of `results.json`."""
    config = calibrate(config, logits, torch.from_numpy(labels), args.max_false_positive_rate, args.threshold_rule)
    fitted = {"temperature": config.temperature, "threshold": config.threshold}
    return config, {**fitted, "validation": report(config, logits, labels)}


def _halting(probe: ProbeModel, run: PreparedRun) -> JSON:
    """Choose halting rules on the validation rows, and measure them on the test rows."""
    rate = run.args.max_false_positive_rate
    limit = MAX_FALSE_HALTS if rate is None else rate
    (followed,) = follow_replies([probe], run.datasets["validation"])
    rules = halting_rules(probe.config, followed, run.rows.judged.labels, limit)
    if run.rows.test is not None:
        (followed,) = follow_replies([probe], run.datasets["test"])
        rules = apply_rules(probe.config, rules, followed, run.rows.test.labels)
    return {"max_false_halts": limit, "labels": rules}


def basic_results(
    probe: ProbeModel, args: ProbeTrainingArguments, rows: dict[str, JSON], head_args: JSON, runs: list[JSON]
) -> JSON:
    """Return the `results` of a head whose config is decided; `head_args` differ from `args`, `runs` has a part a seed."""
    results = {
        "backbone": probe.config.base_model_name_or_path,
        "probe_type": probe.config.probe_type,
        "flagged": probe.config.flagged or [],
        "num_parameters": probe.num_parameters(),
        "data": rows,
        "recipe": args.describe() | head_args,
        "runs": runs,
        "chosen_seed": runs[0]["seed"],
        "summary": {},
        "environment": environment() | ({"processes": world_size()} if world_size() > 1 else {}),
        "dtype": probe.config.base_model_dtype,
        "card": asdict(CardFacts()),
    }
    add_summary(results)
    return results


def add_summary(results: JSON) -> None:
    """Summarise the runs of results, by split."""
    runs = results["runs"]
    splits = [name for name in ("validation", "test") if name in runs[0]]
    results["summary"] = {name: summarize([run[name] for run in runs]) for name in splits}


def inspect(probe: ProbeModel, split: str, dataset: Dataset, logits: torch.Tensor) -> None:
    """Add to a head's results what `inspect_head` finds on the rows of a split with these logits."""
    found = inspect_head(probe, dataset, labels_of(dataset), logits=logits)
    probe.results["inspection"] = {"split": split, **found}


def add_novelty(probe: ProbeModel, args: ProbeTrainingArguments, train: Dataset | None, held: Dataset) -> None:
    """Fit the novelty of a head, and add it to the results, if the arguments say so and there are rows enough."""
    if not args.novelty or train is None or not can_fit(probe.config, train, held):
        return
    data = probe.results["data"]
    sources = [data[name]["source"] for name in ("train", "extra") if name in data]
    probe.results["novelty"] = {"sources": sources, **fit_novelty(probe, train, held)}
