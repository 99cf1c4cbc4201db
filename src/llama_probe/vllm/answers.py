"""The heads' part of a request's output: logits, labels, scores, and the halt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from ..errors import ProbeError
from ..heads.decision import ProbeOutput, check_numbers, verdict
from ..serving.halting import HaltRule
from ..serving.outputs import Halt
from .settings import ProbeSettings


def answer(settings: ProbeSettings, found: Mapping[str, list[float] | str]) -> dict[str, Any]:
    """Plain JSON types for one prompt.

    Args:
        found: by head that ran its logits, or why there are none.

    Returns:
        `"probes"`, by head `{"logits": [...], ...}` with what `verdict` says, or `{"error": why}`. A head that can flag has
        `"flagged"`, its labels that are. With `halt_on` also `"halted"`: the fields of a `Halt`, or `None`. What a guard of
        prompts could not score is halted. If it is not halted, and a judge has to decide, `"unsure"` has the fields of the
        `Halt`s that it may confirm. With `hide_scores` only the labels are left of a head, and head and label of a `Halt`.
    """
    outputs: dict[str, ProbeOutput] = {}
    probes: dict[str, Any] = {}
    for name, logits in found.items():
        if isinstance(logits, str):
            probes[name] = {"error": logits}
            continue
        config = settings.configs[name]
        output = ProbeOutput.from_logits(torch.tensor([logits]), config)
        try:
            check_numbers(output.logits)
        except ProbeError as error:  # one prompt's affair, which must not end the engine
            probes[name] = {"error": str(error)}
            continue
        outputs[name] = output
        said = {"logits": logits, **verdict(output.labels[0], output.probabilities[0].tolist(), config)}
        if rules := [rule for rule in settings.flags if rule.head == name]:
            said["flagged"] = [
                halt.label for rule in rules for halt in rule.halts(output.probabilities) if halt is not None
            ]
        probes[name] = only(said, "label", "flagged") if settings.hide_scores else said
    if settings.halt_on is None:
        return {"probes": probes}
    halt, unsure = None, []
    for rule in settings.rules:
        if rule.config.token_scope != "response":
            output = outputs.get(rule.head)
            score = math.nan if output is None else float(output.probabilities[0, rule.index])
            if rule.is_unsure(score):
                unsure.append(rule.reason(score))
            else:
                halt = halt or _halt(rule, output)
    shown = [asdict(each) for each in ([halt] if halt else unsure)]
    if settings.hide_scores:
        shown = [only(each, "head", "label") for each in shown]
    known = {"probes": probes, "halted": shown[0] if halt else None}
    return known if halt or not unsure else {**known, "unsure": shown}


def _halt(rule: HaltRule, output: ProbeOutput | None) -> Halt | None:
    """Return why a rule halts a prompt. A flag that needs patience is the first of a reply's."""
    if output is None:
        return Halt(rule.head, threshold=rule.threshold)
    return rule.halts(output.probabilities)[0] if rule.patience == 1 else None


def only(said: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return the entries of these names, where there are any."""
    return {name: said[name] for name in names if name in said}
