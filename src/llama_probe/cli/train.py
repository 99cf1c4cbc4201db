"""`llama-probe train` and `llama-probe sweep`."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..backbone.loading import backbone_target
from ..data.known import find_benchmark
from ..data.sources import DataSources
from ..distributed import is_main, process_group
from ..errors import ProbeError
from ..heads import get_probe_type, probe_types
from ..heads.configuration import ProbeConfig
from ..hub.card import CardFacts, with_spread
from ..training.options import HEAD_FOLDER, SWEEP_NAME, RunOptions, SweepOptions
from ..training.recipe import AUTO, Recipe, check_head
from .console import print_table
from .options import Fields, Result, command_line, split_names


def parse_layers(text: str) -> str | list[int]:
    """Return "all", or the state indices of a text with commas."""
    if text.strip() == "all":
        return "all"
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ProbeError(f"--layers {text!r} must be all, or state indices with commas, such as 0,5,30") from None


def parse_options(pairs: list[str]) -> dict[str, int | float]:
    """Return the numbers by name of `NAME=NUMBER` pairs."""
    options = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            options[name] = int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError:
            raise ProbeError(f"--option {pair!r} must be NAME=NUMBER, such as num_queries=4") from None
    return options


def parse_kind(name: str) -> str:
    """Check the name of a kind, before the trainer is imported."""
    if name != AUTO:
        get_probe_type(name)
    return name


_KIND_OPTIONS = "; ".join(
    f"{kind}: " + ", ".join(f"{name} ({text})" for name, (_, text) in get_probe_type(kind).options.items())
    for kind in probe_types()
    if get_probe_type(kind).options
)
_HEAD = Fields(
    "Head",
    of=ProbeConfig,
    help={
        "probe_type": f"Kind of head: {', '.join(probe_types())}; auto: by number of rows.",
        "layers": "State indices with commas, 0 (embeddings) to the number of layers, or all.",
        "token_scope": "last_user (the user's last turn), user (all turns of users), turns (all turns), prompt (every token) or "
        "content (without the constant prefix); response (the reply) or all (content and reply) for a head that follows replies, "
        "from rows with --prompt-column or chats that end with the assistant.",
        "pool": "How pooling and mha pool.",
        "num_attention_heads": "Attention heads of mha.",
        "downcast": "mha works in hidden_size / downcast dimensions.",
        "options": f"NAME=NUMBER of the kind. Repeatable. {_KIND_OPTIONS}.",
        "normalize": "How states are normalised before the token stage. Default: by kind.",
        "dropout": "Dropout on summaries. Default: by kind.",
        "layer_dropout": "Probability that a layer is zeroed in a training step. Default: by kind.",
    },
    names={"options": "option"},
    defaults={"probe_type": "auto", "token_scope": "last_user", "dropout": None, "layer_dropout": None},
    parse={"probe_type": parse_kind, "layers": parse_layers, "options": parse_options},
)
_CARD = Fields(
    "Card",
    help={
        "license": "Licence of the head. Default: that of a named --train.",
        "dataset": "Hub id of the data. Default: that of a named --train.",
        "dataset_name": "Name of the data. Default: that of a named --train.",
        "data_note": "Licence and origin of the data. Default: that of a named --train.",
        "language": "Language of the data. Default: that of a named --train.",
        "limits": "A limit to state in the card. Repeatable.",
    },
    names={"limits": "limit"},
)


def train(
    run: Annotated[RunOptions, Fields("Runtime")],
    data: Annotated[DataSources, Fields("Data", defaults={"folds": None}, parse={"label_names": split_names})],
    head: Annotated[dict[str, Any], _HEAD],
    recipe: Annotated[Recipe, Fields("Optimisation")],
    card: Annotated[CardFacts, _CARD],
    seed: Annotated[int, typer.Option(min=0, help="First seed.", rich_help_panel="Optimisation")] = 0,
    num_seeds: Annotated[
        int, typer.Option(min=1, max=1000, help="Train this many heads and keep the best by validation.")
    ] = 1,
) -> Result:
    """Train a head on labelled rows and write its folder: config, weights, results and card."""
    run.check_free()
    check_head(head)
    backbone_target(run.backbone)  # raises if the Hub must be asked and does not answer
    from ..training.run import TrainingRun  # takes seconds to import

    seeds = list(range(seed, seed + num_seeds))
    facts = _describe_data(card, data)
    job = TrainingRun(data=data, head=head, recipe=recipe, seeds=seeds, card=facts, **vars(run))
    with process_group():
        results = job.run()
        if not is_main():
            return None
    return results, partial(_print, results, job.output)


_DATA = "train eval test data_dir text_column label_column label_names flagged validation_share max_rows"
_RUN_HELP = {
    "output": "Folder for the table, the plot and the best head.",
    "cache": "Keep hidden states on disk instead of one backbone pass an epoch. Default: only with --cache-dir.",
}


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
    search: Annotated[SweepOptions, Fields("Search")],
    recipe: Annotated[
        Recipe,
        Fields(
            "Search",
            only="num_train_epochs patience metric",
            help={"num_train_epochs": "Maximum number of epochs."},
            defaults={"num_train_epochs": 8},
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
    card = _describe_data(CardFacts(license=license), data)
    job = TrainingRun(data=data, recipe=recipe, seeds=[seed], card=card, **vars(run))
    with process_group():
        result = Sweep(training=job, **vars(search)).run()
        if not is_main():
            return None
    return result, partial(_print_sweep, result, job.output)


def _describe_data(card: CardFacts, data: DataSources) -> CardFacts:
    """Fill in what is known about named data sets, and the command."""
    changes: dict[str, Any] = {"command": command_line()}
    sources = [*data.train, *data.extra]
    if len(data.train) == 1 and (known := find_benchmark(data.train[0])) is not None:
        found = known[0]
        facts = {"license": found.license, "dataset": found.hub_id, "dataset_name": found.title}
        facts |= {"data_note": found.note, "language": "en"}
        changes |= {name: value for name, value in facts.items() if not getattr(card, name)}
    card = dataclasses.replace(card, **changes)
    notes = [found[0].note for source in sources if (found := find_benchmark(source)) is not None]
    if further := [note for note in dict.fromkeys(notes) if note not in (card.data_note or "")]:
        words = [card.data_note or "No licence of the training rows was stated.", "Further rows:", *further]
        card.data_note = " ".join(words)
    return card


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
    flagged = ", ".join(results["flagged"]) or "no label; name one with --flag, here or in calibrate, or in halt_on"
    print(f"flagged: {flagged}")
    print(f"head written to {output}")


def _print_sweep(result: dict[str, Any], output: Path) -> None:
    metric = result["metric"]
    rows = []
    for place, trial in enumerate(result["trials"][:20], start=1):
        score = "-" if trial["score"] is None else f"{trial['score']:.4f}"
        numbers = (score, str(trial["best_epoch"]), f"{trial['num_parameters']:,}")
        rows.append((str(place), trial["options"], trial["status"], *numbers))
    columns = ("", "options of llama-probe train", "status", metric, "epoch", "parameters")
    print_table(f"{len(result['trials'])} configurations by validation {metric}", columns, rows, left=3)
    print(f"the best head is in {output / HEAD_FOLDER}; all configurations in {output / SWEEP_NAME}")
