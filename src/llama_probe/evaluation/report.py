"""Scores of a head on labelled rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..data.states import SharedStates, iterate_states
from ..distributed import merge_rows
from ..heads.configuration import ProbeConfig
from ..heads.decision import ProbeOutput, predictions, probabilities
from ..heads.probe import ProbeModel
from ..heads.scope import check_rows
from .bootstrap import intervals, score_statistic, share_interval
from .calibration import calibration_gaps, reliability, threshold_table
from .metrics import confusion, has_label, label_scores, outcomes, score_logits


def predict_logits(
    probe: ProbeModel, dataset: Dataset, batch_tokens: int = 4096, progress: bool = False
) -> torch.Tensor:
    """Return logits `[rows, num_labels]` of a `PromptDataset` or `StateDataset`, in its order; see `predict_together`."""
    return predict_together([probe], dataset, batch_tokens, progress)[0]


def predict_together(
    probes: Sequence[ProbeModel], dataset: Dataset, batch_tokens: int = 4096, progress: bool = False
) -> list[torch.Tensor]:
    """Return logits `[rows, num_labels]` of each head, in the order of the data set; see `score_batches`.

    In a process group (see `llama_probe.distributed`) the ranks divide the rows, and each rank gets all logits.
    """
    batches = score_batches(probes, dataset, batch_tokens, progress)
    return collect(len(dataset), ((rows, [output.logits for output in outputs]) for rows, outputs in batches))


def predict_rows(
    probe: ProbeModel, dataset: Dataset, progress: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the logits of `predict_logits`, and novelty `[rows]` if the head tells it."""
    if probe.novelty is None:
        return predict_logits(probe, dataset, progress=progress), None
    batches = score_batches([probe], dataset, progress=progress)
    logits, novelty = collect(len(dataset), ((rows, [found.logits, found.novelty]) for rows, (found,) in batches))
    return logits, novelty


def collect(count: int, batches: Iterable[tuple[list[int], Sequence[torch.Tensor]]]) -> list[torch.Tensor]:
    """Put the tensors `[B, ...]` of batches, which have row numbers, and of all ranks together: `[count, ...]` on the CPU."""
    found: list[torch.Tensor] = []
    scored: list[int] = []
    for rows, parts in batches:
        found = found or [torch.zeros(count, *part.shape[1:]) for part in parts]
        for whole, part in zip(found, parts, strict=True):
            whole[rows] = part.to("cpu", whole.dtype)
        scored += rows
    return [merge_rows(scored, whole) for whole in found]


def score_batches(
    probes: Sequence[ProbeModel], dataset: Dataset, batch_tokens: int = 4096, progress: bool = False, **kwargs
) -> Iterator[tuple[list[int], list[ProbeOutput]]]:
    """Run heads over a data set with one pass of the backbone, or one reading of the cached states, for all.

    Args:
        probes: heads that read the same tokens, the first bound to their backbone unless the data set holds hidden states.
        dataset: a `PromptDataset` or `StateDataset`.
        batch_tokens: tokens of a batch, padding included. They bound the memory: the hidden states of a batch are there for
            all layers that are read. A longer row is a batch of its own.
        kwargs: further arguments of `ProbeModel.score`, such as `output_attentions`.

    Yields:
        Row numbers of a batch of this rank, and the output of each head. Rows of similar length share a batch.

    Raises:
        ProbeError: no token of a row counts.
    """
    for rows, states, mask in states_for(probes, dataset, batch_tokens, progress):
        check_rows(mask)
        shared = SharedStates(states)
        with torch.no_grad():
            outputs = [probe.score(shared(probe), mask.to(probe.device), **kwargs) for probe in probes]
        yield rows, outputs


def states_for(
    probes: Sequence[ProbeModel], dataset: Dataset, batch_tokens: int = 4096, progress: bool = False
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Yield what `iterate_states` yields of this rank's batches, with all layers for several heads, else those it reads."""
    for probe in probes:
        probe.eval()
    lm = None if len(dataset) and "hidden_states" in dataset[0] else probes[0].backbone
    layers = probes[0].layer_indices if len(probes) == 1 else None
    for rows, states, mask in iterate_states(
        dataset, probes[0].config, lm, batch_tokens, progress, layers, divided=True
    ):
        if layers is not None and len(states) != len(layers):  # the cache has layers that this head does not read
            states = states[layers]
        yield rows, states, mask


def inspect_head(
    probe: ProbeModel,
    dataset: Dataset,
    labels: np.ndarray,
    batch_tokens: int = 4096,
    logits: torch.Tensor | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Return what cards and plots show of a head beyond its metrics.

    Args:
        batch_tokens: see `score_batches`.
        logits (`[rows, num_labels]`, *optional*): logits to judge by if the head was trained on these rows. Defaults to the
            head's own.

    Returns:
        `layer_weights`, if the kind of head has any: `layers`, and `by_label`: for each label that occurs the mean weight of
        each layer over its rows, `[layers_read]`. But for regression `calibration` (see `reliability`), `confusion`
        (single-label) or `outcomes` (multi-label), and `thresholds` (see `threshold_table`) if the head has any.
    """
    config = probe.config
    batches = score_batches([probe], dataset, batch_tokens, progress, output_attentions=True)
    parts = (
        (rows, [out.logits] if out.layer_weights is None else [out.logits, out.layer_weights])
        for rows, (out,) in batches
    )
    own, *weights = collect(len(dataset), parts)
    logits = own if logits is None else logits
    found: dict[str, Any] = {}
    if weights:
        by_label = {}
        for index, name in config.id2label.items():
            rows = slice(None)
            if config.problem_type != "regression":
                rows = np.flatnonzero(has_label(labels, index, config))
            if len(weights[0][rows]):
                by_label[name] = [round(value, 5) for value in weights[0][rows].mean(dim=0).tolist()]
        found["layer_weights"] = {"layers": probe.layer_indices, "by_label": by_label}
    if config.problem_type == "regression":
        return found
    found["calibration"] = reliability(logits, labels, config)
    if config.problem_type == "single_label_classification":
        found["confusion"] = confusion(logits, labels, config)
    else:
        found["outcomes"] = outcomes(logits, labels, config)
    if thresholds := threshold_table(logits, labels, config):
        found["thresholds"] = thresholds
    return found


def report(
    config: ProbeConfig, logits: torch.Tensor, labels: np.ndarray, slices: dict[str, Sequence[Any]] | None = None
) -> dict[str, Any]:
    """Return metrics of all rows, and of each group of rows with the same value in a column.

    Args:
        config, logits, labels: see `score_logits`.
        slices: columns by name, one value a row.

    Returns:
        `rows`, the metrics of `score_logits`, and `slices`: column -> value -> the same.
    """
    result: dict[str, Any] = {"rows": len(labels), **score_logits(logits, labels, config)}
    for column, value, rows in _groups(slices):
        groups = result.setdefault("slices", {}).setdefault(column, {})
        groups[value] = {"rows": int(rows.sum()), **score_logits(logits[rows], labels[rows], config)}
    return result


def detailed_report(
    config: ProbeConfig,
    logits: torch.Tensor,
    labels: np.ndarray,
    slices: dict[str, Sequence[Any]] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Return `report` with confidence intervals, and the numbers of each label.

    Args:
        config, logits, labels, slices: as for `report`.
        resamples, seed: of the bootstrap that gives 95 % intervals; 0 resamples for none.

    Returns:
        The keys of `report`. But for regression `labels` (see `label_scores`), `calibration` (see `reliability`) and, for
        single-label heads, `confusion`. With resamples `bootstrap`: `resamples`, `seed` and `level`; and `intervals`
        beside the metrics of all rows, of each slice and of each label, and beside the calibration errors: by metric
        `[low, high]`, or None if the metric is undefined in all resamples.
    """
    result, classes = report(config, logits, labels, slices), config.problem_type != "regression"
    if classes:
        result["labels"] = label_scores(logits, labels, config)
        result["calibration"] = reliability(logits, labels, config)
    if config.problem_type == "single_label_classification":
        result["confusion"] = confusion(logits, labels, config)
    if not resamples:
        return result
    result["bootstrap"] = {"resamples": resamples, "seed": seed, "level": 0.95}
    statistics = [score_statistic(logits, labels, config)]
    if classes:
        gaps = calibration_gaps(logits, labels, config)
        statistics.append(
            lambda weights: {
                name: np.abs(weights @ part).sum(axis=1) / weights.sum(axis=1) for name, part in gaps.items()
            }
        )
    found = intervals(statistics, len(labels), resamples, seed)
    result["intervals"] = _select(result, found)
    if classes:
        result["calibration"]["intervals"] = _select(result["calibration"], found)
        for index, part in enumerate(result["labels"].values()):
            part["intervals"] = {name: found[f"label_{name}"][index] for name in part if f"label_{name}" in found}
    for column, value, rows in _groups(slices):
        part = result["slices"][column][value]
        statistic = score_statistic(logits[rows], labels[rows], config)
        part["intervals"] = _select(part, intervals([statistic], part["rows"], resamples, seed))
    return result


def flagged_share(config: ProbeConfig, logits: torch.Tensor) -> dict[str, Any]:
    """Return how many rows get label 1 from a head with two labels.

    Returns:
        `share`, its 95 % `interval` (Wilson, 1927), and the `threshold`. If the head has further thresholds, `named` has the
        same of each.
    """
    probs = probabilities(logits.float(), config)

    def share(config: ProbeConfig) -> dict[str, Any]:
        flagged = predictions(probs, config)
        interval = list(share_interval(int(flagged.sum()), len(flagged)))
        threshold = 0.5 if config.threshold is None else config.threshold
        return {"share": float(flagged.double().mean()), "interval": interval, "threshold": threshold}

    named = {name: share(config.replace(threshold=value)) for name, value in (config.thresholds or {}).items()}
    return share(config) | ({"named": named} if named else {})


def without_undefined(result: dict[str, Any], labels: np.ndarray) -> dict[str, Any]:
    """Return a report of a head with two labels in which metrics are None that need rows of a label that none has."""
    found, undefined = set(labels.tolist()), set()
    if len(found) < 2:
        undefined = {"f1", "precision"} | ({"recall"} if 1 not in found else set())
    return {key: None if key in undefined else value for key, value in result.items()}


def describe_evaluation(result: dict[str, Any], **facts) -> dict[str, Any]:
    """Return what a head folder keeps of a report: `rows`, `metrics` of all rows, `intervals`, and by-products.

    Args:
        result: from `detailed_report`, with `flagged`, `novelty` and `wrappings` if there are any.
        facts: further entries, such as `source`.
    """
    metrics = {key: value for key, value in result.items() if key != "rows" and not isinstance(value, (dict, list))}
    intervals = {key: value for key, value in result.get("intervals", {}).items() if metrics[key] is not None}
    kept = {key: result[key] for key in ("flagged", "novelty", "wrappings") if key in result}
    return {**facts, "rows": result["rows"], "metrics": metrics, "intervals": intervals, **kept}


def _groups(slices: dict[str, Sequence[Any]] | None) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield column, value as text, and the mask `[rows]` of the rows with this value."""
    for column, values in (slices or {}).items():
        texts = np.array([str(value) for value in values], dtype=object)
        for value in sorted(set(texts)):
            yield column, value, texts == value


def _select(part: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in part if name in found}
