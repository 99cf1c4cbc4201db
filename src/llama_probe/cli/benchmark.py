"""`llama-probe benchmark`."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import Annotated, Any, Literal

import typer
from transformers.utils import logging

from ..backbone.loading import backbone_target
from ..errors import ProbeError
from ..experiments.options import SHAPE, BenchmarkOptions
from ..serving.sources import read_heads
from .console import print_table, print_text
from .options import BACKBONE, Fields, Result


_HELP = {"backbone": f"{BACKBONE[:-1]}; with --random-weights also {SHAPE}."}


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
    from ..experiments.benchmark import count_operations, describe_run, load_systems, measure_costs

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # heads and models warn about random prompts
    try:
        if not operations:
            report = measure_costs(settings)
            return report, partial(_print_costs, report)
        systems = load_systems(settings, replies=True)
        as_device = as_device or ("cpu" if systems.plain.device.type == "cpu" else "cuda")
        rows = count_operations(systems, settings.tokens, as_device)
        report = {**describe_run(settings, systems.plain, rows), "as_device": as_device}
        return report, partial(_print_operations, report)
    finally:
        logging.set_verbosity(verbosity)


def _print_operations(report: dict[str, Any]) -> None:
    header = ["system", "tokens", "prefill", "its ratio", "a further token", "its ratio"]
    forms = {"tokens": "{:,}", "prefill": "{:,}", "prefill_ratio": "{:.3f}x", "step": "{:,}", "step_ratio": "{:.3f}x"}
    rows = [[row["system"], *(form.format(row[name]) for name, form in forms.items())] for row in report["rows"]]
    print_table(f"operations of a pass, as on {report['as_device']}", header, rows)


def _print_costs(report: dict[str, Any]) -> None:
    settings, backbone, machine = report["settings"], report["backbone"], report["environment"]
    for (batch, tokens), rows in groupby(report["rows"], key=lambda row: (row["batch_size"], row["tokens"])):
        print_table(f"batch {batch}, {tokens} tokens, {settings['new_tokens']} new", *_columns(list(rows)))
    weights = "random weights" if settings["random_weights"] else "its own weights"
    print_text(
        f"{backbone['name']} ({backbone['num_parameters'] / 1e6:,.0f} million parameters, {backbone['dtype']}, {weights}) on "
        f"{machine['device']}, {machine['threads']} threads; {settings['pairs']} pairs a system, in turn with the plain model."
    )
    print_text(
        "Ratio: of the times in a pair, median and quartiles. The ratio of `base again` shows the noise: a difference of its "
        "size says nothing. More --pairs and an idle machine make it smaller."
    )
    print_text("MB above base: weights, and the peak memory of a call, above the plain model's.")


def _columns(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return titles and cells of the table of one load, without columns that would be empty."""
    shown = {
        "system": lambda row: row["system"],
        "ms": lambda row: f"{row['ms']['median']:.2f}",
        "ratio [quartiles]": lambda row: _ratio(row["ratio"]),
    }
    if any(row["step_ms"] for row in rows):
        shown["ms a further token"] = lambda row: f"{row['step_ms']['median']:.2f}"
        shown["its ratio [quartiles]"] = lambda row: _ratio(row["step_ratio"])
    shown["MB above base"] = lambda row: f"{row['above_base_mb']:,.1f}"
    return list(shown), [[cell(row) for cell in shown.values()] for row in rows]


def _ratio(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    low, high = found["quartiles"]
    return f"{found['median']:.3f}x [{low:.3f}, {high:.3f}]"
