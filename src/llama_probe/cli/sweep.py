"""`llama-probe sweep`."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .console import print_table
from .options import DATA, Backbone, DataDir, Dtype, Json, command_line


def sweep(
    train: Annotated[str, typer.Option(help=f"Training rows: {DATA}.")],
    output: Annotated[Path, typer.Option(help="Folder for the study, the table, the plot and the best head.")],
    backbone: Backbone = "demo",
    probe_type: Annotated[
        list[str] | None,
        typer.Option(help="A kind of head to search; may be given again. Left out: pooling, gate and mha."),
    ] = None,
    trials: Annotated[int, typer.Option(help="Configurations to draw.")] = 100,
    epochs: Annotated[int, typer.Option(help="Epochs at most.")] = 8,
    keep: Annotated[float, typer.Option(help="Share that goes on after the epochs 1, 2, 4, ...; 1 for all.")] = 0.5,
    patience: Annotated[int, typer.Option(help="A configuration stops after so many epochs without gain.")] = 3,
    eval: Annotated[
        str | None,
        typer.Option(help="Validation rows; left out, those of a named --train, else a part of the training rows."),
    ] = None,
    test: Annotated[str | None, typer.Option(help="Test rows; only the best head is scored on them.")] = None,
    data_dir: DataDir = None,
    text_column: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column of the labels.")] = "label",
    label_names: Annotated[str | None, typer.Option(help="Names of the labels 0, 1, ..., with commas.")] = None,
    validation_share: Annotated[
        float | None, typer.Option(help="Share held back instead of --eval; 0.15 where neither is given.")
    ] = None,
    max_rows: Annotated[int | None, typer.Option(help="Use at most so many training rows.")] = None,
    max_length: Annotated[int, typer.Option(help="Cut prompts to so many tokens.")] = 512,
    prompt_format: Annotated[str, typer.Option(help="chat (the model's template) or raw.")] = "chat",
    metric: Annotated[str | None, typer.Option(help="Validation metric to compare by.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws, the split, the weights and the order of rows.")] = 0,
    dtype: Dtype = "auto",
    cache: Annotated[
        bool | None,
        typer.Option(
            help="Keep the states on disk instead of a pass an epoch; left out, only where --cache-dir is given."
        ),
    ] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Keep the states here for later runs.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with a sweep that was stopped.")] = False,
    license: Annotated[str | None, typer.Option(help="Licence of the best head, for its card.")] = None,
    as_json: Json = False,
) -> None:
    """Search head kinds and hyper-parameters; all configurations share each pass of the backbone."""
    from ..data.known import find_benchmark
    from ..data.sources import DataSources
    from ..distributed import is_main, process_group
    from ..hub.card import CardFacts
    from ..training.recipe import Recipe
    from ..training.run import TrainingRun
    from ..training.sweep import HEAD_FOLDER, SWEEP_NAME, SearchSpace, Sweep

    facts = CardFacts(license, command=command_line())
    if (known := find_benchmark(train)) is not None:
        data = known[0]
        facts = CardFacts(
            license or data.license, data.hub_id, data.title, data.note, data.language, [], facts.command
        )
    run = TrainingRun(
        backbone=backbone,
        output=output,
        data=DataSources(
            train=train,
            eval=eval,
            test=test,
            text_column=text_column,
            label_column=label_column,
            label_names=None if label_names is None else [name.strip() for name in label_names.split(",")],
            validation_share=validation_share,
            max_rows=max_rows,
            data_dir=data_dir,
        ),
        recipe=Recipe(num_train_epochs=epochs, patience=patience, metric=metric),
        prompt_format=prompt_format,
        max_length=max_length,
        dtype=dtype,
        seeds=[seed],
        cache=cache_dir is not None if cache is None else cache,
        cache_dir=cache_dir,
        card=facts,
    )
    space = SearchSpace(probe_type or SearchSpace.probe_types)
    with process_group(), contextlib.redirect_stdout(sys.stderr):
        result = Sweep(run, space, trials, keep, resume).run()
        if not is_main():
            return
    if as_json:
        print(json.dumps(result))
        return
    table = Table(title=f"{len(result['trials'])} configurations by validation {result['metric']}")
    for name in ("", result["metric"], "epoch", "status", "parameters", "options of llama-probe train"):
        table.add_column(name, justify="right" if name in (result["metric"], "parameters") else "left")
    for place, trial in enumerate(result["trials"][:20], start=1):
        table.add_row(
            str(place),
            "-" if trial["score"] is None else f"{trial['score']:.4f}",
            str(trial["best_epoch"]),
            trial["status"],
            f"{trial['num_parameters']:,}",
            trial["options"],
        )
    print_table(table)
    print(f"the best head is in {output / HEAD_FOLDER}; all configurations in {output / SWEEP_NAME}")
