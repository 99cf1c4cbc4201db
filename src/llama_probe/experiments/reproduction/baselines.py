"""Methods beside heads: TF-IDF without an LM, latent prototypes, and prompting of the same LM.

Each gives logits `[rows, num_labels]`, which are calibrated and judged like a head's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline, make_union
from torch.utils.data import Dataset

from ...data.states import iterate_states
from ...data.texts import LabelledTexts
from ...errors import ProbeError
from ...evaluation.metrics import score_logits
from ...heads.aggregator import masked_mean
from ...heads.configuration import ProbeConfig
from .prompting import Example, LabelPrompt, draw_examples, instruction, label_log_likelihoods
from .workbench import Task


class Scored(NamedTuple):
    """Logits `[rows, num_labels]` of a baseline, its choices by validation rows, and its number of fitted numbers."""

    validation: torch.Tensor
    test: torch.Tensor
    chosen: dict[str, Any]
    num_parameters: int = 0


def fit_tfidf(train: LabelledTexts) -> Pipeline:
    """Fit logistic regression on TF-IDF of words (1-2-grams) and of characters within words (2-5-grams).

    The character range, sublinear counts, balanced classes and C were chosen by validation rows of ToxicChat and Emotion.
    """
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=2)
    classifier = LogisticRegression(C=10.0, class_weight="balanced", max_iter=2000)
    return make_pipeline(make_union(words, characters), classifier).fit(train.texts, train.labels)


def class_logits(classifier: Any, inputs: Any, num_labels: int) -> torch.Tensor:
    """Return log-probabilities `[rows, num_labels]` of a linear scikit-learn classifier, -1e4 for labels without training rows.

    They come from its decision function: its probabilities saturate at 0 and 1, so that sure rows would all be alike.
    """
    decided = torch.as_tensor(classifier.decision_function(inputs), dtype=torch.float64)
    if decided.dim() == 1:  # two classes: the log odds of the second
        decided = torch.stack([torch.zeros_like(decided), decided], dim=1)
    logits = torch.full((len(decided), num_labels), -1e4)
    logits[:, torch.as_tensor(classifier.classes_)] = decided.log_softmax(dim=-1).clamp_min(-1e4).float()
    return logits


def mean_states(dataset: Dataset, config: ProbeConfig) -> np.ndarray:
    """Return the mean of the normalised cached states of each row: `[rows, L+1, hidden_size]`, fp32."""
    found = np.empty((len(dataset), config.num_hidden_layers + 1, config.hidden_size), dtype=np.float32)
    for rows, states, mask in iterate_states(dataset, config, progress=True):
        x = F.layer_norm(states.float(), states.shape[-1:])  # [L+1, B, T, D]
        found[rows] = masked_mean(x, mask.to(x.device)).transpose(0, 1).cpu().numpy()
    return found


def fit_prototypes(states: np.ndarray, labels: np.ndarray) -> LinearDiscriminantAnalysis:
    """Fit class means, and a Mahalanobis distance with one covariance for all classes, to states `[rows, hidden_size]`.

    The covariance is shrunk (Ledoit and Wolf 2004). With equal priors, the log-probabilities of linear discriminant analysis
    are minus half the squared distances to the means, normalised.
    """
    classes = len(np.unique(labels))
    priors = np.full(classes, 1 / classes)
    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=priors).fit(states, labels)


def score_tfidf(task: Task, test: Sequence[str]) -> Scored:
    """Fit TF-IDF on the training rows of a data set, and score its validation rows and any test texts."""
    model, count = fit_tfidf(task.parts["train"]), task.labels.num_labels
    logits = [class_logits(model, texts, count) for texts in (task.parts["validation"].texts, test)]
    return Scored(*logits, {"features": model[-1].n_features_in_}, model[-1].coef_.size + model[-1].intercept_.size)


def _prototypes(task: Task, seed: int | None, shots: int) -> Scored:
    config, labels, count = task.config, task.parts["train"].labels, task.labels.num_labels
    states = {part: mean_states(task.dataset(part), config) for part in task.parts}
    scored = []
    for layer in range(config.num_hidden_layers + 1):
        model = fit_prototypes(states["train"][:, layer], labels)
        logits = [class_logits(model, states[part][:, layer], count) for part in ("validation", "test")]
        scored.append(Scored(*logits, {"layer": layer}, model.coef_.size + model.intercept_.size))
    return _best(task, scored)


def _prompting(task: Task, examples: list[Example]) -> Scored:
    bench = task.bench
    prompt = LabelPrompt(bench.tokenizer, *instruction(task.benchmark), examples, bench.max_length)
    ids, lengths = prompt.label_ids, torch.tensor([len(ids) for ids in prompt.label_ids])
    sums = [
        label_log_likelihoods(bench.lm, bench.tokenizer, prompt.encode(task.parts[part].texts), ids)
        for part in ("validation", "test")
    ]
    means = [values / lengths for values in sums]
    return _best(task, [Scored(*sums, {"label_tokens": "sum"}), Scored(*means, {"label_tokens": "mean"})])


def _few_shot(task: Task, seed: int | None, shots: int) -> Scored:
    return _prompting(task, draw_examples(task.parts["train"], shots, seed, task.bench.tokenizer))


def _best(task: Task, scored: Sequence[Scored]) -> Scored:
    labels = task.parts["validation"].labels
    values = [score_logits(each.validation, labels, task.labels)[task.metric] for each in scored]
    if None in values:
        raise ProbeError(f"{task.metric} is not defined on the validation rows of {task.source}: use more rows")
    return scored[values.index(max(values))]


# Functions of the task, a seed and the number of few-shot examples a label. Those that are not `SEEDED` run once.
SCORERS: dict[str, Callable[[Task, int | None, int], Scored]] = {
    "tfidf": lambda task, seed, shots: score_tfidf(task, task.parts["test"].texts),
    "zero-shot": lambda task, seed, shots: _prompting(task, []),
    "few-shot": _few_shot,
    "prototypes": _prototypes,
}
SEEDED = ("few-shot",)
