"""Choose the head of a recipe among the heads that were trained, and write its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from ..backbone.loading import DEMO, DEMO_NOTE
from ..distributed import on_main
from ..errors import ProbeError
from ..evaluation.calibration import length_groups, thresholds_from, with_rates
from ..evaluation.plots import write_plots
from ..evaluation.prediction import predict_logits, predict_together
from ..files import JSON, write_atomically
from ..heads.probe import ProbeModel
from ..hub.card import write_card
from ..hub.folder import RECIPE_NAME
from .plan import Plan, States
from .progress import Progress
from .recipe import CardFacts
from .results import basic_results, decide


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class TrainedHeads:
    """The heads of all members of a plan, with the weights of their best epochs."""

    by_name: Mapping[str, ProbeModel]
    progress: Mapping[str, Progress]


@dataclass(frozen=True)
class ChosenHead:
    """The head that a recipe has chosen among its candidates. It has temperature and thresholds.

    Attributes:
        results: contents of `results.json` so far.
        runs: results of each seed, by candidate; of a search those of the chosen head alone.
        name: name of the candidate.
        logits (`[rows, num_labels]`): of the validation rows.
        is_judged: True if the results have all but the measurements of `measure`. A head that an earlier process has judged is
            read from its folder, and has no `runs`, `name` and `logits`.
    """

    head: ProbeModel
    results: JSON
    runs: Mapping[str, JSON] = field(default_factory=dict)
    name: str | None = None
    logits: torch.Tensor | None = None
    is_judged: bool = False


def choose(plan: Plan, states: States, heads: TrainedHeads) -> ChosenHead:
    """Fit temperature and thresholds of the candidates, and choose the best by the validation rows.

    The results of the chosen head have all that follows from the validation and calibration rows. A run that is resumed after it
    judged its head reads the head from its folder.
    """
    if plan.folder.has_judged_head():
        head = ProbeModel.from_pretrained(plan.folder.path, backbone=plan.lm).to(plan.args.device)
        return ChosenHead(head, head.results, is_judged=True)
    metric = plan.args.metric
    runs = {}
    logits_by_head = _judged_logits(plan, states, heads)
    for name, candidate in plan.candidates.items():
        head = heads.by_name[name]
        logits = logits_by_head[name]
        if not bool(logits.isfinite().all()):
            continue  # the head diverged
        head.config, decided = decide(head.config, logits, plan.rows.judged.labels, plan.args)
        runs[name] = {"seed": candidate.seed, "epochs": heads.progress[name].epochs, **decided}
    if not runs:
        raise ProbeError(f"no head of {len(plan.candidates)} gives a number for {metric}: use a smaller learning_rate")
    chosen = max(runs, key=lambda name: runs[name]["validation"][metric])
    head = heads.by_name[chosen]
    head.set_backbone(plan.lm)
    is_search = plan.recipe.search.trials > 0
    kept = {chosen: runs[chosen]} if is_search else runs
    own_args = plan.candidates[chosen].training
    results = basic_results(head, plan.args, plan.rows.described, own_args, list(kept.values()))
    results |= {"chosen_seed": runs[chosen]["seed"], "dtype": plan.dtype, "card": asdict(_card(plan))}
    if is_search:
        results["search"] = _describe_search(plan, heads, runs)
    if plan.rows.calibration is not None:
        fitted = _calibrate(plan, states, head)
        results |= {} if fitted is None else {"thresholds_from": fitted}
    return ChosenHead(head, results, kept, chosen, logits_by_head[chosen])


def save(plan: Plan, chosen: ChosenHead, folder: Path | None = None) -> None:
    """Write the folder of a chosen head: weights, config, results, recipe, plots and card. It is the folder of the run by default."""
    folder = folder or plan.folder.path

    def write() -> None:
        chosen.head.save_pretrained(folder)
        write_atomically(folder / RECIPE_NAME, plan.recipe.write())
        if write_plots(folder):
            write_card(folder)  # shows the plots

    chosen.head.results = chosen.results
    on_main(write)


def calibrated_ablations(plan: Plan, states: States, heads: TrainedHeads) -> dict[str, ProbeModel]:
    """Return the ablations with temperature and thresholds, fitted without the sources that they leave out."""
    if not plan.rows.ablations:
        return {}
    judged = plan.rows.judged
    trained = [heads.by_name[f"ablation-{name}"] for name in plan.rows.ablations]
    logits_by_head = predict_together(trained, states["validation"])
    ablations: dict[str, ProbeModel] = {}
    for (name, ablation), head, logits in zip(plan.rows.ablations.items(), trained, logits_by_head, strict=True):
        known = np.setdiff1d(np.arange(len(judged)), ablation.excluded_from_validation)
        logits = logits[known]
        if not bool(logits.isfinite().all()):
            logger.warning(f"the ablation without {name} is not measured: it diverged")
            continue
        head.config, _ = decide(head.config, logits, judged.labels[known], plan.args)
        if plan.rows.calibration is not None:
            _calibrate(plan, states, head)
        ablations[name] = head
    return ablations


def _judged_logits(plan: Plan, states: States, trained: TrainedHeads) -> dict[str, torch.Tensor]:
    """Return logits of the judged rows, by head; with folds by heads that have not learned from the rows."""
    heads = {name: head for name, head in trained.by_name.items() if not name.startswith("ablation-")}
    logits = predict_together(list(heads.values()), states["validation"])
    by_head = dict(zip(heads, logits, strict=True))
    for name in plan.candidates:
        for number, fold in enumerate(plan.rows.folds):
            by_head[name][fold] = by_head[f"{name}-fold-{number}"][fold]
    return by_head


def _calibrate(plan: Plan, states: States, head: ProbeModel) -> JSON | None:
    """Fit the thresholds of a head on the calibration rows, and return what `results.json` says of them.

    The last rates are left out if they do not fit. None is returned if no rate fits: the head keeps its own threshold.
    """
    rates = plan.recipe.calibration.rates
    sources = [source.name for source in plan.recipe.calibration.sources]
    dataset = states["calibration"]
    logits = predict_logits(head, dataset)
    groups = length_groups(head.config, dataset)
    while rates:
        try:
            head.config = with_rates(head.config, logits, rates, groups)
            return thresholds_from(head.config, rates, sources, logits, groups)
        except ProbeError as error:
            logger.warning(f"no threshold for {rates[-1]:g} was fitted on the calibration rows: {error}")
            rates = rates[:-1]
    return None


def _card(plan: Plan) -> CardFacts:
    facts = plan.recipe.card
    sources = [*plan.recipe.train, *plan.recipe.augmentations.documents]
    notes = dict.fromkeys(source.note for source in sources if source.note)
    stated = facts.data_note
    further = [note for note in notes if note not in (stated or "")]
    if further and any(source.licence is None for source in plan.recipe.train):
        stated = stated or "No licence of the training rows was stated."
    sentences = [stated, "Further rows:" if stated and further else None, *further]
    if left_out := plan.rows.described["train"].get("not_commercial"):
        words = ", ".join(f"{count:,} rows of {name}" for name, count in left_out.items())
        sentences.append(f"Left out, because their licences forbid commercial use or are not known: {words}.")
    limits = [*facts.limits, *([DEMO_NOTE] if plan.backbone == DEMO else [])]
    return replace(facts, limits=limits, data_note=" ".join(filter(None, sentences)) or None)


def _describe_search(plan: Plan, heads: TrainedHeads, runs: Mapping[str, JSON]) -> list[JSON]:
    """Return the trials of a search, best first; a trial that diverged has the score None."""
    trials = [
        {
            "name": name,
            "score": runs[name]["validation"][plan.args.metric] if name in runs else None,
            "epochs": runs[name]["epochs"] if name in runs else None,
            "num_parameters": heads.by_name[name].num_parameters(),
            "values": candidate.values,
        }
        for name, candidate in plan.candidates.items()
    ]
    return sorted(trials, key=lambda trial: -math.inf if trial["score"] is None else trial["score"], reverse=True)
