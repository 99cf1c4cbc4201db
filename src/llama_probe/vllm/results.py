"""The result of a prompt, as JSON in a request's output: logits, labels and scores of each head, and the halt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict

import torch

from ..files import JSON
from ..heads.configuration import ProbeConfig
from ..heads.decision import ProbeOutput
from ..serving.halting import HaltRule, with_spans
from ..serving.outputs import Halt
from .settings import ProbeSettings


def prompt_result(settings: ProbeSettings, rows: Mapping[str, list[float] | str]) -> JSON:
    """Return the result of one prompt, in plain JSON types.

    Args:
        rows: the `PromptScores` of each head that ran.

    Returns:
        `"probes"` has the logits, label and scores of each head, or `{"error": why}`. A head that can flag has `"flagged"`, the
        labels that it flags. A head with windows has `"span"`: the first token and one past the last of the window of each label
        that it flags or that the prompt has. With `halt_on`, `"halted"` has the fields of a `Halt`, or is `None`. A prompt that a guard of prompts
        could not score is halted. If a judge must decide on a prompt that no guard halts, `"unsure"` has the fields of the
        `Halt`s that the judge may confirm. With `hide_scores` only labels are left of a head, and head and label of a `Halt`.
    """
    probes: JSON = {}
    outputs: dict[str, ProbeOutput] = {}
    for name, numbers in rows.items():
        result, output = head_result(numbers, settings.configs[name])
        if output is not None:
            outputs[name] = output
            if rules := [rule for rule in settings.flags if rule.head == name]:
                halts = [
                    halt for rule in rules for halt in _with_spans(rule.halts(output.probabilities), rule, output)
                ]
                result["flagged"] = [halt.label for halt in halts if halt is not None]
                if output.spans is not None:
                    result["span"] |= {halt.label: list(halt.span) for halt in halts if halt is not None and halt.span}
        probes[name] = visible(result, settings, "label", "flagged", "error")
    if settings.halt_on is None:
        return {"probes": probes}
    halt, unsure = _halts(settings, rows, outputs)
    if halt is not None:
        return {"probes": probes, "halted": visible(asdict(halt), settings, "head", "label")}
    result = {"probes": probes, "halted": None}
    if unsure:
        result["unsure"] = [visible(asdict(each), settings, "head", "label") for each in unsure]
    return result


def _halts(
    settings: ProbeSettings, rows: Mapping[str, list[float] | str], outputs: Mapping[str, ProbeOutput]
) -> tuple[Halt | None, list[Halt]]:
    """Return why a prompt is halted, and the halts on which a judge decides."""
    halt: Halt | None = None
    unsure: list[Halt] = []
    for rule in settings.rules:
        if rule.head not in rows or rule.config.token_scope == "response":
            continue
        unreadable = ProbeOutput.from_logits(torch.full((1, rule.config.num_labels), math.nan), rule.config)
        output = outputs.get(rule.head, unreadable)
        score = float(output.probabilities[0, rule.index])
        (flag,) = _with_spans(rule.halts(output.probabilities), rule, output)
        if rule.is_unsure(score):
            unsure += filter(None, _with_spans([rule.reason(score)], rule, output))
        elif rule.ends(flag):  # with patience, the flag of a prompt is the first of a reply's
            halt = halt or flag
    return halt, unsure


def _with_spans(halts: list[Halt | None], rule: HaltRule, output: ProbeOutput) -> list[Halt | None]:
    return halts if output.spans is None else with_spans(halts, output.spans[:, rule.index])


def head_result(numbers: list[float] | str, config: ProbeConfig) -> tuple[JSON, ProbeOutput | None]:
    """Return the result of a head for its numbers in `PromptScores`, and the output that they are of, a row."""
    if isinstance(numbers, str):
        return {"error": numbers}, None
    logits, spans = numbers[: config.num_labels], numbers[config.num_labels :]
    if not all(map(math.isfinite, logits)):
        return {"error": "the head gives no number"}, None
    output = ProbeOutput.from_logits(torch.tensor([logits]), config)
    if config.window:
        output.spans = torch.tensor(spans).long().view(1, config.num_labels, 2)
    return {"logits": logits, **output.describe()[0]}, output


def visible(values: JSON, settings: ProbeSettings, *names: str) -> JSON:
    """Return the values that clients may see: all of them, or with `hide_scores` those of these names."""
    if not settings.hide_scores:
        return values
    return {name: values[name] for name in names if name in values}
