"""`llama-probe train`."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..errors import ProbeError
from .console import escape, print_table
from .options import DATA, Backbone, DataDir, Dtype, Json, PromptColumn, command_line


def train(
    train: Annotated[str, typer.Option(help=f"Training rows: {DATA}.")],
    output: Annotated[Path, typer.Option(help="Folder for the head.")],
    backbone: Backbone = "demo",
    probe_type: Annotated[
        str,
        typer.Option(
            help="Kind of head: pooling, gate, mha, attentive, multimax, last or muli; auto: what suits the number of rows."
        ),
    ] = "auto",
    eval: Annotated[
        str | None,
        typer.Option(help="Validation rows; left out, those of a named --train, else a part of the training rows."),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(
            help="Test rows, scored once at the end; nothing is chosen by them. Left out, those of a named --train."
        ),
    ] = None,
    extra: Annotated[
        list[str] | None,
        typer.Option(
            help="Further rows to train on, of another source; nothing is chosen or measured by them. May be given again."
        ),
    ] = None,
    data_dir: DataDir = None,
    text_column: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column of the labels.")] = "label",
    prompt_column: PromptColumn = None,
    label_names: Annotated[str | None, typer.Option(help="Names of the labels 0, 1, ..., with commas.")] = None,
    problem_type: Annotated[
        str | None,
        typer.Option(
            help="single_label_classification, multi_label_classification or regression; told by the labels if left out."
        ),
    ] = None,
    slice_column: Annotated[
        list[str] | None, typer.Option(help="Report test rows also by this column; a named data set may have its own.")
    ] = None,
    validation_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the training rows held back instead of --eval or --folds; 0.15 where rows are held back and it is left out."
        ),
    ] = None,
    test_share: Annotated[
        float | None,
        typer.Option(help="Share of the training rows held back as test rows, before anything else, without --test."),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            help="Without --eval: train on all rows, and validate each of so many folds by a head trained on the others; "
            "0 holds a share back. Left out: 5 for fewer than 400 rows, else 0."
        ),
    ] = None,
    max_rows: Annotated[int | None, typer.Option(help="Use at most so many training rows.")] = None,
    extra_weight: Annotated[
        list[float] | None,
        typer.Option(
            help="What the rows of --extra count for, others counting for 1. Given again, the members of a multimax head take "
            "turns: with 0 and 0.3 every other one learns without them.  [default: 1]"
        ),
    ] = None,
    max_extra_rows: Annotated[
        int | None, typer.Option(help="And at most so many of each --extra, drawn at random.")
    ] = None,
    prompt_format: Annotated[str, typer.Option(help="chat (the model's template) or raw.")] = "chat",
    system_prompt: Annotated[str | None, typer.Option(help="A system turn of your own.")] = None,
    token_scope: Annotated[
        str,
        typer.Option(
            help="content (without the template's constant prefix) or prompt; response (the reply alone) or all (both) for a "
            "head that follows replies, from rows with --prompt-column or chats that end with the assistant."
        ),
    ] = "content",
    max_length: Annotated[int, typer.Option(help="Cut prompts to so many tokens.")] = 512,
    layers: Annotated[
        str,
        typer.Option(help="States to read with commas, 0 (embeddings) to the number of layers, or all."),
    ] = "all",
    pool: Annotated[str, typer.Option(help="mean or max.")] = "mean",
    num_attention_heads: Annotated[int, typer.Option(help="Attention heads of mha.")] = 2,
    downcast: Annotated[int, typer.Option(help="mha works in hidden_size / downcast dimensions.")] = 32,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=NUMBER of the kind, such as num_members=4 or num_maxima=2 of multimax, num_queries=4 of attentive, l1=0.003 of muli."
        ),
    ] = None,
    normalize: Annotated[
        str | None,
        typer.Option(help="layernorm, rms or none, before the token stage; left out: layernorm, for muli none."),
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option(help="Dropout on summaries; this and the next four suit the kind and the rows if left out."),
    ] = None,
    layer_dropout: Annotated[
        float | None, typer.Option(help="Chance that a layer is left out of a training step.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Epochs at most.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step, over all processes.")] = None,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Steps to gather before each update.")] = 1,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.05,
    label_smoothing: Annotated[
        float | None, typer.Option(help="Label smoothing; 0.05 if left out, 0 for muli.")
    ] = None,
    focal_gamma: Annotated[float, typer.Option(help="Focal loss; 0 for none.")] = 0.0,
    class_weights: Annotated[str | None, typer.Option(help="'balanced', or one weight a label with commas.")] = None,
    metric: Annotated[str | None, typer.Option(help="Validation metric to choose by.")] = None,
    max_false_positive_rate: Annotated[
        float | None,
        typer.Option(
            help="Choose the threshold for the highest recall with at most this share of negative validation rows "
            "flagged, such as 0.01; by --threshold-rule if left out."
        ),
    ] = None,
    threshold_rule: Annotated[
        str,
        typer.Option(
            help="expected-f1: the threshold of the best F1 as a logistic fit to the validation rows expects it; best-f1: "
            "that of the rows themselves, which chance has a larger part in."
        ),
    ] = "expected-f1",
    patience: Annotated[int, typer.Option(help="Stop after so many epochs without a better metric.")] = 3,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    num_seeds: Annotated[
        int, typer.Option(min=1, max=1000, help="Train so many heads and keep the best by validation.")
    ] = 1,
    dtype: Dtype = "auto",
    cache: Annotated[
        bool, typer.Option(help="Run the backbone once and keep its states on disk while training.")
    ] = True,
    cache_dir: Annotated[Path | None, typer.Option(help="Keep the states here for later runs.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with a run that was stopped.")] = False,
    license: Annotated[
        str | None,
        typer.Option(help="Licence of the head, for its card; this and the next four come with a named --train."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub id of the data, for the card.")] = None,
    dataset_name: Annotated[str | None, typer.Option(help="Name of the data, for the card.")] = None,
    data_note: Annotated[str | None, typer.Option(help="Licence and origin of the data, for the card.")] = None,
    language: Annotated[str | None, typer.Option(help="Language of the data, for the card.")] = None,
    limit: Annotated[list[str] | None, typer.Option(help="A limit to state in the card; may be given again.")] = None,
    as_json: Json = False,
) -> None:
    """Train a head on labelled rows and write its folder: config, weights, results and card."""
    from ..data.known import find_benchmark
    from ..data.sources import DataSources
    from ..distributed import is_main, process_group
    from ..hub.card import CardFacts
    from ..training.recipe import Recipe
    from ..training.run import TrainingRun

    known = find_benchmark(train)
    if known is not None:
        license, dataset = license or known[0].license, dataset or known[0].hub_id
        dataset_name, data_note = dataset_name or known[0].title, data_note or known[0].note
        language = language or known[0].language
    notes = [found[0].note for source in extra or [] if (found := find_benchmark(source)) is not None]
    if further := [note for note in dict.fromkeys(notes) if note not in (data_note or "")]:
        data_note = " ".join([data_note or "No licence of the training rows was stated.", "Further rows:", *further])
    run = TrainingRun(
        backbone=backbone,
        output=output,
        data=DataSources(
            train=train,
            eval=eval,
            test=test,
            extra=extra or [],
            extra_weights=extra_weight or [1.0],
            text_column=text_column,
            label_column=label_column,
            prompt_column=prompt_column,
            label_names=None if label_names is None else [name.strip() for name in label_names.split(",")],
            problem_type=problem_type,
            validation_share=validation_share,
            test_share=test_share,
            folds=folds,
            slice_columns=slice_column or [],
            max_rows=max_rows,
            max_extra_rows=max_extra_rows,
            data_dir=data_dir,
        ),
        head={
            "probe_type": probe_type,
            "layers": _layers(layers),
            "pool": pool,
            "num_attention_heads": num_attention_heads,
            "downcast": downcast,
            "normalize": normalize,
            "dropout": dropout,
            "layer_dropout": layer_dropout,
            "token_scope": token_scope,
            "options": _options(option or []),
        },
        recipe=Recipe(
            learning_rate=learning_rate,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            weight_decay=weight_decay,
            label_smoothing=label_smoothing,
            focal_gamma=focal_gamma,
            class_weights=class_weights,
            patience=patience,
            metric=metric,
            max_false_positive_rate=max_false_positive_rate,
            threshold_rule=threshold_rule,
        ),
        prompt_format=prompt_format,
        system_prompt=system_prompt,
        max_length=max_length,
        dtype=dtype,
        seeds=list(range(seed, seed + num_seeds)),
        cache=cache,
        cache_dir=cache_dir,
        resume=resume,
        card=CardFacts(license, dataset, dataset_name, data_note, language, limit or [], command_line()),
    )
    with process_group():
        # The Trainer writes its log to standard output, which belongs to the results here.
        with contextlib.redirect_stdout(sys.stderr):
            results = run.run()
        if not is_main():
            return
        if as_json:
            print(json.dumps(results))
            return
        _print_summary(results)
        print(f"head written to {output}")


def _layers(text: str) -> str | list[int]:
    if text.strip() == "all":
        return "all"
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ProbeError(f"--layers {text!r} must be all, or state indices with commas, such as 0,5,30") from None


def _options(pairs: list[str]) -> dict[str, int | float]:
    options = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            options[name] = int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError:
            raise ProbeError(f"--option {pair!r} must be NAME=NUMBER, such as num_queries=4") from None
    return options


def _print_summary(results: dict) -> None:
    title = f"{results['probe_type']} on {results['backbone']}, {results['num_parameters']:,} parameters"
    table = Table(title=escape(title))
    table.add_column("rows")
    table.add_column("metric")
    for run in results["runs"]:
        table.add_column(
            f"seed {run['seed']}" + (" *" if run["seed"] == results["chosen_seed"] else ""), justify="right"
        )
    table.add_column("mean ± sd", justify="right")
    for split, summary in results["summary"].items():
        for metric, value in summary.items():
            if isinstance(value, dict) and "mean" in value:
                cells = [f"{run[split][metric]:.4f}" for run in results["runs"]]
                table.add_row(
                    f"{split} ({summary['rows']})", metric, *cells, f"{value['mean']:.4f} ± {value['std']:.4f}"
                )
    print_table(table)
