"""`llama-probe evaluate`."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .console import create_console, escape, print_table
from .options import DATA, Backbone, DataDir, Dtype, Json, Probe, PromptColumn, Split, split_of


_MAX_CONFUSION = 12  # labels up to which the confusion matrix is printed


def evaluate(
    probe: Probe,
    data: Annotated[str, typer.Option(help=f"Labelled rows: {DATA}.")],
    backbone: Backbone = "demo",
    text_column: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column of the labels.")] = "label",
    prompt_column: PromptColumn = None,
    split: Split = None,
    data_dir: DataDir = None,
    slice_column: Annotated[
        list[str] | None,
        typer.Option(help="Report also by the values of this column; a named data set may have its own."),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="COLUMN=VALUE: only these rows, such as human_annotation=true; given again, rows that have all of them."
        ),
    ] = None,
    bootstrap: Annotated[
        int, typer.Option(min=0, max=100_000, help="Resamples of the rows for 95 % confidence intervals; 0 for none.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the resamples.")] = 0,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Score a head on labelled rows, with its saved temperature and threshold."""
    import torch

    from ..backbone.loading import backbone_target, load_backbone
    from ..data.known import find_benchmark
    from ..data.prompts import PromptFormat
    from ..data.states import PromptDataset
    from ..data.texts import read_labelled
    from ..distributed import is_main, process_group
    from ..errors import ProbeError
    from ..evaluation.detection import apply_rules, follow_replies
    from ..evaluation.report import detailed_report, predict_logits
    from ..heads.match import check_backbone
    from ..heads.probe import ProbeModel
    from ..hub.folder import measured_rules
    from ..hub.resolve import resolve_head

    with process_group(), contextlib.redirect_stdout(sys.stderr):
        head = ProbeModel.from_pretrained(resolve_head(probe, backbone_target(backbone)))
        config = head.config
        rules = measured_rules(head.results) if config.reads_reply else {}
        names = list(config.id2label.values())
        kind = config.problem_type
        part = split_of(data, split)
        rows = read_labelled(data, text_column, label_column, names, kind, part, data_dir, prompt_column)
        for condition in where or []:
            column, equals, value = condition.partition("=")
            if not equals:
                raise ProbeError(f"--where {condition!r} must be COLUMN=VALUE")
            rows = rows.where(column, value)
        slices = slice_column or []
        for column in slices:
            if column not in rows.columns:
                raise ProbeError(
                    f"{data} has no column {column!r}; beside texts and labels it has: {', '.join(rows.columns) or 'none'}"
                )
        known = find_benchmark(data)
        if known is not None and not slices:
            slices = [column for column in known[0].slices if column in rows.columns]
        lm, tokenizer = load_backbone(backbone, dtype)
        check_backbone(probe, config, lm)
        head.to(lm.device).set_backbone(lm)
        prompts, masks, lengths = PromptFormat.from_config(config, tokenizer).encode_for(config, rows.texts)
        dataset = PromptDataset(prompts, rows.labels, masks)
        followed = None
        if lengths is None:
            logits = predict_logits(head, dataset, progress=True)
        else:
            followed = follow_replies(head, dataset, lengths, lm, progress=True)
            logits = torch.stack([tokens[-1] for tokens in followed])
        columns = {column: rows.columns[column] for column in slices}
        result = None
        if is_main():
            result = detailed_report(config, logits, rows.labels, columns, bootstrap, seed)
            if followed is not None and rules:
                result["halting"] = apply_rules(config, rules, followed, rows.labels)
    if result is None:
        return
    if as_json:
        print(json.dumps(result))
        return
    console = create_console()
    print_table(_metrics_table(f"{probe} on {data}", result))
    if "labels" in result:
        names = list(result["labels"])
        print_table(_table("each label against the others", result["labels"]))
        if "confusion" in result:
            _print_confusion(console, names, result["confusion"])
        found = result["calibration"]
        console.print(
            f"Expected calibration error: {_cell(found, 'error', ' ')} with the saved temperature "
            f"{config.temperature:.3f}, {_cell(found, 'error_uncalibrated', ' ')} at temperature 1."
        )
    for label, ruled in result.get("halting", {}).items():
        print_table(_halting_table(label, ruled))
    if bootstrap:
        console.print(f"In brackets: 95 % intervals by bootstrap, {bootstrap:,} resamples of the rows, seed {seed}.")


def _metrics_table(title: str, result: dict[str, Any]) -> Table:
    """All rows, and each slice."""
    parts = {"all rows": {key: value for key, value in result.items() if not isinstance(value, (dict, list))}}
    if "intervals" in result:
        parts["all rows"]["intervals"] = result["intervals"]
    for column, values in result.get("slices", {}).items():
        parts |= {f"{column} = {value}": part for value, part in values.items()}
    return _table(title, parts)


def _table(title: str, parts: dict[str, dict[str, Any]]) -> Table:
    """A row for each part, with a metric in each column and its interval below it."""
    table = Table(title=escape(title))
    metrics = [key for key in next(iter(parts.values())) if key != "intervals"]
    table.add_column("")
    for metric in metrics:
        table.add_column(metric, justify="right")
    for name, part in parts.items():
        table.add_row(escape(name), *(_cell(part, metric, "\n") for metric in metrics))
    return table


def _halting_table(label: str, rules: list[dict[str, Any]]) -> Table:
    """What each rule that the head was measured with does to these replies."""
    table = Table(title=escape(f"replies halted by {label} while they are written"))
    for column in ("patience", "threshold", "detected", "in vain", "delay, median", "90 % below", "of the reply"):
        table.add_column(column, justify="right")
    for rule in rules:
        found = rule["test"]
        delay = found["delay"]
        cells = [found["detected"], found["false_halts"], delay["median"], delay["p90"], delay["share"]]
        forms = (".1%", ".1%", ".0f", ".0f", ".0%")
        shown = ["-" if cell is None else f"{cell:{form}}" for cell, form in zip(cells, forms, strict=True)]
        table.add_row(f"{rule['patience']}{' *' if rule['chosen'] else ''}", f"{rule['threshold']:.3f}", *shown)
    return table


def _print_confusion(console: Console, names: list[str], matrix: list[list[int]]) -> None:
    if len(names) > _MAX_CONFUSION:
        console.print(f"The confusion matrix of the {len(names)} labels is in the output of --json.")
        return
    table = Table(title="rows by their label, and by what the head gives")
    table.add_column("")
    for name in names:
        table.add_column(escape(name), justify="right")
    for name, row in zip(names, matrix, strict=True):
        table.add_row(escape(name), *(f"{count:,}" for count in row))
    print_table(table)


def _cell(part: dict[str, Any], metric: str, separator: str) -> str:
    """A number of a part of the report and, where it has one, its interval."""
    value, interval = part[metric], part.get("intervals", {}).get(metric)
    text = _number(value)
    return text if interval is None or value is None else f"{text}{separator}[{', '.join(map(_number, interval))}]"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if 0.001 <= abs(value) < 1000 or not value else f"{value:.3g}"
