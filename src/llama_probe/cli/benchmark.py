"""`llama-probe benchmark`."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Annotated

import typer
from rich import box
from transformers.utils import logging

from ..errors import ProbeError
from ..experiments.benchmark import report as benchmark_report
from ..experiments.benchmark.operations import DEVICES
from ..experiments.benchmark.operations import columns as operation_columns
from ..experiments.benchmark.serving_benchmark import ServingBenchmark
from .console import create_console, escape, print_table
from .options import BACKBONE, DTYPE, Fields, Json


_STYLE = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
_BENCHMARK = Fields(
    "Benchmark",
    help={
        "backbone": f"{BACKBONE[:-1]}; with --random-weights also a shape, such as llama-3b.",
        "probes": "A head folder, a Hub id or an alias. Repeatable.",
        "kinds": "A kind of head, with fresh weights. Repeatable. Default, without --probe: pooling, gate and mha.",
        "many": "Number of mha heads to measure together; 0 for none.",
        "tokens": "Tokens of a prompt. Repeatable.",
        "batch_sizes": "Prompts of a batch. Repeatable.",
        "new_tokens": "Tokens to generate. With more than 1, also the time of each.",
        "pairs": "Timed runs of each system, alternating with the plain model.",
        "device": "auto (an accelerator if there is one), cpu, cuda, cuda:1 ...",
        "dtype": DTYPE,
        "naive": "Also measure heads on the tensors of output_hidden_states=True.",
        "guards": "A model that reads each prompt first: a sequence classifier, an encoder-decoder or a causal LM, as a folder "
        "or a Hub id; with --random-weights also t5-large, llama-7b or llama-8b. Repeatable.",
        "random_weights": "Read only the configs of backbone and guards, and draw random weights: the times are the same.",
        "compile": "Run the backbone with torch.compile, with heads and without.",
    },
    names={"probes": "probe", "kinds": "kind", "batch_sizes": "batch-size", "guards": "guard", "compile": "compile"},
)


def benchmark(
    settings: Annotated[ServingBenchmark, _BENCHMARK],
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
    as_json: Json = False,
) -> None:
    """Measure what heads cost while the model serves, next to the plain model."""
    if as_device is not None and not operations:
        raise ProbeError(f"--as {as_device} needs --operations")
    if as_device not in (None, *DEVICES):
        raise ProbeError(f"--as {as_device} must be one of {', '.join(DEVICES)}")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # heads and models warn about random prompts
    try:
        with contextlib.redirect_stdout(sys.stderr):
            report = settings.count_operations(as_device) if operations else settings.execute()
    finally:
        logging.set_verbosity(verbosity)
    if as_json:
        print(json.dumps(report))
        return
    if operations:
        print_table(f"operations of a pass, as on {report['as_device']}", *operation_columns(report["rows"]), **_STYLE)
        return
    for title, rows in benchmark_report.by_load(report).items():
        print_table(title, *benchmark_report.columns(rows), **_STYLE)
    for note in benchmark_report.notes(report):
        create_console().print(escape(note))
