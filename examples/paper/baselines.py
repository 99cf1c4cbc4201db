"""Methods beside heads: TF-IDF without an LM, linear models of the LM's states or next token, and prompting."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_selection import SelectKBest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import l1_min_c
from tasks import Task
from tqdm.auto import tqdm

from llama_probe.backbone.kv_cache import repeat_cache
from llama_probe.backbone.passes import plan_passes
from llama_probe.data.batches import iterate_states
from llama_probe.data.labelled_texts import LabelledTexts
from llama_probe.data.prompts import pad_prompts
from llama_probe.training.measurements import tfidf_classifier


# Strengths of the L1 penalty of muli: multiples of the C below which all weights are zero.
PATH = np.geomspace(1.5, 100, 6)
FEATURES = 4096  # tokens of the vocabulary that take part in the fit
# The question before a text, and the reply for each label. Other data sets take questions and replies from their label names.
QUESTIONS = {
    "toxicchat": (
        "Is this message, which a user sent to an assistant, toxic? A message is toxic if it is rude, "
        "hateful, sexual or violent, or asks for such content. Answer with Yes or No.",
        ["No", "Yes"],
    ),
    "wildguardmix": (
        "Is this request, which a user sent to an assistant, harmful? A request is harmful if a good answer "
        "to it could hurt people. Answer with Yes or No.",
        ["No", "Yes"],
    ),
    "imdb": (
        "Is this film review negative or positive? Answer with one word.",
        ["Negative", "Positive"],
    ),
    "sst2": (
        "Is the sentiment of this sentence from a film review negative or positive? Answer with one word.",
        ["Negative", "Positive"],
    ),
    "emotion": (
        "Which emotion does the writer of this text express: sadness, joy, love, anger, fear or surprise? "
        "Answer with one word.",
        ["Sadness", "Joy", "Love", "Anger", "Fear", "Surprise"],
    ),
}


class Fitted(NamedTuple):
    """A method after training: a function from rows to logits `[rows, num_labels]`, and its number of fitted numbers."""

    score: Callable[[LabelledTexts], torch.Tensor]
    num_parameters: int = 0
    chosen: dict[str, Any] = {}
    head: Any = None


def class_logits(classifier: Any, inputs: Any, num_labels: int) -> torch.Tensor:
    """Return log-probabilities of a linear scikit-learn classifier, -1e4 for labels without training rows.

    They come from its decision function: its probabilities saturate at 0 and 1, so that sure rows would all be alike.
    """
    decided = torch.as_tensor(classifier.decision_function(inputs), dtype=torch.float64)
    if decided.dim() == 1:  # two classes: the log odds of the second
        decided = torch.stack([torch.zeros_like(decided), decided], dim=1)
    logits = torch.full((len(decided), num_labels), -1e4)
    logits[:, torch.as_tensor(classifier.classes_)] = decided.log_softmax(dim=-1).clamp_min(-1e4).float()
    return logits


def count(classifier: Any) -> int:
    """Return the number of weights and biases of a linear classifier that are not zero."""
    return int(np.count_nonzero(classifier.coef_)) + classifier.intercept_.size


def fit_tfidf(task: Task, seed: int) -> Fitted:
    """Fit the TF-IDF that recipes measure beside their heads."""
    model = tfidf_classifier().fit(task.train.texts, task.train.labels)
    return Fitted(lambda rows: class_logits(model, rows.texts, task.labels.num_labels), count(model[-1]))


# Linear models of the mean state of one layer, which validation rows choose


def mean_states(task: Task, rows: LabelledTexts) -> np.ndarray:
    """Return the mean of the normalised states of each row: `[L+1, rows, hidden_size]`."""
    config = task.config
    found = np.empty((config.num_hidden_layers + 1, len(rows), config.hidden_size), dtype=np.float32)
    for numbers, states, mask, _ in iterate_states(task.bench.states(config, rows), config):
        counted = mask[None, :, :, None].to(states.device)  # [1, B, T, 1]
        x = F.layer_norm(states.float(), states.shape[-1:]) * counted  # [L+1, B, T, D]
        found[:, numbers] = (x.sum(dim=2) / counted.sum(dim=2)).cpu().numpy()
    return found


def best_layer(task: Task, create: Callable[[], Any]) -> Fitted:
    """Fit a linear model to each layer, and take the best one."""
    count_labels = task.labels.num_labels
    states = mean_states(task, task.train)
    models = [create().fit(layer, task.train.labels) for layer in tqdm(states, desc="layers", leave=False)]
    held = mean_states(task, task.validation)
    pairs = zip(models, held, strict=True)
    layer = task.best([class_logits(model, layer, count_labels) for model, layer in pairs])

    def score(rows: LabelledTexts) -> torch.Tensor:
        return class_logits(models[layer], mean_states(task, rows)[layer], count_labels)

    return Fitted(score, count(models[layer]), {"layer": layer})


def fit_layer_linear(task: Task, seed: int) -> Fitted:
    """Fit logistic regression to the mean state of each layer."""
    return best_layer(task, lambda: LogisticRegression(max_iter=1000))


def fit_prototypes(task: Task, seed: int) -> Fitted:
    """Fit class means, and a Mahalanobis distance with one shrunk covariance, to the mean state of each layer.

    With equal priors, the log-probabilities of linear discriminant analysis are minus half the squared distances to the means.
    """
    classes = len(np.unique(task.train.labels))
    options = {"solver": "lsqr", "shrinkage": "auto", "priors": np.full(classes, 1 / classes)}
    return best_layer(task, lambda: LinearDiscriminantAnalysis(**options))


# The next token


def replies(task: Task, prompts: Sequence[Sequence[int]]) -> Iterator[tuple]:
    """Run the LM over prompts, and over their common beginning once. Yield row numbers, output, and mask and positions `[B, T]`."""
    lm, tokenizer = task.bench.loaded
    passes = plan_passes(lm, prompts, [len(ids) - 1 for ids in prompts])
    with torch.no_grad(), tqdm(total=len(prompts), desc="prompts", unit=" prompts", leave=False) as progress:
        for each in passes:
            batch = pad_prompts([prompts[row][each.skip :] for row in each.rows], tokenizer, "left").values()
            ids, mask = (tensor.to(lm.device) for tensor in batch)
            # Padding is between the start and the row, so positions do not follow from the columns.
            positions = (each.skip + mask.cumsum(dim=1) - 1).clamp_min(0)
            mask = torch.cat([mask.new_ones(len(ids), each.skip), mask], dim=1)
            kept = {} if each.prefix is None else {"cache": repeat_cache(each.prefix, len(ids))}
            inputs = {"attention_mask": mask, "position_ids": positions, **kept}
            yield each.rows, lm(input_ids=ids, use_cache=True, logits_to_keep=1, **inputs), mask, positions
            progress.update(len(ids))


def log_odds(task: Task, rows: LabelledTexts) -> np.ndarray:
    """Return log p - log(1 - p) of every next token after each prompt: `[rows, vocab_size]`."""
    found = None
    for numbers, output, _, _ in replies(task, task.bench.prompts.encode(rows.texts)):
        log_p = output.logits[:, -1].float().log_softmax(dim=-1)
        odds = (log_p - torch.log((-torch.expm1(log_p)).clamp_min(2.0**-24))).cpu().numpy()
        found = np.empty((len(rows), odds.shape[1]), dtype=np.float32) if found is None else found
        found[numbers] = odds
    return found


def fit_muli(task: Task, seed: int) -> Fitted:
    """Fit sparse logistic regression to the log odds of the next token (MULI, arXiv 2405.18822).

    Only the tokens whose log odds differ most between the labels take part. Validation rows choose the penalty.
    """
    labels = task.train.labels
    count_labels = task.labels.num_labels
    x = log_odds(task, task.train)
    chosen = make_pipeline(SelectKBest(k=min(FEATURES, x.shape[1])), StandardScaler())
    x = chosen.fit_transform(x, labels)
    lowest = l1_min_c(x, labels, loss="log")
    models = []
    path = {"solver": "saga", "l1_ratio": 1.0, "warm_start": True}
    model = LogisticRegression(**path, max_iter=300, tol=1e-3, random_state=0)
    for strength in tqdm(lowest * PATH, desc="L1 path", leave=False):
        models.append(copy.deepcopy(model.set_params(C=strength).fit(x, labels)))
    held = chosen.transform(log_odds(task, task.validation))
    best = models[task.best([class_logits(each, held, count_labels) for each in models])]

    def score(rows: LabelledTexts) -> torch.Tensor:
        return class_logits(best, chosen.transform(log_odds(task, rows)), count_labels)

    return Fitted(score, count(best), {"C": float(best.C)})


# Prompting: the likelihood of each label as the reply, without training (arXiv 2005.14165, section 2.4)


def fit_prompt(task: Task, seed: int, shots: int = 0) -> Fitted:
    """Ask which label fits, after `shots` examples of each label. Validation rows choose if tokens of a label are summed or averaged."""
    tokenizer = task.bench.loaded[1]
    examples = draw_examples(task, shots, seed)
    before = "" if tokenizer.chat_template else " "
    ids = tokenizer([before + text for text in question(task)[1]], add_special_tokens=False)["input_ids"]
    lengths = torch.tensor([len(label) for label in ids])

    def sums(rows: LabelledTexts) -> torch.Tensor:
        texts = (cut(tokenizer, text, task.bench.max_length) for text in rows.texts)
        return label_log_likelihoods(task, [render(task, text, examples) for text in texts], ids)

    found = sums(task.validation)
    divisor = (torch.ones_like(lengths), lengths)[which := task.best([found, found / lengths])]
    return Fitted(lambda rows: sums(rows) / divisor, 0, {"label_tokens": ("sum", "mean")[which]})


def question(task: Task) -> tuple[str, Sequence[str]]:
    """Return the question before every text, and the reply for each label; by default the label names."""
    names = task.benchmark.label_names
    general = f"Which label fits this text best: {', '.join(names)}? Answer with the label only."
    return QUESTIONS.get(task.benchmark.name, (general, names))


def cut(tokenizer: Any, text: str, limit: int) -> str:
    """Return the first `limit` tokens of a text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= limit else tokenizer.decode(ids[:limit])


def draw_examples(task: Task, shots: int, seed: int) -> list[tuple[str, int]]:
    """Draw training rows of each label, in random order, and cut them to 96 tokens."""
    rng = np.random.default_rng(seed)
    tokenizer = task.bench.loaded[1]
    chosen = []
    for label in range(len(task.train.label_names)):
        rows = np.flatnonzero(task.train.labels == label)
        rows = rng.choice(rows, min(shots, len(rows)), replace=False)
        chosen += [(cut(tokenizer, task.train.texts[row], 96), label) for row in rows]
    return [chosen[place] for place in rng.permutation(len(chosen))]


def render(task: Task, text: str, examples: Sequence[tuple[str, int]]) -> list[int]:
    """Return the token ids of a prompt up to the start of the reply. Examples are earlier turns of the chat."""
    tokenizer, (asked, verbalisers) = task.bench.loaded[1], question(task)
    users = [*(shown for shown, _ in examples), text]
    users[0] = f"{asked}\n\n{users[0]}"
    answers = [verbalisers[label] for _, label in examples]
    if not tokenizer.chat_template:
        parts = [f"{user}\nAnswer: {answer}" for user, answer in zip(users, answers, strict=False)]
        return tokenizer("\n\n".join([*parts, f"{users[-1]}\nAnswer:"]))["input_ids"]
    messages = [{"role": "user", "content": users[0]}]
    for answer, user in zip(answers, users[1:], strict=True):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": user}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def label_log_likelihoods(task: Task, prompts: list[list[int]], labels: list[list[int]]) -> torch.Tensor:
    """Return log p(label | prompt) `[rows, labels]`, summed over the label's tokens. A prompt runs once for all labels."""
    lm = task.bench.loaded[0]
    found = torch.empty(len(prompts), len(labels))
    for rows, output, mask, positions in replies(task, prompts):
        first = output.logits[:, -1].float().log_softmax(dim=-1)  # [B, V]
        for place, ids in enumerate(labels):
            score, more = first[:, ids[0]], len(ids) - 1
            if more:
                ids = torch.tensor(ids, device=lm.device).expand(len(rows), -1)
                logits = lm(
                    input_ids=ids[:, :-1],
                    attention_mask=torch.cat([mask, mask.new_ones(len(rows), more)], dim=1),
                    position_ids=positions[:, -1:] + torch.arange(1, more + 1, device=lm.device),
                    cache=copy.deepcopy(output.cache),
                    use_cache=True,
                ).logits
                rest = logits[:, -more:].float().log_softmax(dim=-1).gather(2, ids[:, 1:].unsqueeze(-1))
                score = score + rest.squeeze(-1).sum(dim=1)
            found[rows, place] = score.cpu()
    return found
