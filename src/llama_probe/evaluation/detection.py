"""How soon a head that follows replies finds what it looks for, and how often it ends one in vain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from ..data.states import iterate_states
from ..distributed import gather
from ..heads.configuration import ProbeConfig
from ..heads.decision import probabilities
from ..heads.probe import ProbeModel
from .calibration import highest_recall_threshold


PATIENCES = (1, 2, 4, 8)
MAX_FALSE_HALTS = 0.05


def follow_replies(
    probe: ProbeModel,
    dataset: Dataset,
    lengths: Sequence[int],
    lm: nn.Module | None = None,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> list[torch.Tensor]:
    """What a head says after each token of replies that exist already, as if the LM were writing them.

    Args:
        probe: a head that reads replies.
        dataset: a `StateDataset`, or with `lm` a `PromptDataset`; its rows end with the replies.
        lengths: tokens of each reply.
        lm, batch_tokens, progress: see `iterate_states`.

    Returns:
        For each row logits `[reply_tokens, num_labels]`; the last are those of the whole row. In a process group the ranks
        score a share of the rows each, and all get the whole.
    """
    probe.eval()
    found: dict[int, torch.Tensor] = {}
    batches = iterate_states(dataset, probe.config, lm, batch_tokens, progress, probe.layer_indices, divided=True)
    for rows, states, mask in batches:
        if states.shape[1] != len(probe.layer_indices):  # a cache with more layers than this head reads
            states = states[:, probe.layer_indices]
        x = states.transpose(0, 1)  # [S, B, T, D]
        counted = [row.nonzero().flatten() for row in mask]
        before, replies = [], []
        for row, columns in zip(rows, counted, strict=True):
            begin = len(columns) - lengths[row]
            before.append(columns[:begin])
            replies.append(columns[begin:])
        logits = _stream(probe, x, before, replies)  # [B, R, num_labels]
        for i, row in enumerate(rows):
            found[row] = logits[i, : lengths[row]]
    found = {row: scores for part in gather(found) for row, scores in part.items()}
    return [found[row] for row in range(len(dataset))]


@torch.no_grad()
def _stream(
    probe: ProbeModel, x: torch.Tensor, before: list[torch.Tensor], replies: list[torch.Tensor]
) -> torch.Tensor:
    """Logits after each token of the replies `[B, R, num_labels]`; `before` and `replies` are columns of `x`."""
    state = probe.init_state(keep=True)

    def read(columns: torch.Tensor, mask: torch.Tensor) -> None:
        states = probe.prepare(_columns(x, columns))
        probe.step(state, probe.layer_indices, states, mask.to(probe.device))

    if any(len(columns) for columns in before):
        read(*_aligned(before))
    columns, mask = _aligned(replies)
    steps = []
    for t in range(columns.shape[1]):
        read(columns[:, t : t + 1], mask[:, t : t + 1])
        steps.append(probe.finish(state).logits.float().cpu())
    return torch.stack(steps, dim=1)


def _aligned(columns: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Column numbers `[B, n]`, filled up with 0, and which of them count."""
    index = nn.utils.rnn.pad_sequence(columns, batch_first=True)
    lengths = torch.tensor([len(row) for row in columns])
    return index, torch.arange(index.shape[1]) < lengths[:, None]


def _columns(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """`[S, B, n, D]`: of each row its own columns `[B, n]`."""
    return x[:, torch.arange(x.shape[1])[:, None], columns]


def halting_scores(scores: Sequence[np.ndarray], patience: int) -> np.ndarray:
    """For each reply the highest threshold that halts it, `[rows]`; 0 where it is shorter than the patience.

    Args:
        scores: of each reply the probability of the label after each token, `[reply_tokens]`.
        patience: tokens in a row that must reach the threshold.
    """
    found = np.zeros(len(scores))
    for row, values in enumerate(scores):
        if len(values) >= patience:
            found[row] = np.lib.stride_tricks.sliding_window_view(values, patience).min(axis=1).max()
    return found


def detection(scores: Sequence[np.ndarray], positives: np.ndarray, threshold: float, patience: int) -> dict[str, Any]:
    """What a halting rule does to replies.

    Args:
        scores: see `halting_scores`. positives (`[rows]`): whether the reply has the label.
        threshold: probability from which a token is flagged. patience: tokens in a row that must be.

    Returns:
        `rows`; `detected`: share of the replies with the label that are halted; `false_halts`: share of the others that
        are; `delay`: of the detected replies the median and 90th percentile of the tokens read when they are halted, and
        the median share of the reply that these are (`None` where none is detected).
    """
    tokens = np.array([_halting_token(np.asarray(values) >= threshold, patience) for values in scores], dtype=float)
    halted, positives = ~np.isnan(tokens), positives.astype(bool)
    hits = halted & positives
    read = tokens[hits]
    shares = read / np.array([len(values) for values in scores])[hits]
    return {
        "rows": len(scores),
        "detected": float(hits.sum() / positives.sum()) if positives.any() else None,
        "false_halts": float((halted & ~positives).sum() / (~positives).sum()) if not positives.all() else None,
        "delay": {
            "median": float(np.median(read)) if len(read) else None,
            "p90": float(np.percentile(read, 90)) if len(read) else None,
            "share": float(np.median(shares)) if len(read) else None,
        },
    }


def _halting_token(flagged: np.ndarray, patience: int) -> float:
    """Number of tokens read when a reply is halted; NaN where it is not."""
    streak = 0
    for count, flag in enumerate(flagged.tolist(), start=1):
        streak = streak + 1 if flag else 0
        if streak == patience:
            return count
    return float("nan")


def guarded_labels(config: ProbeConfig) -> list[int]:
    """Labels that a reply may be halted by: the second of two, else each; none for regression."""
    if config.problem_type == "regression":
        return []
    two = config.num_labels == 2 and config.problem_type == "single_label_classification"
    return [1] if two else list(range(config.num_labels))


def halting_rules(
    config: ProbeConfig,
    validation: Sequence[torch.Tensor],
    labels: np.ndarray,
    max_false_halts: float = MAX_FALSE_HALTS,
) -> dict[str, list[dict[str, Any]]]:
    """For each label, and each patience of `PATIENCES`, the threshold that detects most replies, with few halts in vain.

    Args:
        config: of the head.
        validation: of validation rows, see `follow_replies`. labels: of the same rows, see `LabelledTexts`.
        max_false_halts: share of the replies without the label that may be halted.

    Returns:
        By label name a list of rules with `patience`, `threshold`, what `detection` says of the validation rows as
        `validation`, and `chosen`: the one that detects most, and of several the one that does so soonest. Labels that
        occur in no row, or in all, are left out.
    """
    found = {}
    for index in guarded_labels(config):
        positives = positive_rows(config, labels, index)
        if not 0 < positives.sum() < len(positives):
            continue
        scores = _scores(config, validation, index)
        rules = []
        for patience in PATIENCES:
            threshold = highest_recall_threshold(halting_scores(scores, patience), positives, max_false_halts)
            told = detection(scores, positives, threshold, patience)
            rules.append({"patience": patience, "threshold": threshold, "validation": told})
        best = max(
            rules, key=lambda rule: (rule["validation"]["detected"], -(rule["validation"]["delay"]["median"] or 0))
        )
        found[config.id2label[index]] = [{**rule, "chosen": rule is best} for rule in rules]
    return found


def apply_rules(
    config: ProbeConfig, rules: dict[str, list[dict[str, Any]]], followed: Sequence[torch.Tensor], labels: np.ndarray
) -> dict[str, list[dict[str, Any]]]:
    """The rules of `halting_rules`, each with what `detection` says of further rows as `test`.

    Left out are those of labels that the head has not, because somebody has renamed them since.
    """
    found = {}
    for name, ruled in rules.items():
        index = config.label2id.get(name)
        if index is None:
            continue
        positives, scores = positive_rows(config, labels, index), _scores(config, followed, index)
        found[name] = [
            {**rule, "test": detection(scores, positives, rule["threshold"], rule["patience"])} for rule in ruled
        ]
    return found


def _scores(config: ProbeConfig, followed: Sequence[torch.Tensor], index: int) -> list[np.ndarray]:
    """Of each reply the probability of a label after each token."""
    return [probabilities(logits, config)[:, index].numpy() for logits in followed]


def positive_rows(config: ProbeConfig, labels: np.ndarray, index: int) -> np.ndarray:
    """Which rows have a label, `[rows]`, for labels as in `LabelledTexts`."""
    return labels[:, index] > 0 if config.problem_type == "multi_label_classification" else labels == index
