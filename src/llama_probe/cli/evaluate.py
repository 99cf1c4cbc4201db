"""`llama-probe evaluate`."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .options import DATA, Backbone, DataDir, Dtype, Json, Probe


def evaluate(
    probe: Probe,
    data: Annotated[str, typer.Option(help=f"Labelled rows: {DATA}.")],
    backbone: Backbone = "demo",
    text_column: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column of the labels.")] = "label",
    split: Annotated[str, typer.Option(help="Split of a named or Hub data set, or of a folder.")] = "test",
    data_dir: DataDir = None,
    slice_column: Annotated[
        list[str] | None,
        typer.Option(help="Report also by the values of this column; a named data set may have its own."),
    ] = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Score a head on labelled rows, with its saved temperature and threshold."""
    from ..backbones import backbone_target, load_backbone
    from ..benchmarks import find_benchmark
    from ..data import read_labelled
    from ..errors import ProbeError
    from ..evaluation import predict_logits, report
    from ..features import PromptDataset
    from ..files import read_head
    from ..fingerprint import check_backbone
    from ..prompts import PromptFormat
    from ..resolve import resolve_head

    with contextlib.redirect_stdout(sys.stderr):
        head = read_head(resolve_head(probe, backbone_target(backbone)))
        config = head.config
        names = list(config.id2label.values())
        rows = read_labelled(data, text_column, label_column, names, config.problem_type, split, data_dir)
        slices = slice_column or []
        for column in slices:
            if column not in rows.columns:
                raise ProbeError(f"{data} has no column {column!r}; it has: {', '.join(rows.columns)}")
        known = find_benchmark(data)
        if known is not None and not slices:
            slices = [column for column in known[0].slices if column in rows.columns]
        lm, tokenizer = load_backbone(backbone, dtype)
        check_backbone(probe, config, lm)
        head.to(lm.device).set_backbone(lm)
        prompts = PromptFormat.from_config(config, tokenizer).encode(rows.texts)
        logits = predict_logits(head, PromptDataset(prompts, rows.labels), progress=True)
        result = report(config, logits, rows.labels, {column: rows.columns[column] for column in slices})
    if as_json:
        print(json.dumps(result))
        return
    table = Table(title=f"{probe} on {data}")
    groups = [("all rows", result)]
    for column, values in result.get("slices", {}).items():
        groups += [(f"{column} = {value}", part) for value, part in values.items()]
    metrics = [key for key in result if key != "slices"]
    for name in ("", *metrics):
        table.add_column(name, justify="left" if not name else "right")
    for title, part in groups:
        table.add_row(
            title, *(f"{part[m]:.4f}" if isinstance(part[m], float) else str(part[m] or "-") for m in metrics)
        )
    Console().print(table)
