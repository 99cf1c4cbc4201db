"""`llama-probe train`."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from ..backbone.loading import DtypeName, backbone_target
from ..data.known import find_benchmark
from ..data.row_files import MAX_TEXT, kind_of
from ..data.row_sources import ROWS_HELP
from ..distributed import is_main, process_group
from ..errors import ProbeError
from ..heads import get_probe_type, probe_types
from ..training.defaults import AUTO
from ..training.recipe import Recipe, recipe_names
from .console import print_table, print_text, with_spread
from .options import BACKBONE, Result, command_line, split_names


_RECIPE_HELP = f"A recipe: {', '.join(recipe_names())}, or a YAML file; or training rows, as --train."
_KINDS_HELP = f"Kind of head: {', '.join(probe_types())}; auto: by number of rows."
# Options that are short for a field of the recipe.
_FIELDS = {
    "label_names": "labels.names",
    "flag": "labels.flagged",
    "max_rows": "max_rows",
    "max_length": "head.max_length",
    "probe_type": "head.probe_type",
    "layers": "head.layers",
    "learning_rate": "training.learning_rate",
    "epochs": "training.num_train_epochs",
    "batch_size": "training.per_device_train_batch_size",
    "cache_dir": "training.cache_dir",
    "token_scope": "head.token_scope",
    "folds": "validation.folds",
    "seed": "seed",
    "num_seeds": "seeds",
    "license": "card.license",
}


def train(
    output: Annotated[Path, typer.Option(help="Folder for the head.")],
    recipe: Annotated[str | None, typer.Argument(help=_RECIPE_HELP, show_default=False)] = None,
    backbone: Annotated[str, typer.Option(help=BACKBONE)] = "demo",
    train: Annotated[
        list[str] | None, typer.Option(help=f"Training rows: {ROWS_HELP}. Given again, the rows of all of them.")
    ] = None,
    eval: Annotated[
        str | None,
        typer.Option(help="Validation rows. Default: those of a named --train, else a part of the training rows."),
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Test rows, scored once at the end. Default: those of a named --train.")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the texts.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the labels.")] = None,
    prompt_column: Annotated[
        str | None, typer.Option(help="Column of the prompts, if the texts are replies to them.")
    ] = None,
    label_names: Annotated[str | None, typer.Option(help="Names of the labels 0, 1, ..., with commas.")] = None,
    flag: Annotated[
        list[str] | None,
        typer.Option(
            help="Label to find, by name: halt_on halts on it; thresholds and metrics are for it. Repeatable."
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Local copies of the sources, read instead of the Hub: DIR/NAME/SPLIT.jsonl.gz."),
    ] = None,
    licence: Annotated[
        Literal["commercial"] | None,
        typer.Option(help="Leave out the rows whose licence forbids commercial use, or is not known."),
    ] = None,
    max_rows: Annotated[int | None, typer.Option(help="Training rows at most, drawn at random.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Cut prompts to this many tokens. Default: 512.")] = None,
    max_text: Annotated[
        int,
        typer.Option(
            min=1, help="Characters of the longest text; a file may have 512 times as many. Guards the memory."
        ),
    ] = MAX_TEXT,
    probe_type: Annotated[str | None, typer.Option(help=_KINDS_HELP)] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="all, state indices with commas (0,5,30), or parts of the depth (0.25,0.5,1.0)."),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate. Default: by kind.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Epochs at most. Default: by number of rows.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step, over all processes.")] = None,
    token_scope: Annotated[
        str | None,
        typer.Option(help="Tokens that the head reads: last_user, user, turns, prompt, content, response or all."),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(help="Judge each of so many folds by a head that has not learned from it; 0: hold rows back."),
    ] = None,
    cache_dir: Annotated[str | None, typer.Option(help="Keep the hidden states here for later runs.")] = None,
    seed: Annotated[int | None, typer.Option(help="First seed.")] = None,
    num_seeds: Annotated[
        int | None, typer.Option(help="Train this many heads side by side and keep the best by validation.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the head, for its card.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a field of the recipe: training.patience=2, head.dropout=0.3. Repeatable."),
    ] = None,
    dtype: Annotated[DtypeName, typer.Option(help="dtype of the backbone.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Resume a run that was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the head that --output holds.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how many rows, tokens, hours and GB it takes, and stop.")
    ] = False,
) -> Result:
    """Train a head by a recipe, or on labelled rows, and write its folder: config, weights, results, recipe and card."""
    given = {
        "label_names": None if label_names is None else split_names(label_names),
        "flag": flag or None,
        "max_rows": max_rows,
        "max_length": max_length,
        "probe_type": None if probe_type is None else parse_kind(probe_type),
        "layers": None if layers is None else parse_layers(layers),
        "learning_rate": learning_rate,
        "epochs": epochs,
        "batch_size": batch_size,
        "cache_dir": cache_dir,
        "token_scope": token_scope,
        "folds": folds,
        "seed": seed,
        "num_seeds": num_seeds,
        "license": license,
    }
    settings = [
        f"{_FIELDS[name]}={yaml.safe_dump(value, default_flow_style=True, width=10**6).splitlines()[0]}"
        for name, value in given.items()
        if value is not None
    ]
    columns = {"text_column": text_column, "label_column": label_column, "prompt_column": prompt_column}
    source = _recipe_source(recipe, train or [], eval, test, columns)
    try:
        loaded = Recipe.load(source, [*settings, *(set_ or [])])
    except ProbeError as error:
        raise ProbeError(_by_option(str(error), given)) from None
    backbone_target(backbone)  # raises if the Hub must be asked and does not answer
    from ..training.run import TrainingRun  # takes seconds to import

    job = TrainingRun(
        recipe=loaded,
        backbone=backbone,
        output=output,
        dtype=dtype,
        data_dir=data_dir,
        commercial=licence == "commercial",
        max_text=max_text,
        resume=resume,
        overwrite=overwrite,
        command=command_line(),
    )
    with process_group():
        if dry_run:
            estimate = job.estimate()
            return (
                (vars(estimate) | {"seconds": estimate.seconds}, partial(print_text, str(estimate)))
                if is_main()
                else None
            )
        results = job.run()
        if not is_main():
            return None
    return results, partial(_print, results, output)


def _by_option(message: str, given: dict[str, Any]) -> str:
    """Return a message that begins with a field, with the name of the option that gave it."""
    for name, path in _FIELDS.items():
        field = path.rpartition(".")[2]
        if given[name] is not None and (found := re.match(rf"(?:{re.escape(path)}|{field})(?==)", message)):
            return f"--{name.replace('_', '-')}{message[found.end() :]}"
    return message


def _recipe_source(
    recipe: str | None, train: list[str], eval: str | None, test: str | None, columns: dict[str, str | None]
) -> str | dict[str, Any]:
    """Return the recipe that was named, or one of the rows that were given."""
    is_rows = (
        recipe is not None
        and recipe not in recipe_names()
        and (find_benchmark(recipe) or kind_of(Path(recipe)) or os.path.isdir(recipe))
    )
    if is_rows and not (os.path.isdir(recipe) and (Path(recipe) / "recipe.yaml").is_file()):
        train, recipe = [recipe, *train], None
    if recipe is None and not train:
        raise ProbeError(
            f"train needs a recipe ({', '.join(recipe_names())}, or a .yaml file) or --train, training rows"
        )
    named = {
        f"--{name.replace('_', '-')}": value
        for name, value in {**columns, "train": train, "eval": eval, "test": test}.items()
    }
    if recipe is not None:
        if wrong := [option for option, value in named.items() if value]:
            raise ProbeError(
                f"{wrong[0]} and the recipe {recipe} exclude each other: --set changes a field of the recipe"
            )
        return recipe
    given = {name: value for name, value in columns.items() if value is not None}

    def source(rows: str) -> dict[str, Any]:
        return {"rows": rows} if find_benchmark(rows) and "prompt_column" not in given else {"rows": rows, **given}

    values: dict[str, Any] = {"train": [source(rows) for rows in train]}
    for part, rows in (("validation", eval), ("test", test)):
        if rows is not None:
            values[part] = {"sources": [source(rows)]}
    if (
        len({find_benchmark(rows) is None for rows in (*train, *filter(None, (eval, test)))}) == 1
        and given
        and find_benchmark(train[0])
    ):
        raise ProbeError(f"text_column, label_column, prompt_column are for files, not for {', '.join(train)}")
    return values


def parse_kind(name: str) -> str:
    """Check the name of a kind, before the trainer is imported."""
    if name != AUTO:
        get_probe_type(name)
    return name


def parse_layers(text: str) -> str | list[int] | list[float]:
    """Return "all", or the state indices or parts of the depth in a text with commas."""
    if text.strip() == "all":
        return "all"
    try:
        return [float(part) if "." in part else int(part) for part in text.split(",")]
    except ValueError:
        raise ProbeError(
            f"--layers {text!r} must be all, or state indices with commas, such as 0,5,30, or parts, such as 0.5,1.0"
        ) from None


def _print(results: dict[str, Any], output: Path) -> None:
    title = f"{results['probe_type']} on {results['backbone']}, {results['num_parameters']:,} parameters"
    seeds = [f"seed {run['seed']}{' *' if run['seed'] == results['chosen_seed'] else ''}" for run in results["runs"]]
    rows = []
    for split, summary in results["summary"].items():
        for metric, value in summary.items():
            if isinstance(value, dict) and "mean" in value:
                cells = [f"{run[split][metric]:.4f}" for run in results["runs"]]
                cells += [with_spread(value, ".4f")] if len(seeds) > 1 else []
                rows.append((f"{split} ({summary['rows']})", metric, *cells))
    print_table(title, ("rows", "metric", *seeds, *(["mean ± sd"] if len(seeds) > 1 else [])), rows, left=2)
    if search := results.get("search"):
        _print_search(search, results["recipe"]["metric"])
    if measured := results.get("measured"):
        _print_measured(measured)
    flagged = ", ".join(results["flagged"]) or "no label; name one with --flag, here or in calibrate, or in halt_on"
    print(f"flagged: {flagged}")
    print(f"head written to {output}")


def _print_search(trials: list[dict[str, Any]], metric: str) -> None:
    rows = []
    for place, trial in enumerate(trials[:20], start=1):
        values = (
            f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in trial["values"].items()
        )
        score = "-" if trial["score"] is None else f"{trial['score']:.4f}"
        rows.append((str(place), ", ".join(values), score, f"{trial['num_parameters']:,}"))
    print_table(
        f"{len(trials)} configurations by validation {metric}",
        ("", "configuration", metric, "parameters"),
        rows,
        left=2,
    )


def _print_measured(measured: dict[str, Any]) -> None:
    rows = []
    rates = measured["rates"] or ["threshold"]
    for part in measured["parts"]:
        name = part["name"] if part["twin"] is None else f"{part['name']} (twin without {part['twin']})"
        auroc = "-" if part.get("auroc") is None else f"{part['auroc']:.3f}"
        for label, shares in part.get("labels", {"all": {"rows": part["rows"]}}).items():
            cells = [f"{shares[rate]['share']:.3f}" if rate in shares else "-" for rate in rates]
            rows.append((name, label, f"{shares['rows']:,}", *cells, auroc))
    print_table(
        "share flagged on rows that were not learned from", ("rows", "label", "number", *rates, "AUROC"), rows, left=2
    )
