"""Measure the chosen head of a recipe: on the test rows, what it looked at, novelty, and then as `measure` of the recipe says."""

from __future__ import annotations

from dataclasses import replace

from torch.utils.data import Dataset

from ..distributed import on_main
from ..evaluation.detection import MAX_FALSE_HALTS, apply_rules, halting_rules
from ..evaluation.novelty_fit import held_quarter
from ..evaluation.prediction import follow_replies, predict_logits
from ..evaluation.report import report
from ..files import JSON
from ..heads.configuration import ProbeConfig
from ..heads.probe import ProbeModel
from .choosing import ChosenHead, TrainedHeads, calibrated_ablations, save
from .measurements import measurements
from .plan import Plan, States
from .results import inspection, novelty, summary_of
from .rows import TrainingRows


def measure(plan: Plan, states: States, heads: TrainedHeads, chosen: ChosenHead) -> ChosenHead:
    """Return the chosen head with all results. Its folder is written after each measurement.

    A run that is stopped while it measures has its head. A run that resumes makes the missing measurements.
    """
    if not chosen.is_judged:
        chosen = _judge(plan, states, heads, chosen)
        save(plan, chosen)
        plan.folder.mark_judged()
    if plan.rows.measured or plan.rows.ablations:
        head = chosen.head
        ablations = calibrated_ablations(plan, states, heads)
        for measured in measurements(plan, states, head, ablations, chosen.results.get("measured")):
            chosen = replace(chosen, results=chosen.results | {"measured": measured})
            head.results = chosen.results
            on_main(lambda: bool(head.save_pretrained(plan.folder.path)))
    return chosen


def _judge(plan: Plan, states: States, heads: TrainedHeads, chosen: ChosenHead) -> ChosenHead:
    """Measure the seeds on the test rows, inspect the chosen head, and fit its novelty."""
    rows = plan.rows
    shown = "validation" if rows.test is None else "test"
    inspected = chosen.logits
    runs: dict[str, JSON] = {}
    for name, run in chosen.runs.items():
        head = heads.by_name[name]
        config = _with_threshold_of(run, head.config)
        runs[name] = dict(run)
        if rows.test is not None:
            tested = predict_logits(head, states["test"])
            runs[name]["test"] = report(config, tested, rows.test.labels, rows.slices)
            if name == chosen.name:
                inspected = tested
        if config.reads_reply and not rows.folds:  # with folds the head has learned from the validation rows
            runs[name]["halting"] = _halting(plan, states, head, config)
    head = chosen.head
    results = chosen.results | {"runs": list(runs.values()), "summary": summary_of(list(runs.values()))}
    config = _with_threshold_of(chosen.runs[chosen.name], head.config)
    results["inspection"] = inspection(head, shown, states[shown], inspected, config)
    results |= novelty(head, plan.args, results["data"], *_novelty_rows(plan, states))
    return replace(chosen, results=results, runs=runs, is_judged=True)


def _with_threshold_of(run: JSON, config: ProbeConfig) -> ProbeConfig:
    """Return a config with the threshold of the validation rows, which each seed has, and not that of the calibration rows."""
    return config.replace(threshold=run["threshold"], thresholds=None)


def _halting(plan: Plan, states: States, head: ProbeModel, config: ProbeConfig) -> JSON:
    """Choose halting rules on the validation rows, and measure them on the test rows."""
    rate = plan.args.max_false_positive_rate
    limit = MAX_FALSE_HALTS if rate is None else rate
    (followed,) = follow_replies([head], states["validation"])
    rules = halting_rules(config, followed, plan.rows.judged.labels, limit)
    if plan.rows.test is not None:
        (followed,) = follow_replies([head], states["test"])
        rules = apply_rules(config, rules, followed, plan.rows.test.labels)
    return {"max_false_halts": limit, "labels": rules}


def _novelty_rows(plan: Plan, states: States) -> tuple[Dataset, Dataset]:
    """Return rows to fit novelty on, and rows to calibrate it on: with folds a quarter of the plain rows."""
    train = states["train"]
    plain = plan.rows.num_plain
    if not plan.rows.folds:
        return train, states["validation"]
    held = held_quarter(plain)
    rest = sorted(set(range(len(train))) - set(held))
    return TrainingRows(train, rest), TrainingRows(train, held)
