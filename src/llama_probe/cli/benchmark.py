"""`llama-probe benchmark`."""

from __future__ import annotations

from functools import partial
from typing import Literal

from transformers.utils import logging

from ..backbone.loading import backbone_target
from ..errors import ProbeError
from ..experiments.benchmark_options import BenchmarkOptions
from ..files import JSON
from ..serving.host import read_heads
from .console import print_table, print_text
from .options import Result


def benchmark(
    *, options: BenchmarkOptions, operations: bool = False, as_: Literal["cuda", "cpu"] | None = None
) -> Result:
    """Measure what heads cost while the model serves, next to the plain model.

    Args:
        operations: count the operations that heads add to a pass, instead of time and memory; a GPU launches each.
        as_: with --operations: choose as on this device. Default: as on --device.
    """
    if as_ is not None and not operations:
        raise ProbeError(f"--as {as_} needs --operations")
    if options.probe and not options.random_weights:  # a shape of random weights is no backbone
        read_heads(options.probe, backbone_target(options.backbone))  # raises
    from ..experiments.systems import count_operations, describe_run, load_systems, measure_costs

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # heads and models warn about random prompts
    try:
        if operations:
            systems = load_systems(options, replies=True)
            device = as_ or ("cpu" if systems.plain.device.type == "cpu" else "cuda")
            rows = count_operations(systems, options.tokens, device)
            report = {**describe_run(options, systems.plain, rows), "as_device": device}
        else:
            report = measure_costs(options)
    finally:
        logging.set_verbosity(verbosity)
    return report, partial(_print, report)


def _print(report: JSON) -> None:
    rows, backbone = report["rows"], report["backbone"]
    device = report.get("as_device", report["environment"]["device"])
    weights = "random weights" if report["settings"]["random_weights"] else "its weights"
    varying = [name for name in rows[0] if len({str(row[name]) for row in rows}) > 1]
    alike = [f"{name} {rows[0][name]}" for name in rows[0] if name not in varying and rows[0][name] is not None]
    table = [[row[name] for name in varying] for row in rows]
    print_table(f"{backbone['name']}, {weights}, {backbone['dtype']}, {device}", varying, table)
    if alike:
        print_text(f"In all rows: {', '.join(alike)}.")
    if "ratio" in varying:
        print_text("Ratios to `base`, with quartiles, are of pairs of runs; its own show the noise.")
