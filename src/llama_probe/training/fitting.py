"""Heads of which only the classifier is learned, fitted as sparse logistic regression: no epochs, no seed, one minimum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..data.states import iterate_states
from ..distributed import merge_rows, on_main
from ..errors import ProbeError
from ..evaluation.metrics import check_metric, score_logits
from ..heads.configuration import ProbeConfig
from ..heads.decision import ProbeOutput
from ..heads.probe import ProbeModel
from .sparse_regression import SparseModel, fit_path, largest_strength, standardize
from .trainer import ProbeLoss


# The path of strengths, as shares of the one at which all weights are zero.
PATH = np.geomspace(0.7, 0.01, 16)
_ROWS = 256  # whose features are at hand at a time, where not all have to be


@dataclass
class Fitted:
    """What a fit says of itself.

    Attributes:
        logits (`torch.FloatTensor` of shape `[rows, num_labels]`): of the validation rows, each by a model that did not learn
            from it.
        facts: `l1`, the strength, and `nonzero_weights`.
    """

    logits: torch.Tensor
    facts: dict[str, Any]


def fit_classifier(
    probe: ProbeModel,
    train: Dataset,
    validation: Dataset,
    loss: ProbeLoss,
    metric: str,
    lm: nn.Module | None = None,
    folds: Sequence[np.ndarray] = (),
) -> Fitted:
    """Fits a head's classifier: the loss plus `l1 * sum |weight|` over standardised features is smallest.

    The features of the training rows are in memory at once: 4 bytes a row and feature. In a process group all ranks run over
    the rows, the first one fits, and all get the result.

    Args:
        probe: a head whose kind is `convex`, with whatever it needs of the LM (`bind`). Its classifier, and in its config
            `options["l1"]`, are written. An `l1` that is there already is used; else the best of a path is.
        train, validation: `StateDataset`s, or with `lm` `PromptDataset`s.
        loss: see `ProbeLoss`; without focal weights, which are not convex.
        metric: of the validation rows, to choose the strength by; larger is better.
        lm: the frozen backbone; `None` where the states are cached.
        folds: rows of `train` that take turns as validation rows; the classifier is then fitted to all rows.

    Raises:
        ProbeError: the loss is not convex, or the metric is not defined on the validation rows.
    """
    check_convex(loss.focal_gamma)
    probe.eval()
    pooled = pooled_vectors(probe, train, lm)
    validated = None if folds else pooled_vectors(probe, validation, lm)
    labels = {"train": train.labels, "validation": train.labels if folds else validation.labels}
    weight, bias, strength, logits = on_main(lambda: _fit(probe, pooled, validated, labels, loss, metric, folds))
    with torch.no_grad():
        probe.classifier.weight.copy_(weight)
        probe.classifier.bias.copy_(bias)
    probe.config = probe.config.replace(options={**probe.config.options, "l1": strength})
    return Fitted(logits, {"l1": strength, "nonzero_weights": int((weight != 0).sum())})


def _fit(
    probe: ProbeModel,
    pooled: torch.Tensor,
    validated: torch.Tensor | None,
    truth: dict[str, np.ndarray],
    loss: ProbeLoss,
    metric: str,
    folds: Sequence[np.ndarray],
) -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor]:
    """Weight and bias of the classifier, the strength of its penalty, and logits of the validation rows."""
    labels = torch.as_tensor(truth["train"])
    features = torch.empty(len(labels), probe.classifier.in_features)
    for place, part in zip(features.split(_ROWS), _features(probe, pooled), strict=True):
        place.copy_(part)
    whole = _Problem(probe.config, features, labels, loss)
    strengths = whole.strengths
    if folds:
        kept = features.clone()
        held_out = torch.empty(len(strengths), len(labels), probe.config.num_labels)
        for held in tqdm(folds, desc="folds", unit=" folds", leave=False):
            rest = np.setdiff1d(np.arange(len(labels)), held)
            part = _Problem(probe.config, kept[rest], labels[rest], loss)
            held_out[:, held] = part.logits(part.fit(strengths), [kept[held]])
        best = _best(held_out, truth["validation"], probe.config, metric)
        models = whole.fit(strengths[: best + 1])
    else:
        models = whole.fit(strengths)
        held_out = whole.logits(models, _features(probe, validated))
        best = _best(held_out, truth["validation"], probe.config, metric)
    return *whole.classifier(models[best]), strengths[best], held_out[best]


def check_convex(focal_gamma: float) -> None:
    """Raises `ProbeError` for a loss that has more than one minimum."""
    if focal_gamma:
        raise ProbeError(
            f"focal_gamma={focal_gamma}: heads of this kind are fitted as a convex problem, which focal weights are not; "
            "leave it 0"
        )


def pooled_vectors(probe: ProbeModel, dataset: Dataset, lm: nn.Module | None = None) -> torch.Tensor:
    """What the classifier of a head gets for each row, in their order: `[rows, hidden_size]`, fp32.

    In a process group the ranks run over a share of the rows each, and all get the whole.

    Args:
        dataset, lm: see `iterate_states`.
    """
    found, read = torch.empty(len(dataset), probe.config.hidden_size), []
    states_of = iterate_states(dataset, probe.config, lm, progress=True, layers=probe.layer_indices, divided=True)
    for rows, states, mask in states_of:
        with torch.no_grad():
            found[rows] = probe.pool(states.transpose(0, 1), mask).cpu()
        read += rows
    return merge_rows(read, found)


def _features(probe: ProbeModel, pooled: torch.Tensor) -> Iterator[torch.Tensor]:
    """What the linear map of the classifier gets, some rows at a time: `[rows, features]`."""
    for part in pooled.split(_ROWS):
        with torch.no_grad():
            yield probe.classifier.inputs(part.to(probe.device)).float().cpu()


class _Problem:
    """Training rows with their loss. Of two exclusive labels only the second has weights: the first has logit 0."""

    def __init__(self, config: ProbeConfig, features: torch.Tensor, labels: torch.Tensor, loss: ProbeLoss):
        self.config, self.x = config, features
        self.mean, self.scale = standardize(features)  # in place: there may be no memory for a copy
        self.one = config.problem_type == "single_label_classification" and config.num_labels == 2
        self.outputs = 1 if self.one else config.num_labels
        self.loss = lambda z: loss(ProbeOutput(logits=self._widen(z)), labels)

    def _widen(self, z: torch.Tensor) -> torch.Tensor:
        """Outputs `[rows, outputs]` to logits `[rows, num_labels]`."""
        return F.pad(z, (1, 0)) if self.one else z

    @property
    def strengths(self) -> list[float]:
        """To choose from, descending; the one that the user gave, where there is one."""
        if "l1" in self.config.options:
            return [float(self.config.options["l1"])]
        top = max(largest_strength(self.x, self.loss, self.outputs), 1e-12)
        return [float(top * share) for share in PATH]

    def fit(self, strengths: Sequence[float]) -> list[SparseModel]:
        """A model a strength."""
        return fit_path(self.x, self.loss, self.outputs, tqdm(strengths, desc="L1 path", leave=False))

    def logits(self, models: Sequence[SparseModel], features) -> torch.Tensor:
        """Logits `[models, rows, num_labels]` of rows with these features, as they are."""
        used = torch.stack([(model.weight != 0).any(dim=0) for model in models]).any(dim=0)
        weights, biases = zip(*(model.unstandardized(self.mean, self.scale) for model in models), strict=True)
        weight = torch.stack(weights)[:, :, used].flatten(0, 1).T  # [used, models * outputs]
        found = torch.cat([part[:, used] @ weight for part in features])
        found = found.unflatten(1, (len(models), self.outputs)).transpose(0, 1) + torch.stack(biases)[:, None]
        return self._widen(found)

    def classifier(self, model: SparseModel) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight `[num_labels, features]` and bias `[num_labels]` for features as they are."""
        weight, bias = model.unstandardized(self.mean, self.scale)
        return (F.pad(weight, (0, 0, 1, 0)), F.pad(bias, (1, 0))) if self.one else (weight, bias)


def _best(logits: torch.Tensor, labels: np.ndarray, config: ProbeConfig, metric: str) -> int:
    """Of models `[models, rows, num_labels]` the first that scores best."""
    if len(logits) == 1:
        return 0
    check_metric(metric, labels, config)
    values = [score_logits(one, labels, config)[metric] for one in logits]
    return int(np.argmax(values))
