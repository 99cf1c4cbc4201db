"""`llama-probe benchmark`."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import Annotated, Any, Literal

import typer
from transformers.utils import logging

from ..backbone.loading import backbone_target
from ..errors import ProbeError
from ..experiments.benchmark_options import KINDS, SHAPE, BenchmarkOptions
from ..serving.host import read_heads
from .console import cell, print_table, print_text
from .options import BACKBONE, PROBE, Dtype, Result


def benchmark(
    backbone: Annotated[str, typer.Option(help=f"{BACKBONE[:-1]}; with --random-weights also {SHAPE}.")] = "demo",
    probe: Annotated[list[str] | None, typer.Option(help=f"{PROBE} Repeatable.")] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A kind of head, with fresh weights. Repeatable. Default, without --probe: {', '.join(KINDS)}."
        ),
    ] = None,
    many: Annotated[int, typer.Option(min=0, help="Number of mha heads to measure together; 0 for none.")] = 8,
    tokens: Annotated[list[int], typer.Option(min=1, help="Tokens of a prompt. Repeatable.")] = [64, 512],  # noqa: B006
    batch_size: Annotated[list[int], typer.Option(min=1, help="Prompts of a batch. Repeatable.")] = [1],  # noqa: B006
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to generate. With more than 1, also the time of each.")
    ] = 1,
    pairs: Annotated[
        int, typer.Option(min=1, help="Timed runs of each system, alternating with the plain model.")
    ] = 9,
    device: Annotated[str, typer.Option(help="auto (an accelerator if there is one), cpu, cuda, cuda:1 ...")] = "auto",
    dtype: Dtype = "auto",
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights",
            help="Read only the config of the backbone, and draw random weights: the times are the same.",
        ),
    ] = False,
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
    settings = BenchmarkOptions(
        backbone=backbone,
        probes=probe or (),
        kinds=kind,
        many=many,
        tokens=tokens,
        batch_sizes=batch_size,
        new_tokens=new_tokens,
        pairs=pairs,
        device=device,
        dtype=dtype,
        random_weights=random_weights,
    )
    if probe and not random_weights:  # a shape of random weights is no backbone
        read_heads(probe, backbone_target(backbone))  # raises
    from ..experiments.systems import count_operations, describe_run, load_systems, measure_costs

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
    columns = ("system", "tokens", "prefill", "its ratio", "a further token", "its ratio")
    names = ("system", "tokens", "prefill", "prefill_ratio", "step", "step_ratio")
    rows = [[row[name] for name in names] for row in report["rows"]]
    print_table(f"operations of a pass, as on {report['as_device']}", columns, rows)


def _print_costs(report: dict[str, Any]) -> None:
    settings, backbone, machine = report["settings"], report["backbone"], report["environment"]
    columns = ("system", "ms", "ratio [quartiles]", "ms a further token", "its ratio [quartiles]", "MB above base")
    for (batch, tokens), rows in groupby(report["rows"], key=lambda row: (row["batch_size"], row["tokens"])):
        title = f"batch {batch}, {tokens} tokens, {settings['new_tokens']} new"
        print_table(title, columns, list(map(_cells, rows)))
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


def _cells(row: dict[str, Any]) -> list[object]:
    spreads = (row["ratio"], row["step_ratio"])
    ratio, step_ratio = (spread and cell(spread["median"], spread["quartiles"]) for spread in spreads)
    step = row["step_ms"] and row["step_ms"]["median"]
    return [row["system"], row["ms"]["median"], ratio, step, step_ratio, f"{row['above_base_mb']:,.1f}"]
