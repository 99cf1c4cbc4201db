"""Reports on a head: its metrics on labelled rows, and the measurements that its card and its plots show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from ..files import JSON
from ..heads.configuration import ProbeConfig
from ..heads.decision import predictions, probabilities
from ..heads.probe import ProbeModel
from .bootstrap import intervals, share_of
from .calibration import own_threshold, reliability, threshold_table
from .metrics import all_scores, confusion, known_rows, outcomes, score_statistic
from .prediction import predict_logits, score_rows
from .transformations import GROUPS


def inspect_head(
    probe: ProbeModel,
    dataset: Dataset,
    labels: np.ndarray,
    logits: torch.Tensor | None = None,
    config: ProbeConfig | None = None,
) -> JSON:
    """Return what cards and plots show of a head beyond its metrics.

    Args:
        logits (`[rows, num_labels]`, *optional*): logits in place of those of `predict_logits`, such as those of heads that have
            not learned from the rows.
        config: the config whose threshold counts. Defaults to that of the head.

    Returns:
        `layer_weights`, if the head type has such weights: `layers`, and `by_label`: for each label that occurs the mean weight
        of each layer over the label's rows, `[layers_read]`.
        But for regression: `calibration` (see `reliability`), `confusion` (single-label) or `outcomes` (multi-label), and
        `thresholds` (see `threshold_table`) if the head has a threshold.
    """
    config = config or probe.config
    head_logits, *weights = score_rows(
        [probe], dataset, lambda output: [output.logits, output.layer_weights], output_attentions=True
    )
    if logits is None:
        logits = predict_logits(probe, dataset) if config.reads_reply else head_logits
    inspection: JSON = {}
    if weights:
        by_label = {}
        for index, name in config.id2label.items():
            rows, has_label = known_rows(labels, index, config)
            if has_label.any():
                means = weights[0][rows[has_label]].mean(dim=0).tolist()
                by_label[name] = [round(value, 5) for value in means]
        inspection["layer_weights"] = {"layers": probe.layer_indices, "by_label": by_label}
    if config.problem_type == "regression":
        return inspection
    inspection["calibration"] = reliability(logits, labels, config)
    if config.problem_type == "single_label_classification":
        inspection["confusion"] = confusion(logits, labels, config)
    else:
        inspection["outcomes"] = outcomes(logits, labels, config)
    if thresholds := threshold_table(logits, labels, config):
        inspection["thresholds"] = thresholds
    return inspection


def report(
    config: ProbeConfig, logits: torch.Tensor, labels: np.ndarray, slices: Mapping[str, Sequence[object]] | None = None
) -> JSON:
    """Return `rows`, the metrics of `score_logits`, and `slices`: by column and value the same of the rows with this value.

    A metric of a slice is None if it needs rows of a label that no row has.

    Args:
        slices: columns by name, one value a row.
    """
    return _report_by_label(config, logits, labels, slices)[0]


def detailed_report(
    config: ProbeConfig,
    logits: torch.Tensor,
    labels: np.ndarray,
    slices: Mapping[str, Sequence[object]] | None = None,
    resamples: int = 1000,
) -> JSON:
    """Return `report` with confidence intervals, and the numbers of each label.

    Args:
        resamples: number of resamples of the bootstrap that gives 95 % intervals; 0 for no intervals.

    Returns:
        The keys of `report`. A metric that needs rows of a label that no row has is None.
        But for regression `labels`: by name the metrics of the label against all others, and its `rows`; and `calibration` (see
        `reliability`). For single-label heads `confusion`.
        With resamples `bootstrap`: `resamples`, `seed` and `level`; and `intervals` beside the metrics of all rows, of each slice
        and of each label: by metric `[low, high]`, or None if the metric is undefined in all resamples.
    """
    result, by_label = _report_by_label(config, logits, labels, slices, resamples)
    result = _without_undefined(result, labels, config)
    if config.problem_type != "regression":
        result["labels"] = {}
        for index, name in config.id2label.items():
            _, has_label = known_rows(labels, index, config)
            result["labels"][name] = {"rows": int(has_label.sum()), **by_label[name]}
        result["calibration"] = reliability(logits, labels, config)
    if config.problem_type == "single_label_classification":
        result["confusion"] = confusion(logits, labels, config)
    if resamples:
        result["bootstrap"] = {"resamples": resamples, "seed": 0, "level": 0.95}
    return result


def _report_by_label(
    config: ProbeConfig,
    logits: torch.Tensor,
    labels: np.ndarray,
    slices: Mapping[str, Sequence[object]] | None = None,
    resamples: int = 0,
) -> tuple[JSON, dict[str, JSON]]:
    """Return what `report` returns, and the metrics of each label; both have `intervals` if there are resamples."""
    statistic = score_statistic(logits, labels, config)
    parts: dict[str | None, JSON] = dict(all_scores(statistic, len(labels)))
    if resamples:
        limits = intervals(statistic, len(labels), resamples)
        for label, part in parts.items():
            part["intervals"] = {name: limits[label, name] for name in part}
    result = {"rows": len(labels), **parts.pop(None)}
    for column, values in (slices or {}).items():
        texts = np.array([str(value) for value in values], dtype=object)
        groups = result.setdefault("slices", {})[column] = {}
        for value in sorted(set(texts)):
            rows = texts == value
            part, _ = _report_by_label(config, logits[rows], labels[rows], None, resamples)
            groups[value] = _without_undefined(part, labels[rows], config)
    return result, parts


def _without_undefined(result: JSON, labels: np.ndarray, config: ProbeConfig) -> JSON:
    """Return a report in which metrics of the flagged one of two labels are None if they need rows of a label that no row has."""
    if config.flagged_index is None:
        return result
    present = set(labels.tolist())
    if len(present) == 2:
        return result
    undefined = ["f1", "precision"]
    if config.flagged_index not in present:
        undefined.append("recall")
    return result | dict.fromkeys(undefined)


def flagged_share(config: ProbeConfig, logits: torch.Tensor) -> JSON:
    """Return the flagged `label` of a head with two labels, the `share` of the rows that get it, `interval` and `threshold`.

    If the head has named thresholds, `named` has `share`, `interval` and `threshold` of each.
    """
    index = config.need_flagged_index("flagged_share")
    probs = probabilities(logits.float(), config)

    def share_at(config: ProbeConfig) -> JSON:
        flagged = predictions(probs, config).numpy() == index
        return {**share_of(flagged), "threshold": own_threshold(config, index)}

    result = {"label": config.id2label[index], **share_at(config)}
    if config.thresholds:
        result["named"] = {}
        for name, value in config.thresholds.items():
            result["named"][name] = share_at(config.replace(threshold=value))
    return result


def describe_evaluation(result: JSON, source: str) -> JSON:
    """Return what a head folder keeps of what `evaluate` has measured on the rows of a source."""
    metrics = {key: value for key, value in result.items() if key != "rows" and not isinstance(value, (dict, list))}
    defined = {key: value for key, value in result.get("intervals", {}).items() if metrics[key] is not None}
    kept = {key: result[key] for key in ("flagged", "replies", "novelty", *GROUPS) if key in result}
    return {"source": source, "rows": result["rows"], "metrics": metrics, "intervals": defined, **kept}
