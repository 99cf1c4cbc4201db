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
    found: dict[int, torch.Tensor] = {}
    for rows, shared, mask in states_for([probe], dataset, batch_tokens, progress):
        states = shared.raw(probe)
        counted = [states[:, i, columns].transpose(0, 1) for i, columns in enumerate(mask)]  # [n, S, D] each
        starts = [len(row_states) - lengths[row] for row, row_states in zip(rows, counted, strict=True)]
        before = [row_states[:start] for row_states, start in zip(counted, starts, strict=True)]
        replies = [row_states[start:] for row_states, start in zip(counted, starts, strict=True)]
        logits = _follow(probe, before, replies)
        found |= {row: logits[i, : lengths[row]] for i, row in enumerate(rows)}
    found = {row: logits for part in gather(found) for row, logits in part.items()}
    return [found[row] for row in range(len(dataset))]


@torch.no_grad()
def _follow(probe: ProbeModel, before: list[torch.Tensor], replies: list[torch.Tensor]) -> torch.Tensor:
    """Return logits `[B, R, num_labels]` after each of R reply tokens, from the states `[n, S, D]` of each row."""
    state = probe.init_state(keep=True)

    def step(states: torch.Tensor, mask: torch.Tensor) -> None:
        probe.step(state, probe.layer_indices, probe.prepare(states), mask.to(probe.device))

    if any(len(row_states) for row_states in before):
        step(*_pad(before))
    states, mask = _pad(replies)
    steps = []
    for t in range(mask.shape[1]):
        step(states[:, :, t : t + 1], mask[:, t : t + 1])
        steps.append(probe.finish(state).logits.float().cpu())
    return torch.stack(steps, dim=1)


def _pad(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad states `[n, S, D]` of rows to `[S, B, N, D]`. Return them and the mask `[B, N]`."""
    mask = pad_sequence([torch.ones(len(states), dtype=torch.bool) for states in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True).permute(2, 0, 1, 3), mask


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
    halted, positives = np.array([len(places) > 0 for places in reached]), positives.astype(bool)
    delay: dict[str, float | None] = dict.fromkeys(("median", "p90", "share"))
    if len(hits := np.flatnonzero(halted & positives)):
        read = np.array([reached[row][0] + patience for row in hits])
        shares = read / np.array([len(scores[row]) for row in hits])
        found = np.median(read), np.percentile(read, 90), np.median(shares)
        delay = dict(zip(delay, map(float, found), strict=True))
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
    found: dict[str, list[dict[str, Any]]] = {}
    for index, name in config.id2label.items():
        if config.problem_type == "regression" or config.flagged_index not in (None, index):
            continue
        positives = has_label(labels, index, config)
        if not 0 < positives.sum() < len(positives):
            continue
        scores = _scores(config, validation, index)
        rules = []
        for patience in PATIENCES:
            # The highest threshold that halts each reply; 0 if it is shorter than the patience.
            halting = np.array([_least(values, patience).max(initial=0.0) for values in scores])
            threshold = highest_recall_threshold(halting, positives, max_false_halts)
            told = detection(scores, positives, threshold, patience)
            rules.append({"patience": patience, "threshold": threshold, "validation": told})
        told = [rule["validation"] for rule in rules]
        best = max(told, key=lambda item: (item["detected"], -(item["delay"]["median"] or 0)))
        found[name] = [{**rule, "chosen": rule["validation"] is best} for rule in rules]
    return found


def apply_rules(
    config: ProbeConfig, rules: dict[str, list[dict[str, Any]]], followed: Sequence[torch.Tensor], labels: np.ndarray
) -> dict[str, list[dict[str, Any]]]:
    """Return the rules of `halting_rules`, each with `test`: what it does to further rows, see `detection`.

    Labels that the head no longer has, because they were renamed, are skipped.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for name in [name for name in rules if name in config.label2id]:
        index = config.label2id[name]
        positives, scores = has_label(labels, index, config), _scores(config, followed, index)
        found[name] = [
            {**rule, "test": detection(scores, positives, rule["threshold"], rule["patience"])} for rule in rules[name]
        ]
    return found


def _scores(config: ProbeConfig, followed: Sequence[torch.Tensor], index: int) -> list[np.ndarray]:
    return [probabilities(logits, config)[:, index].numpy() for logits in followed]
