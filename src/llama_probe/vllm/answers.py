"""The heads' part of a request's output: logits, labels, scores, and the halt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict

import torch

from ..files import JSON
from ..heads.configuration import ProbeConfig
from ..heads.decision import ProbeOutput
from .settings import ProbeSettings


def answer(settings: ProbeSettings, rows: Mapping[str, list[float] | str]) -> JSON:
    """Plain JSON types for one prompt.

    Args:
        rows: by head that ran its logits, or why there are none.

    Returns:
        `"probes"`, by head `{"logits": [...], ...}` with what `describe_predictions` says, or `{"error": why}`. A head that can flag has
        `"flagged"`, its labels that are. With `halt_on` also `"halted"`: the fields of a `Halt`, or `None`. What a guard of
        prompts could not score is halted. If it is not halted, and a judge has to decide, `"unsure"` has the fields of the
        `Halt`s that it may confirm. With `hide_scores` only the labels are left of a head, and head and label of a `Halt`.
    """
    probes: JSON = {}
    probs: dict[str, torch.Tensor] = {}
    for name, logits in rows.items():
        probes[name], read = reading(logits, settings.configs[name])
        if read is not None:
            probs[name] = read
            if rules := [rule for rule in settings.flags if rule.head == name]:
                flagged = (halt for rule in rules for halt in rule.halts(read))
                probes[name]["flagged"] = [halt.label for halt in flagged if halt is not None]
        probes[name] = shown(probes[name], settings, "label", "flagged", "error")
    if settings.halt_on is None:
        return {"probes": probes}
    halt, unsure = None, []
    for rule in settings.rules:
        if rule.head in rows and rule.config.token_scope != "response":
            read = probs.get(rule.head, torch.full((1, rule.config.num_labels), math.nan))
            score, (flag,) = float(read[0, rule.index]), rule.halts(read)
            if rule.is_unsure(score):
                unsure.append(rule.reason(score))
            elif rule.ends(flag):  # else it is the first of a reply's
                halt = halt or flag
    halts = [shown(asdict(each), settings, "head", "label") for each in ([halt] if halt else unsure)]
    known = {"probes": probes, "halted": halts[0] if halt else None}
    return known if halt or not unsure else {**known, "unsure": halts}


def reading(logits: list[float] | str, config: ProbeConfig) -> tuple[JSON, torch.Tensor | None]:
    """Return what a head says with a row of logits, or why it has none, and its probabilities `[1, num_labels]` if it has some."""
    if isinstance(logits, str) or not all(map(math.isfinite, logits)):
        return {"error": logits if isinstance(logits, str) else "the head gives no number"}, None
    output = ProbeOutput.from_logits(torch.tensor([logits]), config)
    return {"logits": logits, **output.describe()[0]}, output.probabilities


def shown(values: JSON, settings: ProbeSettings, *names: str) -> JSON:
    """Return what clients see of values: all, or with `hide_scores` the entries of these names, where there are any."""
    return {name: values[name] for name in names if name in values} if settings.hide_scores else values
