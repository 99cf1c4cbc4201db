"""`llama-probe reproduce`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.sources import DataSources
from ..experiments.reproduction.columns import cell, columns
from ..experiments.reproduction.options import DATA, ReproductionOptions
from ..experiments.reproduction.workbench import Workbench
from .console import print_table
from .options import Fields, Result, command_line, split_names


def parse_lists(texts: list[str]) -> list[str] | None:
    """Return the names in texts with commas; None if there is none."""
    return split_names(",".join(texts)) if texts else None


_BENCH = Fields("Backbone and data", of=Workbench, defaults={"backbone": "demo"})
_REPORT = Fields(
    "Report",
    defaults={"data": ",".join(DATA)},
    parse={"data": split_names, "methods": split_names, "only": parse_lists},
)


def reproduce(
    bench: Annotated[dict[str, Any], _BENCH],
    place: Annotated[dict[str, Any], Fields("Data", of=DataSources, only="data_dir")],
    report: Annotated[ReproductionOptions, _REPORT],
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs of each method that depends on chance.")] = 3,
) -> Result:
    """Write the tables of arXiv 2601.13288 for a backbone; a stopped run resumes."""
    workbench = Workbench(scratch=report.output / ".states", seeds=list(range(seeds)), **place, **bench)
    from ..experiments.reproduction.reproduction import Reproduction  # takes seconds to import

    results = Reproduction(bench=workbench, command=command_line(), **vars(report)).execute()
    return results, partial(_print, results, report.output)


def _print(results: dict[str, Any], output: Path) -> None:
    from ..experiments.reproduction.report import REPORT_NAME

    for source, by_method in results["main"].items():
        shown = {name: result for name, result in by_method.items() if result is not None}
        found = columns(source)
        rows = [(name, *(cell(column.find(result)) for column in found)) for name, result in shown.items()]
        if shown:
            print_table(f"{source}, test rows", ("method", *(column.title for column in found)), rows)
    print(f"report written to {output / REPORT_NAME}")
