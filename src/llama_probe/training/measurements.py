"""Measurements of a recipe: rows that no head has learned from, ablations without sources, TF-IDF, attacks."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer
from torch import nn
from torch.utils.data import Dataset
from transformers.utils import logging

from ..data.labelled_texts import LabelledTexts
from ..data.prompts import Text
from ..errors import ProbeError, first_line
from ..evaluation.calibration import with_rates
from ..evaluation.novelty_fit import far_share
from ..evaluation.prediction import predict_rows
from ..evaluation.report import detailed_report, flagged_share
from ..evaluation.transformations import ATTACKS, kept_labels
from ..files import JSON
from ..heads.configuration import ProbeConfig
from ..heads.decision import predictions, probabilities
from ..heads.probe import ProbeModel
from .plan import Plan, States
from .recipe_rows import Ablation


logger = logging.get_logger(__name__)


def tfidf_classifier() -> Pipeline:
    """Return logistic regression on TF-IDF of words and pairs of words, to be fitted to texts."""
    features = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    return make_pipeline(features, LogisticRegression(C=20, max_iter=1000))


def length_classifier() -> Pipeline:
    """Return logistic regression on the number of characters, to be fitted to texts."""
    features = FunctionTransformer(lambda texts: np.log1p([[len(text)] for text in texts]))
    return make_pipeline(features, LogisticRegression(C=20, max_iter=1000))


class Baseline:
    """Logistic regression on TF-IDF or on the number of characters: what a head is compared with.

    A baseline learns from the plain and extra rows, except the rows `without`, and not from augmentations. Each of several
    labels has a model. The thresholds have the rates of the head with this config.
    """

    def __init__(self, plan: Plan, config: ProbeConfig, without: Sequence[int] = (), by_length: bool = False):
        rows = plan.rows
        learned = sorted(set(range(rows.num_plain + rows.num_extra)) - set(without))
        texts = [_plain_text(rows.train.texts[row]) for row in learned]
        self.models = []
        for labels in np.atleast_2d(rows.train.labels[learned].T):
            known = np.flatnonzero(~np.isnan(labels))
            model = length_classifier() if by_length else tfidf_classifier()
            self.models.append(model.fit([texts[row] for row in known], labels[known]))
        self.config = config.replace(temperature=1.0, threshold=None, thresholds=None)
        if rows.calibration is not None and config.thresholds:
            self.config = with_rates(self.config, self.logits(rows.calibration.texts), plan.recipe.calibration.rates)

    def logits(self, texts: Sequence[Text]) -> torch.Tensor:
        """Return logits `[rows, num_labels]` of texts."""
        plain = list(map(_plain_text, texts))
        probs = torch.from_numpy(np.stack([model.predict_proba(plain) for model in self.models])).clamp(1e-9, 1 - 1e-9)
        if self.config.problem_type == "multi_label_classification":
            return probs[..., 1].T.logit().float()
        return probs[0].log().float()

    def labels(self, texts: Sequence[Text]) -> np.ndarray:
        """Return labels `[rows]`, or `[rows, num_labels]` of several at once."""
        return predictions(probabilities(self.logits(texts), self.config), self.config).numpy()


def measurements(
    plan: Plan, states: States, head: ProbeModel, ablations: Mapping[str, ProbeModel], before: JSON | None = None
) -> Iterator[JSON]:
    """Measure a head on the further rows of its recipe, and each ablation on the rows of the sources that it leaves out.

    Args:
        before: measurements of a run that was stopped, which are not repeated.

    Yields:
        The section `measured` of `results.json` after each measurement; `docs/recipes.md` explains its keys.
    """
    recipe = plan.recipe
    rows = plan.rows
    rates = list(head.config.thresholds or {}) or ["threshold"] * (head.config.flagged_index is not None)
    num_bytes = sum(tensor.nbytes for tensor in head.state_dict().values())
    results = before or {"rates": rates, "parts": [], "bytes": num_bytes}
    done = {(part["name"], part["ablation"]) for part in results["parts"]}
    for ablation, probe in {None: head, **ablations}.items():
        held = Ablation([], [], rows.measured) if ablation is None else rows.ablations[ablation]
        left = {name: part for name, part in held.measured.items() if (name, ablation) not in done}
        baseline = _baseline(plan, probe.config, held.left_out) if left else None
        for name, part in left.items():
            dataset = states[f"measure.{name}" if ablation is None else f"ablation-{ablation}.{name}"]
            scores = _measure_part(probe, dataset, part, baseline, recipe.measure.slice_columns)
            results = _with_part(results, {"name": name, "ablation": ablation, **scores})
            yield results
    if rows.measured:
        first = next(iter(rows.measured))
        for form in recipe.measure.quantised:
            name = f"{first}, {form} copy of the backbone"
            if (name, None) in done:
                continue
            scores = _measure_quantised(plan, head, form, rows.measured[first])
            if scores is not None:
                results = _with_part(results, {"name": name, "ablation": None, **scores})
                yield results
    if recipe.measure.wrappings in rows.measured and "wrappings" not in results:
        results = results | _kept(plan, head, rows.measured[recipe.measure.wrappings], ["wrappings"])
        yield results
    if recipe.measure.attacks in rows.measured and not results.keys() & set(ATTACKS):
        around = rows.calibration and rows.calibration.at_most(500, recipe.seed)
        baselines = {"tfidf": _baseline(plan, head.config), "length": _baseline(plan, head.config, by_length=True)}
        labellers = {name: baseline.labels for name, baseline in baselines.items() if baseline is not None}
        results = results | _kept(plan, head, rows.measured[recipe.measure.attacks], ATTACKS, around, labellers)
        yield results


def _with_part(results: JSON, part: JSON) -> JSON:
    return results | {"parts": [*results["parts"], part]}


def _measure_quantised(plan: Plan, head: ProbeModel, form: str, rows: LabelledTexts) -> JSON | None:
    """Measure a head on a quantised copy of the backbone; None, with a warning, if there is no memory for the copy."""
    prompts = plan.prompts.encode_for(head.config, rows.texts, rows.labels)
    try:
        head.set_backbone(quantised(plan.lm, form))
        return _measure_part(head, prompts, rows, None)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        logger.warning(f"the {form} copy of the backbone is not measured, it needs more memory: {first_line(error)}")
        return None
    finally:
        head.set_backbone(plan.lm)


def _kept(plan: Plan, head: ProbeModel, rows: LabelledTexts, groups: Sequence[str], *others) -> JSON:
    """Return the results of `kept_labels`, or nothing, with a warning, if the head finds none of the rows."""
    try:
        return kept_labels(head, rows, plan.prompts, groups, *others)
    except ProbeError as error:
        logger.warning(f"{error}: not measured")
        return {}


def _baseline(
    plan: Plan, config: ProbeConfig, without: Sequence[int] = (), by_length: bool = False
) -> Baseline | None:
    """Return a baseline beside a head with labels to find, if the recipe wants one and its thresholds can be fitted."""
    has_several = config.problem_type == "multi_label_classification"
    if not plan.recipe.measure.tfidf or (config.flagged_index is None and not has_several):
        return None
    try:
        return Baseline(plan, config, without, by_length)
    except (
        ProbeError,
        ValueError,
    ) as error:  # ValueError: texts without words that TF-IDF knows, such as Chinese texts
        logger.warning(f"{'The length' if by_length else 'TF-IDF'} is not measured: {error}")
        return None


@torch.no_grad()
def quantised(lm: nn.Module, form: str) -> nn.Module:
    """Return a copy of an LM whose layers have the values of quantised weights, in their own dtype.

    Args:
        form: `"int8"`: symmetric, a scale a row. `"int4"`: scale and zero point for each group of 32 weights.
    """
    rounded = copy.deepcopy(lm)
    for module in rounded.modules():
        if isinstance(module, nn.Embedding) or module is rounded.get_output_embeddings():
            continue  # embeddings, which the LM head may share, stay
        for matrix in module.parameters(recurse=False):
            if matrix.dim() < 2 or not matrix.is_floating_point():
                continue
            weight = matrix.float()
            if form == "int8":
                scale = weight.abs().amax(dim=-1, keepdim=True) / 127
                low = 0.0
            else:
                weight = weight.unflatten(-1, (-1, math.gcd(32, weight.shape[-1])))
                low, high = weight.aminmax(dim=-1, keepdim=True)
                scale = (high - low) / 15
            values = ((weight - low) / scale.clamp(min=1e-12)).round() * scale + low
            matrix.copy_(values.view(matrix.shape))
    return rounded


def _measure_part(
    head: ProbeModel,
    dataset: Dataset,
    rows: LabelledTexts,
    baseline: Baseline | None,
    slice_columns: Sequence[str] = (),
) -> JSON:
    logits, novelty, _ = predict_rows(head, dataset)
    part = {"rows": len(rows), **_scores_of_part(head.config, logits, rows.labels)}
    for column in slice_columns:
        values = np.array([str(value) for value in rows.columns.get(column, ())])
        for value in sorted(set(values)):
            places = np.flatnonzero(values == value)
            scores = {"rows": len(places), **_scores_of_part(head.config, logits[places], rows.labels[places])}
            part.setdefault("slices", {}).setdefault(column, {})[value] = scores
    if novelty is not None:
        part["novel"] = far_share(novelty)["far"]
    if baseline is not None:
        part["tfidf"] = _scores_of_part(baseline.config, baseline.logits(rows.texts), rows.labels)
    return part


def _scores_of_part(config: ProbeConfig, logits: torch.Tensor, labels: np.ndarray) -> JSON:
    scores: JSON = {}
    if config.problem_type != "single_label_classification" or len(set(labels.tolist())) > 1:
        report = detailed_report(config, logits, labels)
        metrics = ("auroc", "auprc") if config.problem_type != "regression" else ("r2", "mae", "mse")

        def chosen(part: JSON) -> JSON:
            limits = {name: part["intervals"][name] for name in metrics}
            return {name: part[name] for name in metrics} | {"intervals": limits}

        scores = chosen(report)
        if config.flagged_index is None and config.problem_type != "regression":
            by_label = ((name, part) for name, part in report["labels"].items() if part["auroc"] is not None)
            scores["labels"] = {name: {"rows": part["rows"], **chosen(part)} for name, part in by_label}
    if config.flagged_index is not None and config.num_labels == 2:
        scores["labels"] = {}
        for index, label in config.id2label.items():
            if len(places := np.flatnonzero(labels == index)):
                share = flagged_share(config, logits[places])
                named = share.get("named") or {"threshold": share}
                values = {
                    key: {"share": value["share"], "interval": value["interval"]} for key, value in named.items()
                }
                scores["labels"][label] = {"rows": len(places), **values}
    return scores


def _plain_text(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(str(turn.get("content", "")) for turn in text)
