"""The methods that are compared, by name, and the training of heads."""

from __future__ import annotations

import shutil
from functools import partial
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from baselines import Fitted, fit_layer_linear, fit_muli, fit_prompt, fit_prototypes, fit_tfidf
from tasks import Task
from transformers import PrinterCallback

from llama_probe import ProbeTrainer, ProbeTrainingArguments
from llama_probe.data.labelled_texts import LabelledTexts
from llama_probe.evaluation.prediction import predict_logits


_SMALL = {"num_maxima": 1, "num_members": 7}
_HALF = {"num_maxima": 2, "num_members": 7}
# Fields of `ProbeConfig`, and `learning_rate` if it is not that of the head type.
HEADS: dict[str, dict[str, Any]] = {
    "last-token": {"probe_type": "last"},
    **{name: {"probe_type": name} for name in ("pooling", "gate", "mha")},
    "multimax-small": {"probe_type": "multimax", "options": _SMALL},
    "multimax-half": {"probe_type": "multimax", "options": _HALF, "every": 2, "learning_rate": 5e-3},
    "multimax": {"probe_type": "multimax"},
}
KINDS = [name for name, head in HEADS.items() if head == {"probe_type": name}]
BASELINES = {
    "tfidf": fit_tfidf,
    "zero-shot": fit_prompt,
    "few-shot": fit_prompt,
    "prototypes": fit_prototypes,
    "layer-linear": fit_layer_linear,
    "muli": fit_muli,
}
METHODS = ("tfidf", "zero-shot", "few-shot", "prototypes", "layer-linear", "last-token", "muli", *list(HEADS)[1:])
SEEDED = ("few-shot", *HEADS)  # other methods run once


def fit(task: Task, method: str, seed: int, epochs: int, shots: int) -> Fitted:
    """Train a method on a data set. Validation rows choose its epoch, layer or penalty."""
    if method in HEADS:
        return fit_head(task, HEADS[method], seed, task.train, task.validation, num_train_epochs=epochs)
    return (partial(fit_prompt, shots=shots) if method == "few-shot" else BASELINES[method])(task, seed)


def fit_head(
    task: Task,
    head: dict[str, Any],
    seed: int,
    train: LabelledTexts,
    validation: LabelledTexts | None = None,
    **settings,
) -> Fitted:
    """Train a head with `ProbeTrainer`. The hidden states are computed once for all heads of a data set.

    Args:
        head: fields of `ProbeConfig`. Also `learning_rate`, and `every`: read the states 0, `every`, 2 `every`, ...
        validation: rows that choose the epoch; None: the last one.
        settings: further `ProbeTrainingArguments`.
    """
    (lm, tokenizer), fields = task.bench.loaded, dict(head)
    if every := fields.pop("every", None):
        fields["layers"] = list(range(0, task.config.num_hidden_layers + 1, every))
    settings |= {"learning_rate": fields.pop("learning_rate", None), "metric_for_best_model": task.metric}
    settings |= {"seed": seed, "cache_dir": str(task.bench.cache), "disable_tqdm": True}
    scratch = mkdtemp(dir=task.bench.cache)
    labels = {"id2label": task.labels.id2label, "flagged": task.train.flagged}
    trainer = ProbeTrainer(
        backbone=lm,
        processing_class=tokenizer,
        probe_config={**labels, "max_length": task.bench.max_length, **fields},
        args=ProbeTrainingArguments(scratch, **settings),
        train_dataset=task.table(train),
        eval_dataset=None if validation is None else task.table(validation),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    probe = trainer.heads["head"].eval()
    shutil.rmtree(scratch)
    chosen = {"epochs": trainer.state.epoch, "best": trainer.state.best_metric}

    def score(rows: LabelledTexts) -> torch.Tensor:
        return predict_logits(probe, task.bench.states(probe.config, rows))

    return Fitted(score, probe.num_parameters(), chosen, probe)


def draw_rows(rows: LabelledTexts, size: int, seed: int) -> LabelledTexts:
    """Draw rows, one of each label if `size` allows it. A larger draw contains the rows of a smaller draw."""
    order = np.random.default_rng(seed).permutation(len(rows))
    first = [int(np.argmax(rows.labels[order] == label)) for label in np.unique(rows.labels)]
    order = np.concatenate([order[first], np.delete(order, first)])
    return rows.select(np.sort(order[:size]).tolist())


def draw_settings(head_type: str, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draw fields of `ProbeConfig` and training arguments in the ranges of the paper."""
    rng = np.random.default_rng([number, *head_type.encode()])
    head = {
        "probe_type": head_type,
        "pool": str(rng.choice(["mean", "max"])),
        "dropout": rng.uniform(0, 0.4),
        "layer_dropout": rng.uniform(0, 0.3),
        "learning_rate": float(np.exp(rng.uniform(np.log(1e-5), np.log(3e-3)))),
    }
    settings = {
        "per_device_train_batch_size": int(rng.choice([8, 16, 32, 64])),
        "weight_decay": rng.uniform(0, 0.05),
        "label_smoothing_factor": rng.uniform(0, 0.1),
    }
    return head, settings
