"""Measure halting on replies: the tokens until a label is found, what was shown by then, and replies that end without reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from ..files import JSON
from ..heads.configuration import ProbeConfig
from ..heads.decision import log_odds, probabilities
from ..serving.halting import Streak
from .bootstrap import auroc, intervals
from .calibration import highest_recall_threshold, highest_unflagged, own_threshold
from .metrics import known_rows


# Patience and window of the halting rules that are compared; see `HaltRule`.
RULES = ((1, 1), (2, 1), (4, 1), (8, 1), (1, 8), (1, 16), (1, 32))
MAX_FALSE_HALTS = 0.05
RATES = (0.005, 0.01)  # shares of the replies without the label that may be halted

# Of each reply: True if the reply is halted, the tokens that were read by then, and the tokens of the whole reply. `[rows]` each.
_Halts = tuple[np.ndarray, np.ndarray, np.ndarray]


def judged_scores(scores: Sequence[np.ndarray], patience: int = 1, window: int = 1) -> list[np.ndarray]:
    """Return the scores by which a halting rule judges tokens: the rule ends a reply at the first score that reaches the threshold.

    Args:
        scores: for each reply the probability of the label after each token, `[reply_tokens]`. The result has the same form.
    """
    judged = []
    for values in scores:
        streak = Streak(patience, window)
        judged.append(np.array([streak.add(score)[1] for score in values.tolist()]))
    return judged


def _halts(judged: Sequence[np.ndarray], threshold: float) -> _Halts:
    lengths = np.array([len(values) for values in judged])
    halted = np.array([(values >= threshold).any() for values in judged])
    first = np.array([np.argmax(values >= threshold) for values in judged])
    return halted, np.where(halted, first + 1, lengths), lengths


def _measures(halts: _Halts, positives: np.ndarray) -> dict[str, float]:
    """Return the numbers of `detection`; NaN where there are no such replies."""
    halted, read, lengths = halts
    hits = halted & positives
    samples = {
        "detected": (np.mean, halted[positives]),
        "false_halts": (np.mean, halted[~positives]),
        "shown": (np.mean, ((read - halted) / lengths)[positives]),
        "median": (np.median, read[hits]),
        "p90": (partial(np.percentile, q=90), read[hits]),
        "share": (np.median, (read / lengths)[hits]),
    }
    return {name: float(measure(sample)) if len(sample) else np.nan for name, (measure, sample) in samples.items()}


def detection(judged: Sequence[np.ndarray], positives: np.ndarray, threshold: float) -> JSON:
    """Return what a halting rule does to replies.

    Args:
        judged: `judged_scores` of the replies, with the patience and the window of the rule.
        positives (`[rows]`): True if the reply has the label.
        threshold: score from which the rule ends a reply.

    Returns:
        `rows`, the number of replies; `detected`: share of the replies with the label that are halted; `false_halts`: share of
        the replies without the label that are halted; `shown`: over all replies with the label, the mean share of the tokens
        before the halt, 1 for a reply that is not halted.
        `delay`, over detected replies: `median` and 90th percentile (`p90`) of the tokens read at the halt, and the median
        `share` of the reply. A value is None if there are no such replies.
    """
    measures = _measures(_halts(judged, threshold), positives.astype(bool))
    values = {name: None if np.isnan(value) else value for name, value in measures.items()}
    delay = {name: values.pop(name) for name in ("median", "p90", "share")}
    return {"rows": len(judged), **values, "delay": delay}


def halting_rules(
    config: ProbeConfig,
    validation: Sequence[torch.Tensor],
    labels: np.ndarray,
    max_false_halts: float = MAX_FALSE_HALTS,
) -> dict[str, list[JSON]]:
    """Return, for each label and each patience and window of `RULES`, the threshold that detects most replies.

    The labels are the flagged one of two labels, or else all labels. A label that all rows have, or none, is skipped. Regression
    heads have no rules.

    Args:
        validation: what `follow_replies` returned for the validation rows.
        labels: labels of the validation rows.
        max_false_halts: share of the replies without the label that may be halted.

    Returns:
        By label name a list of rules with `patience`, `window`, `threshold`, `validation` (see `detection`), and `chosen`: True
        for the rule that detects most replies, and of several such rules for the rule that halts soonest.
    """
    by_label: dict[str, list[JSON]] = {}
    for index, name in config.id2label.items():
        if config.problem_type == "regression" or config.flagged_index not in (None, index):
            continue
        scores, positives = _known_scores(config, validation, labels, index)
        if not 0 < positives.sum() < len(positives):
            continue
        rules = []
        gains = []
        for patience, window in RULES:
            judged = judged_scores(scores, patience, window)
            highest = np.array([values.max(initial=0.0) for values in judged])  # halts if it reaches the threshold
            threshold = highest_recall_threshold(highest, positives, max_false_halts)
            result = detection(judged, positives, threshold)
            rules.append({"patience": patience, "window": window, "threshold": threshold, "validation": result})
            gains.append((result["detected"], -(result["delay"]["median"] or 0)))
        best = gains.index(max(gains))
        by_label[name] = [{**rule, "chosen": place == best} for place, rule in enumerate(rules)]
    return by_label


def apply_rules(
    config: ProbeConfig, rules: dict[str, list[JSON]], followed: Sequence[torch.Tensor], labels: np.ndarray
) -> dict[str, list[JSON]]:
    """Return the rules of `halting_rules`, each with `test`: what it does to further rows, see `detection`.

    Labels that the head no longer has, after a renaming, are skipped.
    """
    by_label: dict[str, list[JSON]] = {}
    for name, index in config.label2id.items():
        if name not in rules:
            continue
        scores, positives = _known_scores(config, followed, labels, index)
        by_label[name] = []
        for rule in rules[name]:
            judged = judged_scores(scores, rule["patience"], rule.get("window", 1))
            by_label[name].append({**rule, "test": detection(judged, positives, rule["threshold"])})
    return by_label


def _known_scores(
    config: ProbeConfig,
    followed: Sequence[torch.Tensor],
    labels: np.ndarray,
    index: int,
    score: Callable[[torch.Tensor, ProbeConfig], torch.Tensor] = probabilities,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the scores of a label after each token, and which rows have the label, for rows where the label is known."""
    rows, positives = known_rows(labels, index, config)
    return [score(followed[row], config)[:, index].numpy() for row in rows], positives


def reply_report(
    config: ProbeConfig, followed: Sequence[torch.Tensor], labels: np.ndarray, resamples: int = 1000
) -> JSON:
    """Return how well a head halts replies at their first token over a threshold.

    Args:
        followed: what `follow_replies` returned for the rows.
        labels: labels of the rows. A row does not count for a label that is not known.
        resamples: number of resamples of the bootstrap; 0 for no intervals.

    Returns:
        For the flagged one of two labels: `label`; `r_auc`, AUROC of the replies by their largest score, None if all replies have
        the label, or none; `intervals`, with the interval of `r_auc`; and by name `thresholds`: `threshold`, what `detection`
        gives, and its `intervals`. The thresholds are the head's own thresholds, and for each of `RATES` the threshold that halts
        at most this share of these very replies without the label; the interval of its `detected` allows for the fit.
        For a multi-label head a dict of the same by label: its `flagged` labels, or all labels if it flags none.
    """
    if config.problem_type == "multi_label_classification":
        names = config.flagged or list(config.label2id)
        return {name: _label_report(config, config.label2id[name], followed, labels, resamples) for name in names}
    index = config.need_flagged_index("reply_report")
    return _label_report(config, index, followed, labels, resamples)


def _label_report(
    config: ProbeConfig, index: int, followed: Sequence[torch.Tensor], labels: np.ndarray, resamples: int
) -> JSON:
    scores, positives = _known_scores(config, followed, labels, index)
    odds, _ = _known_scores(config, followed, labels, index, log_odds)
    largest = np.array([row.max() for row in odds])
    area, interval = auroc(largest, positives, resamples)
    thresholds = {"own": own_threshold(config, index), **(config.thresholds or {})}
    fitted_rates = {}  # by the name of a threshold that is fitted here
    if 0 < positives.sum() < len(positives):
        highest = np.array([row.max() for row in scores])
        for rate in RATES:
            name = f"{rate:.1%} halted"
            thresholds[name] = highest_recall_threshold(highest, positives, rate)
            fitted_rates[name] = rate
    measured = {}
    for name, threshold in thresholds.items():
        statistic = partial(_resampled, _halts(scores, threshold), largest, positives, fitted_rates.get(name))
        limits = intervals(statistic, len(scores), resamples) if resamples else {}
        measured[name] = {"threshold": threshold, **detection(scores, positives, threshold), "intervals": limits}
    return {
        "label": config.id2label[index],
        "r_auc": area,
        "intervals": {"r_auc": interval},
        "thresholds": measured,
    }


def _resampled(
    halts: _Halts, largest: np.ndarray, positives: np.ndarray, rate: float | None, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Return `_measures` of resamples of the replies. With a `rate` each resample has its own threshold for `detected`."""
    resamples = []
    for counts in weights.astype(int):
        drawn = np.repeat(np.arange(len(positives)), counts)
        is_positive = positives[drawn]
        halted, read, lengths = halts
        values = _measures((halted[drawn], read[drawn], lengths[drawn]), is_positive)
        if rate is not None:
            values["detected"] = np.nan
            if 0 < is_positive.sum() < len(drawn):
                limit = highest_unflagged(largest[drawn[~is_positive]], rate)
                values["detected"] = (largest[drawn[is_positive]] > limit).mean()
        resamples.append(values)
    return {name: np.array([values[name] for values in resamples]) for name in resamples[0]}
