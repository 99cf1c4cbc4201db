"""Short training runs on labelled rows that are written for them."""

import json
from pathlib import Path

from llama_probe.data.sources import DataSources
from llama_probe.training.recipe import Recipe
from llama_probe.training.run import TrainingRun


def write(path: Path, count: int, words=("bad", "good")) -> str:
    lines = [json.dumps({"text": f"{words[i % 2]} no {i}", "label": i % 2}) for i in range(count)]
    path.write_text("\n".join(lines))
    return str(path)


def run_of(
    folder: Path, backbone="never-loaded", epochs=1, rows=40, head=None, resume=False, seeds=(0,), **changes
) -> TrainingRun:
    """A short run on rows of its own; `changes` go to the recipe or the data."""
    recipe = {name: changes.pop(name) for name in list(changes) if name in Recipe.__dataclass_fields__}
    return TrainingRun(
        backbone=str(backbone),
        data=DataSources(
            **{"train": write(folder / f"{rows}.jsonl", rows), "label_names": ["0", "1"], "flagged": ["1"], **changes}
        ),
        output=folder / "head",
        head=head or {"probe_type": "gate"},
        recipe=Recipe(num_train_epochs=epochs, **recipe),
        seeds=list(seeds),
        resume=resume,
        overwrite=not resume,
    )
