"""Short training runs on labelled rows that are written for them."""

import json
from pathlib import Path

from llama_probe.training.run import TrainingRun


def write(path: Path, count: int, words=("bad", "good")) -> str:
    lines = [json.dumps({"text": f"{words[i % 2]} no {i}", "label": i % 2}) for i in range(count)]
    path.write_text("\n".join(lines))
    return str(path)


def run_of(
    folder: Path, backbone="never-loaded", rows=40, resume=False, train=None, training=None, **sections
) -> TrainingRun:
    """A short run on rows of its own; `sections` are those of its recipe."""
    values = {
        "labels": {"names": ["0", "1"], "flagged": ["1"]},
        "train": train or [write(folder / f"{rows}.jsonl", rows)],
        "head": {"probe_type": "gate"},
        "validation": {"folds": 0},
        "training": {"num_train_epochs": 1, **(training or {})},
    }
    recipe = {name: value for name, value in {**values, **sections}.items() if value is not None}
    return TrainingRun(
        recipe=recipe, backbone=str(backbone), output=folder / "head", resume=resume, overwrite=not resume
    )
