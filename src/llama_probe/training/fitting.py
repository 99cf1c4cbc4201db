"""Fitting of heads that learn only their classifier, as sparse logistic regression: no epochs, no seed, one minimum."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..data.states import iterate_states
from ..distributed import on_main
from ..evaluation.metrics import check_metric, score_logits
from ..evaluation.prediction import collect
from ..heads.configuration import ProbeConfig
from ..heads.decision import ProbeOutput
from ..heads.probe import ProbeModel
from .loss import ProbeLoss
from .sparse_regression import fit_path, largest_strength, standardize, unstandardize


# Strengths of the penalty to choose from, as shares of the one at which all weights are zero.
PATH = np.geomspace(0.7, 0.01, 16)
_ROWS = 256  # rows whose features are computed at a time
Linear = tuple[torch.Tensor, torch.Tensor]  # weight [outputs, features] and bias [outputs]


class Fitted(NamedTuple):
    """Logits `[rows, num_labels]` of the validation rows, each by a model that has not learned from the row.

    The facts are `l1`, the strength of the penalty, and `nonzero_weights`.
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
    """Fit a head's classifier: minimise the loss plus `l1 * sum |weight|` over standardised features.

    The features of all training rows are in memory at once: 4 bytes a row and feature. In a process group the first rank fits.

    Args:
        probe: a head of a `convex` kind, bound to its LM. Its classifier and `options["l1"]` of its config are written. An
            `l1` in the config is used; otherwise the best of a path.
        train, validation: two `StateDataset`, or two `PromptDataset` with `lm`.
        loss: a loss without focal weights, which are not convex.
        metric: metric of the validation rows that chooses the strength; larger is better.
        lm: the frozen backbone; None if the states are cached.
        folds: row indices of `train` that take turns as validation rows. The classifier is then fitted to all rows.

    Raises:
        ProbeError: the metric is not defined on the validation rows.
    """
    truth = train.labels if folds else validation.labels
    check_metric(metric, truth, probe.config)
    probe.eval()
    pooled = _pooled_vectors(probe, train, lm)
    validated = None if folds else _pooled_vectors(probe, validation, lm)

    def fit() -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor]:
        """Return weight and bias of the classifier, the strength of its penalty, and logits of the validation rows."""
        config, labels = probe.config, torch.as_tensor(train.labels)
        features = torch.empty(len(labels), probe.classifier.in_features)
        for place, part in zip(features.split(_ROWS), _features(probe, pooled), strict=True):
            place.copy_(part)
        kept = features.clone() if folds else None  # standardised in place below
        whole = _Problem(config, features, labels, loss)
        strengths = whole.strengths()
        if not folds:
            models = whole.fit(strengths)
            logits = whole.logits(models, _features(probe, validated))
        else:
            logits = torch.empty(len(strengths), len(labels), config.num_labels)
            for held in tqdm(folds, desc="folds", unit=" folds", leave=False):
                rest = np.setdiff1d(np.arange(len(labels)), held)
                part = _Problem(config, kept[rest], labels[rest], loss)
                logits[:, held] = part.logits(part.fit(strengths), [kept[held]])
        best = int(np.argmax([score_logits(one, truth, config)[metric] for one in logits]))
        if folds:
            models = whole.fit(strengths[: best + 1])
        weight, bias = models[best]
        if whole.one:
            weight, bias = F.pad(weight, (0, 0, 1, 0)), F.pad(bias, (1, 0))
        return weight, bias, strengths[best], logits[best]

    weight, bias, strength, logits = on_main(fit)
    with torch.no_grad():
        probe.classifier.weight.copy_(weight)
        probe.classifier.bias.copy_(bias)
    probe.config = probe.config.replace(options={**probe.config.options, "l1": strength})
    return Fitted(logits, {"l1": strength, "nonzero_weights": int((weight != 0).sum())})


@torch.no_grad()
def _pooled_vectors(probe: ProbeModel, dataset: Dataset, lm: nn.Module | None) -> torch.Tensor:
    """Return what the layer stage gives for each row: `[rows, hidden_size]`."""
    batches = iterate_states(dataset, probe.config, lm, progress=True, layers=probe.layer_indices, divided=True)
    pooled = ((rows, [probe.pool(states.transpose(0, 1), mask)]) for rows, states, mask in batches)
    return collect(len(dataset), pooled)[0]


def _features(probe: ProbeModel, pooled: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the inputs of the classifier's linear map, `[rows, features]`, some rows at a time."""
    for part in pooled.split(_ROWS):
        with torch.no_grad():
            yield probe.classifier.inputs(part.to(probe.device)).float().cpu()


class _Problem:
    """Training rows with their loss. Of two exclusive labels only the second has weights: the first has logit 0."""

    def __init__(self, config: ProbeConfig, features: torch.Tensor, labels: torch.Tensor, loss: ProbeLoss):
        self.config, self.x = config, features
        self.mean, self.scale = standardize(features)  # in place: a copy may not fit into memory
        self.one = config.problem_type == "single_label_classification" and config.num_labels == 2
        self.outputs = 1 if self.one else config.num_labels
        self.loss = lambda z: loss(ProbeOutput(logits=self._widen(z)), labels)

    def _widen(self, z: torch.Tensor) -> torch.Tensor:
        """Map outputs `[rows, outputs]` to logits `[rows, num_labels]`."""
        return F.pad(z, (1, 0)) if self.one else z

    def strengths(self) -> list[float]:
        """Return strengths to choose from, descending; only that of the config if it has one."""
        if "l1" in self.config.options:
            return [float(self.config.options["l1"])]
        top = max(largest_strength(self.x, self.loss, self.outputs), 1e-12)
        return [float(top * share) for share in PATH]

    def fit(self, strengths: Sequence[float]) -> list[Linear]:
        """Fit a linear map of raw features for each strength."""
        models = fit_path(self.x, self.loss, self.outputs, tqdm(strengths, desc="L1 path", leave=False))
        return [unstandardize(*model, self.mean, self.scale) for model in models]

    def logits(self, models: Sequence[Linear], features: Iterable[torch.Tensor]) -> torch.Tensor:
        """Return logits `[models, rows, num_labels]` of rows with these raw features."""
        weights, biases = map(torch.stack, zip(*models, strict=True))
        used = (weights != 0).any(dim=1).any(dim=0)
        weight = weights[:, :, used].flatten(0, 1).T  # [used, models * outputs]
        found = torch.cat([part[:, used] @ weight for part in features])
        found = found.unflatten(1, (len(models), self.outputs)).transpose(0, 1) + biases[:, None]
        return self._widen(found)
