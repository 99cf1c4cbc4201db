"""`llama-probe sweep`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..backbone.loading import backbone_target
from ..data.sources import DataSources
from ..distributed import is_main, process_group
from ..hub.card import CardFacts
from ..training.options import HEAD_FOLDER, SWEEP_NAME, RunOptions, SweepOptions
from ..training.recipe import Recipe
from ..training.search_space import SearchSpace
from .console import print_table
from .options import Fields, Result, split_names
from .train import describe_data


_DATA = "train eval test data_dir text_column label_column label_names validation_share max_rows"
_RUN_HELP = {
    "output": "Folder for the table, the plot and the best head.",
    "cache": "Keep hidden states on disk instead of one backbone pass an epoch. Default: only with --cache-dir.",
}


def _whole(epochs: int) -> int:
    """Make `--epochs` a whole number: the type of the option is that of this argument."""
    return epochs


def sweep(
    run: Annotated[
        RunOptions,
        Fields(
            "Runtime",
            only="backbone output max_length prompt_format dtype cache cache_dir",
            help=_RUN_HELP,
            defaults={"cache": None},
        ),
    ],
    data: Annotated[DataSources, Fields("Data", only=_DATA, parse={"label_names": split_names})],
    space: Annotated[SearchSpace, Fields("Search")],
    search: Annotated[SweepOptions, Fields("Search")],
    recipe: Annotated[
        Recipe,
        Fields(
            "Search",
            only="num_train_epochs patience metric",
            help={"num_train_epochs": "Maximum number of epochs."},
            defaults={"num_train_epochs": 8},
            parse={"num_train_epochs": _whole},
        ),
    ],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws, the split, the weights and the row order.")] = 0,
    license: Annotated[str | None, typer.Option(help="Licence of the best head, for its card.")] = None,
) -> Result:
    """Search kinds and hyper-parameters; all configurations share each pass of the backbone."""
    backbone_target(run.backbone)  # raises if the Hub must be asked and does not answer
    # These take seconds to import.
    from ..training.run import TrainingRun
    from ..training.sweep import Sweep

    if run.cache is None:
        run.cache = run.cache_dir is not None
    card = describe_data(CardFacts(license=license), data)
    job = TrainingRun(data=data, recipe=recipe, seeds=[seed], card=card, **vars(run))
    with process_group():
        result = Sweep(training=job, space=space, **vars(search)).run()
        if not is_main():
            return None
    return result, partial(_print, result, job.output)


def _print(result: dict[str, Any], output: Path) -> None:
    metric = result["metric"]
    rows = []
    for place, trial in enumerate(result["trials"][:20], start=1):
        score = "-" if trial["score"] is None else f"{trial['score']:.4f}"
        numbers = (score, str(trial["best_epoch"]), f"{trial['num_parameters']:,}")
        rows.append((str(place), trial["options"], trial["status"], *numbers))
    columns = ("", "options of llama-probe train", "status", metric, "epoch", "parameters")
    print_table(f"{len(result['trials'])} configurations by validation {metric}", columns, rows, left=3)
    print(f"the best head is in {output / HEAD_FOLDER}; all configurations in {output / SWEEP_NAME}")
