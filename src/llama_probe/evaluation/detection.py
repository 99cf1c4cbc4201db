"""Halting rules measured on replies: tokens until a label is found, and replies that are ended in vain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..distributed import gather
from ..heads.configuration import ProbeConfig
from ..heads.decision import probabilities
from ..heads.probe import ProbeModel
from .calibration import highest_recall_threshold
from .metrics import has_label
from .prediction import states_for


PATIENCES = (1, 2, 4, 8)
MAX_FALSE_HALTS = 0.05


def follow_replies(
    probe: ProbeModel, dataset: Dataset, lengths: Sequence[int], batch_tokens: int = 4096, progress: bool = False
) -> list[torch.Tensor]:
    """Return the logits of a head after each token of finished replies, as if the LM were writing them.

    Args:
        probe: a head that reads replies, bound to its backbone unless the data set holds hidden states.
        dataset: a `PromptDataset` or `StateDataset`. Its rows end with the replies.
        lengths: tokens of each reply.
        batch_tokens, progress: see `score_batches`.

    Returns:
        For each row logits `[reply_tokens, num_labels]`; the last are those of the whole row. In a process group the ranks
        divide the rows, and each rank gets all results.
    """
    logits: dict[int, torch.Tensor] = {}
    for rows, shared, mask in states_for([probe], dataset, batch_tokens, progress):
        states = shared.raw(probe)
        counted = [states[:, i, columns].transpose(0, 1) for i, columns in enumerate(mask)]  # [n, S, D] each
        starts = [len(row_states) - lengths[row] for row, row_states in zip(rows, counted, strict=True)]
        before, replies = zip(*((s[:start], s[start:]) for s, start in zip(counted, starts, strict=True)), strict=True)
        followed = _follow(probe, before, replies)
        logits |= {row: followed[i, : lengths[row]] for i, row in enumerate(rows)}
    logits = {row: part for ranks in gather(logits) for row, part in ranks.items()}
    return [logits[row] for row in range(len(dataset))]


@torch.no_grad()
def _follow(probe: ProbeModel, before: Sequence[torch.Tensor], replies: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return logits `[B, R, num_labels]` after each of R reply tokens, from the states `[n, S, D]` of each row."""
    state = probe.init_state(keep=True)

    def step(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        probe.step(state, probe.layer_indices, probe.prepare(states), mask.to(probe.device))
        return probe.finish(state).logits.float().cpu()

    def pad(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        mask = pad_sequence([torch.ones(len(states), dtype=torch.bool) for states in rows], batch_first=True)
        return pad_sequence(list(rows), batch_first=True).permute(2, 0, 1, 3), mask  # [S, B, N, D], [B, N]

    if any(map(len, before)):
        step(*pad(before))
    states, mask = pad(replies)
    return torch.stack([step(states[:, :, [t]], mask[:, [t]]) for t in range(mask.shape[1])], dim=1)


def _least(values: np.ndarray, patience: int) -> np.ndarray:
    """Return the least score in each window of this many tokens."""
    if len(values) < patience:
        return np.zeros(0)
    return np.lib.stride_tricks.sliding_window_view(values, patience).min(axis=1)


def detection(scores: Sequence[np.ndarray], positives: np.ndarray, threshold: float, patience: int) -> dict[str, Any]:
    """Return what a halting rule does to replies.

    Args:
        scores: for each reply the probability of the label after each token, `[reply_tokens]`.
        positives (`[rows]`): True if the reply has the label.
        threshold, patience: probability from which a token is flagged, and consecutive tokens that must reach it.

    Returns:
        `rows`; `detected`: share of the replies with the label that are halted; `false_halts`: share of the others that
        are halted; `delay`: over detected replies the `median` and the 90th percentile (`p90`) of the tokens read when
        they are halted, and the median `share` of the reply (each None if none is detected).
    """
    reached = [np.flatnonzero(_least(values, patience) >= threshold) for values in scores]
    halted, positives = np.array(list(map(len, reached))) > 0, positives.astype(bool)
    delay: dict[str, float | None] = dict.fromkeys(("median", "p90", "share"))
    if len(hits := np.flatnonzero(halted & positives)):
        read = np.array([reached[row][0] + patience for row in hits])
        share = np.median(read / [len(scores[row]) for row in hits])
        delay = {"median": float(np.median(read)), "p90": float(np.percentile(read, 90)), "share": float(share)}
    return {
        "rows": len(scores),
        "detected": float(halted[positives].mean()) if positives.any() else None,
        "false_halts": float(halted[~positives].mean()) if not positives.all() else None,
        "delay": delay,
    }


def halting_rules(
    config: ProbeConfig,
    validation: Sequence[torch.Tensor],
    labels: np.ndarray,
    max_false_halts: float = MAX_FALSE_HALTS,
) -> dict[str, list[dict[str, Any]]]:
    """Return, for each label and each patience of `PATIENCES`, the threshold that detects most replies.

    Labels are the flagged one of two, else all. Regression heads have none. Labels of no row or of each row are skipped.

    Args:
        config: of the head.
        validation, labels: of validation rows, what `follow_replies` returned and the labels.
        max_false_halts: share of the replies without the label that may be halted.

    Returns:
        By label name a list of rules with `patience`, `threshold`, `validation` (see `detection`) and `chosen`: True for
        the rule that detects most replies, and of several such rules the soonest.
    """
    by_label: dict[str, list[dict[str, Any]]] = {}
    for index, name in config.id2label.items():
        if config.problem_type == "regression" or config.flagged_index not in (None, index):
            continue
        positives, scores = has_label(labels, index, config), _scores(config, validation, index)
        if not 0 < positives.sum() < len(positives):
            continue
        rules = []
        for patience in PATIENCES:
            # A reply is halted if the highest of these is over the threshold.
            highest = np.array([_least(values, patience).max(initial=0.0) for values in scores])
            threshold = highest_recall_threshold(highest, positives, max_false_halts)
            result = detection(scores, positives, threshold, patience)
            rules.append({"patience": patience, "threshold": threshold, "validation": result})
        best = max(rules, key=_detects_most)
        by_label[name] = [{**rule, "chosen": rule is best} for rule in rules]
    return by_label


def apply_rules(
    config: ProbeConfig, rules: dict[str, list[dict[str, Any]]], followed: Sequence[torch.Tensor], labels: np.ndarray
) -> dict[str, list[dict[str, Any]]]:
    """Return the rules of `halting_rules`, each with `test`: what it does to further rows, see `detection`.

    Labels that the head no longer has, because they were renamed, are skipped.
    """
    by_label: dict[str, list[dict[str, Any]]] = {}
    for name, index in config.label2id.items():
        if name not in rules:
            continue
        scored = _scores(config, followed, index), has_label(labels, index, config)
        tests = [detection(*scored, rule["threshold"], rule["patience"]) for rule in rules[name]]
        by_label[name] = [{**rule, "test": test} for rule, test in zip(rules[name], tests, strict=True)]
    return by_label


def _detects_most(rule: dict[str, Any]) -> tuple[float, float]:
    result = rule["validation"]
    return result["detected"], -(result["delay"]["median"] or 0)


def _scores(config: ProbeConfig, followed: Sequence[torch.Tensor], index: int) -> list[np.ndarray]:
    return [probabilities(logits, config)[:, index].numpy() for logits in followed]
