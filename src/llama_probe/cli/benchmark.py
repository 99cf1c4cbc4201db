"""`llama-probe benchmark`."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer
from transformers.utils import logging

from ..backbone.loading import backbone_target
from ..errors import ProbeError
from ..experiments.benchmark.options import DEVICES, BenchmarkOptions
from ..serving.sources import read_heads
from .console import print_table, print_text
from .options import BACKBONE, Fields, Result


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
        str | None,
        typer.Option(
            "--as", metavar="DEVICE", help="With --operations: choose as on cuda or cpu. Default: as on --device."
        ),
    ] = None,
) -> Result:
    """Measure what heads cost while the model serves, next to the plain model."""
    if as_device is not None and not operations:
        raise ProbeError(f"--as {as_device} needs --operations")
    if as_device not in (None, *DEVICES):
        raise ProbeError(f"--as {as_device} must be one of {', '.join(DEVICES)}")
    if settings.probes and not settings.random_weights:  # a shape of random weights is no backbone
        read_heads(settings.probes, backbone_target(settings.backbone))  # raises
    from ..experiments.benchmark.serving_benchmark import ServingBenchmark  # takes seconds to import

    bench, verbosity = ServingBenchmark(**vars(settings)), logging.get_verbosity()
    logging.set_verbosity_error()  # heads and models warn about random prompts
    try:
        report = bench.count_operations(as_device) if operations else bench.execute()
    finally:
        logging.set_verbosity(verbosity)
    return report, partial(_print_operations if operations else _print_times, report)


def _print_operations(report: dict[str, Any]) -> None:
    from ..experiments.benchmark.operations import columns

    print_table(f"operations of a pass, as on {report['as_device']}", *columns(report["rows"]))


def _print_times(report: dict[str, Any]) -> None:
    from ..experiments.benchmark.report import by_load, columns, notes

    for title, rows in by_load(report).items():
        print_table(title, *columns(rows))
    for note in notes(report):
        print_text(note)
