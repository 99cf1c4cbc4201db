"""`llama-probe inspect`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .options import Json


def inspect(
    probe: Annotated[
        str | None, typer.Argument(help="A head folder or a bundled alias; all bundled heads where left out.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option(help="Print the bundled heads and their results as a Markdown table.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a head is, or which heads come with the package and what they measured."""
    from ..files import read_config, read_head
    from ..model_card import results_table
    from ..resolve import bundled_heads, resolve_head

    if markdown:
        print(results_table(bundled_heads().values()))
        return
    if probe is None:
        configs = {alias: read_config(folder) for alias, folder in bundled_heads().items()}
        if as_json:
            print(json.dumps({alias: config.to_dict() for alias, config in configs.items()}))
            return
        table = Table("alias", "kind", "labels", "backbone", title="bundled heads")
        for alias, config in configs.items():
            table.add_row(
                alias, config.probe_type, ", ".join(config.id2label.values()), config.base_model_name_or_path
            )
        Console().print(table)
        return
    head = read_head(resolve_head(probe))
    values = head.config.to_dict() | {"num_parameters": head.num_parameters()}
    if as_json:
        print(json.dumps(values))
        return
    table = Table("field", "value", title=probe)
    for key, value in sorted(values.items()):
        table.add_row(key, json.dumps(value, ensure_ascii=False))
    Console().print(table)
