"""Methods that heads are compared with: TF-IDF without an LM, latent prototypes, and prompting of the same LM.

Each gives logits `[rows, num_labels]`, which are judged as a head's are: temperature and threshold by validation rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline, make_union
from torch import nn
from torch.utils.data import Dataset

from ...data.states import iterate_states
from ...data.texts import LabelledTexts
from ...errors import ProbeError
from ...evaluation.metrics import score_logits
from ...heads.aggregator import masked_mean
from ...heads.configuration import ProbeConfig
from .prompting import Instruction, LabelPrompt, draw_examples, label_log_likelihoods


if TYPE_CHECKING:
    from .workbench import Task


@dataclass
class Scored:
    """What a baseline says of a data set.

    Attributes:
        validation, test: logits `[rows, num_labels]`.
        chosen: what was chosen by the validation rows.
        num_parameters: fitted numbers; 0 for prompting.
    """

    validation: torch.Tensor
    test: torch.Tensor
    chosen: dict[str, Any] = field(default_factory=dict)
    num_parameters: int = 0


@dataclass(frozen=True)
class Baseline:
    """A method that is no head.

    Attributes:
        run: takes the task, a seed and a number of few-shot examples a label.
        seeded: whether it depends on the seed; the others run once.
        shots: whether it depends on the number of examples.
    """

    run: Callable[[Task, int, int], Scored]
    seeded: bool = False
    shots: bool = False


def fit_tfidf(train: LabelledTexts) -> Pipeline:
    """Logistic regression on TF-IDF of words (1-2-grams) and of characters within words (2-5-grams).

    The character range, the sublinear counts, the balanced classes and C were found on validation rows of ToxicChat and
    Emotion.

    Args:
        train: rows with texts, and one label each.

    Raises:
        ProbeError: the rows are chats, or have no single label each.
    """
    if train.problem_type != "single_label_classification":
        raise ProbeError(f"tfidf is for single-label data, not for {train.problem_type}")
    if not all(isinstance(text, str) for text in train.texts):
        raise ProbeError("tfidf takes texts, not chat messages")
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=2)
    classifier = LogisticRegression(C=10.0, class_weight="balanced", max_iter=2000)
    return make_pipeline(make_union(words, characters), classifier).fit(train.texts, train.labels)


def class_logits(classifier: Any, inputs: Any, num_labels: int) -> torch.Tensor:
    """Log-probabilities `[rows, num_labels]` of a linear scikit-learn classifier; labels that it never saw are as low as can be.

    They come from its decision function: its own probabilities are 0 or 1 where it is sure, and such rows would be all alike.
    """
    decided = torch.as_tensor(classifier.decision_function(inputs), dtype=torch.float64)
    if decided.dim() == 1:  # of two classes: the log odds of the second
        decided = torch.stack([torch.zeros_like(decided), decided], dim=1)
    logits = torch.full((len(decided), num_labels), -1e4)
    logits[:, torch.as_tensor(classifier.classes_)] = decided.log_softmax(dim=-1).clamp_min(-1e4).float()
    return logits


def mean_states(dataset: Dataset, config: ProbeConfig, lm: nn.Module | None = None) -> np.ndarray:
    """The mean of the normalised states of each row's tokens: `[rows, L+1, hidden_size]`, fp32.

    Args:
        dataset, lm: see `iterate_states`.
        config: of a head with the token scope to read.
    """
    found = np.empty((len(dataset), config.num_hidden_layers + 1, config.hidden_size), dtype=np.float32)
    for rows, states, mask in iterate_states(dataset, config, lm, progress=True):
        x = F.layer_norm(states.float(), states.shape[-1:])  # [L+1, B, T, D]
        found[rows] = masked_mean(x, mask.to(x.device)).transpose(0, 1).cpu().numpy()
    return found


def fit_prototypes(states: np.ndarray, labels: np.ndarray) -> LinearDiscriminantAnalysis:
    """Class means, and a Mahalanobis distance with one covariance for all classes.

    The covariance is shrunk (Ledoit and Wolf 2004). With equal priors, the log-probabilities of linear discriminant analysis
    are minus half the squared distances to the means, normalised, in closed form; that is what is fitted.

    Args:
        states (`[rows, hidden_size]`): of one layer. labels (`[rows]`): class indices.
    """
    classes = len(np.unique(labels))
    priors = np.full(classes, 1 / classes)
    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=priors).fit(states, labels)


def _tfidf(task: Task, seed: int, shots: int) -> Scored:
    model, count = fit_tfidf(task.parts["train"]), task.labels.num_labels
    logits = [class_logits(model, task.parts[part].texts, count) for part in ("validation", "test")]
    return Scored(*logits, {"features": model[-1].n_features_in_}, model[-1].coef_.size + model[-1].intercept_.size)


def _prototypes(task: Task, seed: int, shots: int) -> Scored:
    config, labels, count = task.config, task.parts["train"].labels, task.labels.num_labels
    states = {part: mean_states(task.dataset(part), config, task.bench.lm_in_the_loop) for part in task.parts}
    best: tuple[float, int, LinearDiscriminantAnalysis] | None = None
    for layer in range(config.num_hidden_layers + 1):
        model = fit_prototypes(states["train"][:, layer], labels)
        value = _validation_score(task, class_logits(model, states["validation"][:, layer], count))
        if best is None or value > best[0]:
            best = (value, layer, model)
    _, layer, model = best
    logits = [class_logits(model, states[part][:, layer], count) for part in ("validation", "test")]
    return Scored(*logits, {"layer": layer}, model.coef_.size + model.intercept_.size)


def _prompting(task: Task, examples: list) -> Scored:
    bench = task.bench
    instruction = Instruction.derive(task.parts["train"].label_names, task.benchmark)
    prompt = LabelPrompt(bench.tokenizer, instruction, examples, bench.max_length)
    ids, lengths = prompt.label_ids, torch.tensor([len(ids) for ids in prompt.label_ids])
    summed = {
        part: label_log_likelihoods(bench.lm, bench.tokenizer, prompt.encode(task.parts[part].texts), ids)
        for part in ("validation", "test")
    }
    scores = {"sum": summed, "mean": {part: values / lengths for part, values in summed.items()}}
    best = max(scores, key=lambda name: _validation_score(task, scores[name]["validation"]))
    return Scored(scores[best]["validation"], scores[best]["test"], {"label_tokens": best})


def _zero_shot(task: Task, seed: int, shots: int) -> Scored:
    return _prompting(task, [])


def _few_shot(task: Task, seed: int, shots: int) -> Scored:
    return _prompting(task, draw_examples(task.parts["train"], shots, seed, task.bench.tokenizer))


def _validation_score(task: Task, logits: torch.Tensor) -> float:
    value = score_logits(logits, task.parts["validation"].labels, task.labels)[task.metric]
    if value is None:
        raise ProbeError(f"{task.metric} is not defined on the validation rows of {task.source}: use more rows")
    return value


BASELINES: dict[str, Baseline] = {
    "tfidf": Baseline(_tfidf),
    "zero-shot": Baseline(_zero_shot),
    "few-shot": Baseline(_few_shot, seeded=True, shots=True),
    "prototypes": Baseline(_prototypes),
}
