"""`llama-probe benchmark`."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from .console import create_console, escape, print_table
from .options import Backbone, Dtype, Json


def benchmark(
    backbone: Backbone = "demo",
    probe: Annotated[
        list[str] | None, typer.Option(help="A head folder, a Hub id or an alias; may be given again.")
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="A kind of head, with fresh weights; may be given again. Without --probe: pooling, gate and mha."
        ),
    ] = None,
    many: Annotated[int, typer.Option(help="So many mha heads at once; 0 leaves them out.")] = 8,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens of a prompt; may be given again. Left out: 64 and 512.")
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Prompts at once; may be given again. Left out: 1.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate; with more than 1, also the time of each.")] = 1,
    pairs: Annotated[int, typer.Option(help="Timed runs of each system, in turn with the plain model.")] = 9,
    warmup: Annotated[int, typer.Option(help="Pairs before them that are not timed.")] = 2,
    device: Annotated[
        str, typer.Option(help="auto (an accelerator where there is one), cpu, cuda, cuda:1 ...")
    ] = "auto",
    dtype: Dtype = "auto",
    naive: Annotated[
        bool, typer.Option(help="Also heads on the tensors that output_hidden_states=True returns.")
    ] = True,
    guard: Annotated[
        list[str] | None,
        typer.Option(
            help="A model that reads each prompt first: a sequence classifier, an encoder-decoder or a causal LM, as a folder "
            "or a Hub id; with --random-weights also t5-large, llama-7b or llama-8b. May be given again."
        ),
    ] = None,
    random_weights: Annotated[
        bool,
        typer.Option(
            help="Read only the configs of backbone and guards, and make weights: the times are the same. --backbone may then "
            "be a shape as well, such as llama-3b."
        ),
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="The backbone by torch.compile, with heads and without.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for benchmark.json and benchmark.png.")] = None,
    markdown: Annotated[bool, typer.Option(help="Print the table as Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Measure what heads cost while the model serves: time, memory and operations, beside the plain model."""
    from transformers.utils import logging

    from ..experiments.benchmark import report as benchmark_report
    from ..experiments.benchmark.serving_benchmark import ServingBenchmark

    benchmark_report.check_output(output)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the prompts are random, which heads and models would remark on
    try:
        with contextlib.redirect_stdout(sys.stderr):
            report = ServingBenchmark(
                backbone=backbone,
                probes=probe or (),
                kinds=kind or None,
                many=many,
                tokens=tokens or ServingBenchmark.tokens,
                batch_sizes=batch_size or ServingBenchmark.batch_sizes,
                new_tokens=new_tokens,
                pairs=pairs,
                warmup=warmup,
                device=device,
                dtype=dtype,
                naive=naive,
                guards=guard or (),
                random_weights=random_weights,
                compile=compile,
            ).execute()
    finally:
        logging.set_verbosity(verbosity)
    written = [] if output is None else benchmark_report.write_benchmark(output, report)
    if as_json:
        print(json.dumps(report))
        return
    if markdown:
        print(benchmark_report.markdown(report))
        return
    console = create_console()
    for title, rows in benchmark_report.by_load(report).items():
        header, lines = benchmark_report.columns(rows)
        shown = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for name in header:
            # In a narrow terminal cells are folded: a number that is cut short would be another one.
            shown.add_column(escape(name), justify="left" if name == "system" else "right", overflow="fold")
        for line in lines:
            shown.add_row(*map(escape, line))
        print_table(shown)
    for note in benchmark_report.notes(report):
        console.print(escape(note))
    for path in written:
        print(f"written: {path}")
