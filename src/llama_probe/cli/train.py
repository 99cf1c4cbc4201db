"""`llama-probe train`."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from ..backbone.loading import DtypeName, backbone_target
from ..data.known import find_benchmark
from ..data.row_files import MAX_TEXT, kind_of
from ..distributed import is_main
from ..errors import ProbeError
from ..files import JSON
from ..heads import probe_types
from ..hub.folder import RECIPE_NAME
from ..training.recipe import Recipe, recipe_names
from .console import print_records, print_text, with_spread
from .options import BACKBONE, COUNT, ROWS, Result, command_line


_RECIPE = {"help": f"Recipes: {', '.join(recipe_names())}."}
_TYPES = {"help": f"Head types: {', '.join(probe_types())}; auto: by number of rows."}
_MAX_TRIALS = 20  # configurations of a search that are printed


def train(
    recipe: Annotated[str | None, _RECIPE] = None,
    /,
    *,
    output: Path,
    backbone: Annotated[str, BACKBONE] = "demo",
    train: Annotated[list[str] | None, ROWS] = None,
    validation: str | None = None,
    test: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    prompt_column: str | None = None,
    flagged: list[str] | None = None,
    probe_type: Annotated[str | None, _TYPES] = None,
    num_train_epochs: float | None = None,
    set_: list[str] | None = None,
    data_dir: Path | None = None,
    licence: Literal["commercial"] | None = None,
    max_text: Annotated[int, COUNT] = MAX_TEXT,
    dtype: DtypeName = "auto",
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Result:
    """Train a head by a recipe, or on labelled rows, and write its folder: config, weights, results, recipe and card.

    Args:
        recipe: a recipe, a YAML file, or training rows, as --train.
        output: folder for the head.
        backbone: the model to read.
        train: training rows. Given again, the rows of all of them.
        validation: validation rows. Default: those of a named --train, else a part of the training rows.
        test: test rows, scored once at the end. Default: those of a named --train.
        flagged: label to find, by name: halt_on halts on it; thresholds and metrics are for it.
        probe_type: type of head.
        num_train_epochs: epochs at most. Default: by number of rows.
        set_: set a field of the recipe: seeds=3, head.layers=[0.5,1.0], training.patience=2.
        licence: leave out the rows whose licence forbids commercial use, or is not known.
        resume: continue a run that was stopped: train on, or measure what is missing of its head.
        overwrite: replace the head that --output holds.
        dry_run: say how many rows, tokens, hours and GB it takes, and stop.
    """
    columns = {"text_column": text_column, "label_column": label_column, "prompt_column": prompt_column}
    source = _recipe_source(recipe, train or [], {"validation": validation, "test": test}, columns)
    short = {"labels.flagged": flagged, "head.probe_type": probe_type, "training.num_train_epochs": num_train_epochs}
    short |= {"licence": licence, "max_text": None if max_text == MAX_TEXT else max_text}
    settings = [f"{field}={json.dumps(value)}" for field, value in short.items() if value is not None]
    loaded = Recipe.load(source, [*(set_ or []), *settings])
    loaded.card.command = command_line()
    backbone_target(backbone)  # raises if the Hub must be asked and does not answer
    from ..training.plan import make_plan  # these take seconds to import
    from ..training.recipe_rows import read_rows
    from ..training.run import train_recipe

    if dry_run:
        estimate = make_plan(loaded, read_rows(loaded, data_dir), output, backbone, dtype=dtype).estimate
        values = vars(estimate) | {"seconds": estimate.seconds}
        return (values, partial(print_text, str(estimate))) if is_main() else None
    results = train_recipe(loaded, backbone, output, dtype, data_dir, resume, overwrite)
    return (results, partial(_print, results, output)) if is_main() else None


def _recipe_source(
    recipe: str | None, train: list[str], held: dict[str, str | None], columns: dict[str, str | None]
) -> str | JSON:
    """Return the name of a recipe, or the values of a recipe for the rows that were given."""
    if recipe is not None and not _is_recipe(recipe):
        train = [recipe, *train]
        recipe = None
    held = {part: rows for part, rows in held.items() if rows is not None}
    columns = {name: column for name, column in columns.items() if column is not None}
    if recipe is not None:
        if train or held or columns:
            raise ProbeError(f"the recipe {recipe} and options of rows (--train) exclude each other: use --set")
        return recipe
    if not train:
        raise ProbeError(f"train needs --train rows, or a recipe: a .yaml file, {', '.join(recipe_names())}")

    # A data set known by name has its own columns. The recipe refuses columns if there is no file that they are for.
    is_for_all = "prompt_column" in columns or all(map(find_benchmark, (*train, *held.values())))

    def source(rows: str) -> JSON:
        return {"rows": rows, **(columns if is_for_all or find_benchmark(rows) is None else {})}

    sections = {part: {"sources": [source(rows)]} for part, rows in held.items()}
    return {"train": [source(rows) for rows in train], **sections}


def _is_recipe(name: str) -> bool:
    if os.path.isdir(name):
        return os.path.isfile(os.path.join(name, RECIPE_NAME))
    # ID:SPLIT is of the Hub or of a folder.
    is_rows = find_benchmark(name) or kind_of(Path(name)) or set("/:") & set(name)
    return name in recipe_names() or Path(name).suffix in (".yaml", ".yml") or not is_rows


def _print(results: JSON, output: Path) -> None:
    names = {run["seed"]: f"seed {run['seed']}" for run in results["runs"]}
    names[results["chosen_seed"]] += " *"
    for split, summary in results["summary"].items():
        runs = {names[run["seed"]]: run[split] for run in results["runs"]}
        means = {name: value for name, value in summary.items() if isinstance(value, dict) and "mean" in value}
        runs["mean ± sd"] = {name: with_spread(value) for name, value in means.items()}
        print_records(f"{results['probe_type']} on {results['backbone']}, {split}", runs)
    trials = results.get("search", [])
    shown = {str(number): trial for number, trial in enumerate(trials[:_MAX_TRIALS], 1)}
    print_records(f"{len(trials)} configurations by validation", shown)
    if measured := results.get("measured"):
        _print_measured(measured)
    if "r2" not in results["summary"]["validation"]:  # values are not flagged
        print(f"flagged: {', '.join(results['flagged']) or 'no label; name one with --flagged, or in halt_on'}")
    print(f"head written to {output}")


def _print_measured(measured: JSON) -> None:
    is_value = any("r2" in part for part in measured["parts"])
    rates = measured["rates"]
    figure = "r2" if is_value else "auroc"
    rows = {}
    for part in measured["parts"]:
        name = (
            part["name"]
            if part["ablation"] is None
            else f"{part['name']} (ablation trained without {part['ablation']})"
        )
        for label, shares in (part.get("labels") or {"all": part}).items():
            flagged = {rate: shares[rate]["share"] if rate in shares else None for rate in rates}
            score = shares.get(figure, part.get(figure))
            rows[f"{name}, {label}"] = {"rows": shares["rows"], **flagged, figure: score}
    print_records(f"{'share flagged on ' if rates else ''}rows that were not learned from", rows)
