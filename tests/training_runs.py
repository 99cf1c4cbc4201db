"""Short training runs on rows that are written for them."""

import json
from pathlib import Path

import numpy as np
from conftest import make_prompts
from transformers import TrainerCallback

from llama_probe.training.run import TrainingRun


def write(path: Path, rows: int | list[dict], words=("bad", "good")) -> str:
    """Write rows, or so many with these words for their labels, as JSON lines."""
    if isinstance(rows, int):
        rows = [{"text": f"{words[i % len(words)]} no {i}", "label": i % len(words)} for i in range(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def run_of(folder: Path, backbone="never-loaded", rows=40, resume=False, training=None, **sections) -> TrainingRun:
    """A short run on rows of its own; `sections` are those of its recipe."""
    values = {
        "labels": {"names": ["0", "1"], "flagged": ["1"]},
        "train": [write(folder / f"{rows}.jsonl", rows)],
        "head": {"probe_type": "gate"},
        "validation": {"folds": 0},
        "training": {"num_train_epochs": 1, **(training or {})},
        **sections,
    }
    output = folder / "head"
    return TrainingRun(recipe=values, backbone=str(backbone), output=output, resume=resume, overwrite=not resume)


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
