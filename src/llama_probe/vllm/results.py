"""The result of a prompt, as JSON in a request's output: logits, labels and scores of each head, and the halt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict

import torch

from ..files import JSON
from ..heads.configuration import ProbeConfig
from ..heads.decision import ProbeOutput
from ..serving.outputs import Halt
from .settings import ProbeSettings


def prompt_result(settings: ProbeSettings, rows: Mapping[str, list[float] | str]) -> JSON:
    """Return the result of one prompt, in plain JSON types.

    Args:
        rows: the logits of each head that ran, or why there are none.

    Returns:
        `"probes"` has the logits, label and scores of each head, or `{"error": why}`. A head that can flag has `"flagged"`, the
        labels that it flags. With `halt_on`, `"halted"` has the fields of a `Halt`, or is `None`. A prompt that a guard of prompts
        could not score is halted. If a judge must decide on a prompt that no guard halts, `"unsure"` has the fields of the
        `Halt`s that the judge may confirm. With `hide_scores` only labels are left of a head, and head and label of a `Halt`.
    """
    probes: JSON = {}
    probs: dict[str, torch.Tensor] = {}
    for name, logits in rows.items():
        result, head_probs = head_result(logits, settings.configs[name])
        if head_probs is not None:
            probs[name] = head_probs
            if rules := [rule for rule in settings.flags if rule.head == name]:
                halts = [halt for rule in rules for halt in rule.halts(head_probs)]
                result["flagged"] = [halt.label for halt in halts if halt is not None]
        probes[name] = visible(result, settings, "label", "flagged", "error")
    if settings.halt_on is None:
        return {"probes": probes}
    halt, unsure = _halts(settings, rows, probs)
    if halt is not None:
        return {"probes": probes, "halted": visible(asdict(halt), settings, "head", "label")}
    result = {"probes": probes, "halted": None}
    if unsure:
        result["unsure"] = [visible(asdict(each), settings, "head", "label") for each in unsure]
    return result


def _halts(
    settings: ProbeSettings, rows: Mapping[str, list[float] | str], probs: Mapping[str, torch.Tensor]
) -> tuple[Halt | None, list[Halt]]:
    """Return why a prompt is halted, and the halts on which a judge decides."""
    halt: Halt | None = None
    unsure: list[Halt] = []
    for rule in settings.rules:
        if rule.head not in rows or rule.config.token_scope == "response":
            continue
        unreadable = torch.full((1, rule.config.num_labels), math.nan)
        head_probs = probs.get(rule.head, unreadable)
        score = float(head_probs[0, rule.index])
        (flag,) = rule.halts(head_probs)
        if rule.is_unsure(score):
            unsure.append(rule.reason(score))
        elif rule.ends(flag):  # with patience, the flag of a prompt is the first of a reply's
            halt = halt or flag
    return halt, unsure


def head_result(logits: list[float] | str, config: ProbeConfig) -> tuple[JSON, torch.Tensor | None]:
    """Return the result of a head for a row of logits, or for why there is none, and its probabilities `[1, num_labels]`."""
    if isinstance(logits, str):
        return {"error": logits}, None
    if not all(map(math.isfinite, logits)):
        return {"error": "the head gives no number"}, None
    output = ProbeOutput.from_logits(torch.tensor([logits]), config)
    return {"logits": logits, **output.describe()[0]}, output.probabilities


def visible(values: JSON, settings: ProbeSettings, *names: str) -> JSON:
    """Return the values that clients may see: all of them, or with `hide_scores` those of these names."""
    if not settings.hide_scores:
        return values
    return {name: values[name] for name in names if name in values}
