"""`llama-probe reproduce`."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .console import escape, print_table
from .options import Backbone, DataDir, Dtype, Json, command_line


def reproduce(
    output: Annotated[Path, typer.Option(help="Folder for the report, the plots and the heads.")],
    backbone: Backbone = "demo",
    data: Annotated[
        str, typer.Option(help="Data sets with commas, each NAME or NAME:SPLIT (the split to train on).")
    ] = "toxicchat,sst2,emotion,imdb",
    data_dir: DataDir = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods with commas: tfidf, zero-shot, few-shot, prototypes, layer-linear, last-token, muli, multimax-small, multimax-half, or "
            "kinds of head. Left out: all."
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="main, ood, downcast, layers, sensitivity or few-labels, with commas; may be given again. Left out: all."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs of each method that depends on chance.")] = 3,
    max_rows: Annotated[
        int | None, typer.Option(help="Use at most so many training, validation and test rows, for a quick look.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Cut prompts to so many tokens.")] = 512,
    epochs: Annotated[int, typer.Option(help="Epochs of each head at most.")] = 6,
    patience: Annotated[int, typer.Option(help="A head stops after so many epochs without gain.")] = 3,
    shots: Annotated[int, typer.Option(help="Examples a label of few-shot prompting.")] = 4,
    trials: Annotated[
        int | None, typer.Option(help="Configurations of the sweep for sensitivity; 12 if left out.")
    ] = None,
    sweep: Annotated[
        Path | None, typer.Option(help="Read sensitivity off this folder of a finished sweep, in place of one.")
    ] = None,
    dtype: Dtype = "auto",
    cache: Annotated[
        bool, typer.Option(help="Run the backbone once over each row and keep its states on disk.")
    ] = True,
    cache_dir: Annotated[Path | None, typer.Option(help="Keep the states here for later runs.")] = None,
    as_json: Json = False,
) -> None:
    """Write the tables of arXiv 2601.13288 for this backbone; a run that was stopped goes on."""
    from ..experiments.reproduction.reproduction import Reproduction
    from ..experiments.reproduction.workbench import Workbench

    bench = Workbench(
        backbone,
        output / ".states",
        data_dir,
        list(range(seeds)),
        max_rows,
        max_length,
        dtype,
        cache,
        cache_dir,
    )
    names = None if methods is None else _names(methods)
    parts = _names(",".join(only)) if only else None
    with contextlib.redirect_stdout(sys.stderr):
        report = Reproduction(
            bench, output, _names(data), names, parts, epochs, patience, shots, trials, sweep, command_line()
        ).execute()
    if as_json:
        print(json.dumps(report))
        return
    from ..experiments.reproduction.columns import cell, columns
    from ..experiments.reproduction.report import REPORT_NAME

    for source, results in report["main"].items():
        if not any(results.values()):
            continue
        shown = Table(title=escape(f"{source}, test rows"))
        shown.add_column("method")
        for column in columns(source):
            shown.add_column(column.title, justify="right")
        for name, result in results.items():
            if result is None:
                continue
            shown.add_row(name, *(cell(column.find(result)) for column in columns(source)))
        print_table(shown)
    print(f"report written to {output / REPORT_NAME}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
