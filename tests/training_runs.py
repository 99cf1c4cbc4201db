"""Short training runs on rows that are written for them."""

import gzip
import json
from pathlib import Path

import numpy as np
from conftest import HIDDEN, LAYERS, make_prompts
from transformers import TrainerCallback, set_seed

from llama_probe import ProbeConfig, ProbeModel, ProbeTrainer, ProbeTrainingArguments
from llama_probe.training.recipe import Recipe
from llama_probe.training.run import train_recipe


def write(path: Path, rows: int | list[dict], words=("bad", "good")) -> str:
    """Write rows, or so many with these words for their labels, as JSON lines."""
    if isinstance(rows, int):
        rows = [{"text": f"{words[i % len(words)]} no {i}", "label": i % len(words)} for i in range(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(map(json.dumps, rows)).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


def train(folder: Path, backbone="never-loaded", rows=40, resume=False, output="head", **sections) -> dict:
    """Train a head in short on rows of its own, and return its results; `sections` are those of its recipe."""
    recipe = recipe_of(folder, rows, **sections)
    return train_recipe(recipe, str(backbone), folder / output, resume=resume, overwrite=not resume)


def recipe_of(folder: Path, rows=40, training=None, **sections) -> Recipe:
    values = {
        "labels": {"names": ["0", "1"], "flagged": ["1"]},
        "train": [write(folder / f"{rows}.jsonl", rows)],
        "head": {"probe_type": "gate"},
        "validation": {"folds": 0},
        "training": {"num_train_epochs": 1, **(training or {})},
        **sections,
    }
    return Recipe.load(values)


def head_of(lm=None, seed: int = 3, **fields) -> ProbeModel:
    """A fresh head of the tiny model's sizes."""
    set_seed(seed)
    sizes = {"downcast": 4, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
    return ProbeModel(ProbeConfig(**{"probe_type": "gate", **sizes, **fields}), backbone=lm)


def trainer_of(folder: Path, train_rows, validation_rows, **changes) -> ProbeTrainer:
    """The trainer of a short run; `changes` are of its arguments, or parameters of its own."""
    arguments = {"num_train_epochs": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    for name in set(changes) & set(ProbeTrainingArguments.__dataclass_fields__):
        arguments[name] = changes.pop(name)
    args = ProbeTrainingArguments(str(folder), disable_tqdm=True, use_cpu=True, **arguments)
    return ProbeTrainer(args=args, train_dataset=train_rows, eval_dataset=validation_rows, **changes)


def token_rows(count: int, seed: int = 0) -> tuple[list[list[int]], np.ndarray]:
    """Prompts whose label is whether token 11 occurs: any head can learn it."""
    prompts = []
    for row in range(count):
        ids = make_prompts(1, 4 + row % 5, seed=1000 * seed + row)[0].tolist()
        ids = [12 if token == 11 else token for token in ids]
        if row % 2:
            ids[row % len(ids)] = 11
        prompts.append(ids)
    return prompts, np.arange(count) % 2


class Kill(TrainerCallback):
    """Ends a training after its second epoch."""

    def on_save(self, args, state, control, **kwargs):
        if state.epoch == 2:
            raise KeyboardInterrupt
