"""`llama-probe benchmark` and `llama-probe reproduce`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from transformers.utils import logging

from ..backbone.loading import backbone_target
from ..data.sources import DataSources
from ..errors import ProbeError
from ..experiments.benchmark.options import BenchmarkOptions
from ..experiments.reproduction.options import DATA, ReproductionOptions
from ..experiments.reproduction.workbench import Workbench
from ..serving.sources import read_heads
from .console import print_table, print_text
from .options import BACKBONE, Fields, Result, command_line, split_names


_HELP = {"backbone": f"{BACKBONE[:-1]}; with --random-weights also a shape, such as llama-3b."}


def benchmark(
    settings: Annotated[BenchmarkOptions, Fields("Benchmark", help=_HELP)],
    operations: Annotated[
        bool,
        typer.Option(
            "--operations",
            help="Count the operations that heads add to a pass, instead of time and memory. On a GPU each is a kernel launch.",
        ),
    ] = False,
    as_device: Annotated[
        Literal["cuda", "cpu"] | None,
        typer.Option("--as", help="With --operations: choose as on this device. Default: as on --device."),
    ] = None,
) -> Result:
    """Measure what heads cost while the model serves, next to the plain model."""
    if as_device is not None and not operations:
        raise ProbeError(f"--as {as_device} needs --operations")
    if settings.probes and not settings.random_weights:  # a shape of random weights is no backbone
        read_heads(settings.probes, backbone_target(settings.backbone))  # raises
    from ..experiments.benchmark.serving_benchmark import ServingBenchmark  # takes seconds to import

    bench, verbosity = ServingBenchmark(settings), logging.get_verbosity()
    logging.set_verbosity_error()  # heads and models warn about random prompts
    try:
        report = bench.count_operations(as_device) if operations else bench.execute()
    finally:
        logging.set_verbosity(verbosity)
    return report, partial(_print_operations if operations else _print_times, report)


def _print_operations(report: dict[str, Any]) -> None:
    from ..experiments.benchmark import operations

    print_table(f"operations of a pass, as on {report['as_device']}", *operations.columns(report["rows"]))


def _print_times(report: dict[str, Any]) -> None:
    from ..experiments.benchmark import report as tables

    for title, rows in tables.by_load(report).items():
        print_table(title, *tables.columns(rows))
    for note in tables.notes(report):
        print_text(note)


_BENCH = Fields("Backbone and data", of=Workbench, defaults={"backbone": "demo"})
_REPORT = Fields(
    "Report", defaults={"data": ",".join(DATA)}, parse=dict.fromkeys(("data", "methods", "only"), split_names)
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
    return results, partial(_print_reproduction, results, report.output)


def _print_reproduction(results: dict[str, Any], output: Path) -> None:
    from ..experiments.reproduction.report import REPORT_NAME, cells, columns

    for source, by_method in results["main"].items():
        found = columns(source)
        rows = [(name, *cells(result, found)) for name, result in by_method.items()]
        if rows:
            print_table(f"{source}, test rows", ("method", *(column.title for column in found)), rows)
    print(f"report written to {output / REPORT_NAME}")
