"""Measurements of a recipe: rows that no head has learned from, twins without sources, TF-IDF, wrappings."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from torch import nn

from ..data.cached_states import PromptDataset
from ..data.labelled_texts import LabelledTexts
from ..data.prompts import Text
from ..evaluation.prediction import predict_rows
from ..evaluation.report import detailed_report, flagged_share
from ..evaluation.wrappings import kept_labels
from ..heads.configuration import ProbeConfig
from ..heads.novelty import FAR
from ..heads.probe import ProbeModel
from .prepared import PreparedRun


@dataclass
class Baseline:
    """TF-IDF with logistic regression: what the words alone tell.

    Attributes:
        config: config of the head beside it, with the baseline's own threshold for each rate.
    """

    model: Pipeline
    config: ProbeConfig

    @classmethod
    def fit(cls, run: PreparedRun, config: ProbeConfig, without: Sequence[int] = ()) -> Baseline:
        """Fit on the plain and extra training rows, without copies, and find thresholds on the calibration rows."""
        rows, skipped = run.rows, set(without)
        learned = [row for row in range(rows.num_plain + rows.num_extra) if row not in skipped]
        model = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), LogisticRegression(C=20, max_iter=1000)
        )
        model.fit([_plain_text(rows.train.texts[row]) for row in learned], rows.train.labels[learned])
        baseline = cls(
            model, config.replace(temperature=1.0, threshold=None, thresholds=None, flagged=config.flagged_labels)
        )
        if rows.calibration is not None and config.thresholds:
            scores = np.sort(baseline.scores(rows.calibration.texts))[::-1]
            found = {}
            for name, rate in zip(config.thresholds, run.recipe.calibration.rates, strict=True):
                place = int(rate * len(scores) + 1e-9)
                found[name] = float(np.clip((scores[max(0, place - 1)] + scores[place]) / 2, 1e-6, 1 - 1e-6))
            threshold = next(iter(found.values()))
            baseline.config = baseline.config.replace(threshold=threshold, thresholds=found)
        return baseline

    def scores(self, texts: Sequence[Text]) -> np.ndarray:
        """Return the probability of the flagged label of each text."""
        return self.model.predict_proba(list(map(_plain_text, texts)))[:, self.config.flagged_index]

    def logits(self, texts: Sequence[Text]) -> torch.Tensor:
        """Return logits `[rows, 2]` with these probabilities."""
        probs = torch.from_numpy(self.model.predict_proba(list(map(_plain_text, texts))))
        return probs.clamp(1e-9, 1 - 1e-9).log().float()


def measure(run: PreparedRun, head: ProbeModel, twins: Mapping[str, ProbeModel]) -> dict[str, Any]:
    """Measure a head on the further rows of its recipe, and each twin on the rows that it has not learned from.

    Args:
        head: the head, with its thresholds. twins: heads by the name of what they were trained without.

    Returns:
        `rates`: names of the thresholds; `parts`: for each set of rows `name`, `twin` (None for the head itself), `rows`,
        `auroc` and `auprc` with `intervals` if both labels occur, `labels`: for each label that occurs `rows` and by threshold
        the share that is flagged with its interval, `novel`: share of rows unlike the training data, `tfidf`: the same of the
        baseline; `wrappings`, see `kept_labels`; `bytes`: of the head's weights.
    """
    recipe, binary = run.recipe, head.config.flagged_index is not None and head.config.num_labels == 2
    parts = []
    baseline = Baseline.fit(run, head.config) if recipe.measure.tfidf and binary else None
    for name, rows in run.rows.measured.items():
        parts.append(_measure_part(name, None, head, run.datasets[f"measure.{name}"], rows, baseline))
    for twin, probe in twins.items():
        without = run.rows.held_out[twin].tolist()
        baseline = Baseline.fit(run, probe.config, without) if recipe.measure.tfidf and binary else None
        for name, rows in run.rows.held_rows[twin].items():
            parts.append(_measure_part(name, twin, probe, run.datasets[f"{twin}.{name}"], rows, baseline))
    found: dict[str, Any] = {"rates": list(head.config.thresholds or {}), "parts": parts}
    found["bytes"] = sum(tensor.numel() * tensor.element_size() for tensor in head.state_dict().values())
    if run.rows.measured and recipe.measure.quantised:
        name, rows = next(iter(run.rows.measured.items()))
        encoded = run.prompts.encode_for(head.config, rows.texts)
        prompts = PromptDataset(encoded.ids, rows.labels, encoded.masks)
        for form in recipe.measure.quantised:
            head.set_backbone(quantised(run.lm, form))
            parts.append(_measure_part(f"{name}, {form} copy of the backbone", None, head, prompts, rows, None))
        head.set_backbone(run.lm)
    if recipe.measure.wrappings in run.rows.measured:
        texts = [text for text in run.rows.measured[recipe.measure.wrappings].texts if isinstance(text, str)]
        found["wrappings"] = kept_labels(head, texts, run.prompts, progress=True)
    return found


@torch.no_grad()
def quantised(lm: nn.Module, form: str) -> nn.Module:
    """Return a copy of an LM whose layers have the values of quantised weights, in their own dtype.

    Args:
        form: `"int8"`: symmetric, a scale a row. `"int4"`: scale and zero point for each group of 32 weights.
    """
    rounded = copy.deepcopy(lm)
    for module in rounded.modules():
        if not isinstance(module, nn.Linear) or module is rounded.get_output_embeddings():
            continue  # embeddings, which the LM head may share, stay
        weight = module.weight.float()
        if form == "int8":
            scale, low = weight.abs().amax(dim=1, keepdim=True) / 127, 0.0
        else:
            weight = weight.unflatten(1, (-1, math.gcd(32, module.in_features)))
            low, high = weight.aminmax(dim=-1, keepdim=True)
            scale = (high - low) / 15
        values = ((weight - low) / scale.clamp(min=1e-12)).round() * scale + low
        module.weight.copy_(values.view(module.weight.shape))
    return rounded


def _measure_part(
    name: str, twin: str | None, head: ProbeModel, dataset: Any, rows: LabelledTexts, baseline: Baseline | None
) -> dict[str, Any]:
    logits, novelty = predict_rows(head, dataset, progress=True)
    part = {"name": name, "twin": twin, "rows": len(rows), **_scores(head.config, logits, rows.labels)}
    if novelty is not None:
        part["novel"] = float((novelty > FAR).double().mean())
    if baseline is not None:
        part["tfidf"] = _scores(baseline.config, baseline.logits(rows.texts), rows.labels)
    return part


def _scores(config: ProbeConfig, logits: torch.Tensor, labels: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if config.problem_type != "single_label_classification" or len(set(labels.tolist())) > 1:
        report = detailed_report(config, logits, labels)
        metrics = ("auroc", "auprc") if config.problem_type != "regression" else ("r2",)
        found |= {name: report[name] for name in metrics}
        found["intervals"] = {name: report["intervals"][name] for name in metrics}
    if config.flagged_index is None or config.num_labels != 2:
        return found
    found["labels"] = {}
    for index, label in config.id2label.items():
        places = np.flatnonzero(labels == index)
        if len(places):
            share = flagged_share(config, logits[places])
            named = share.get("named") or {"threshold": share}
            values = {key: {"share": value["share"], "interval": value["interval"]} for key, value in named.items()}
            found["labels"][label] = {"rows": len(places), **values}
    return found


def _plain_text(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(str(turn.get("content", "")) for turn in text)
