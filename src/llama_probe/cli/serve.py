"""`llama-probe demo`, `generate` and `classify`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from ..errors import ProbeError
from ..serving.halting import HALTING_FORMS, read_halting
from .console import create_console, escape, print_table
from .options import Backbone, Dtype, Json, Probes, PromptColumn


if TYPE_CHECKING:
    from ..heads.configuration import ProbeConfig


Prompts = Annotated[list[str] | None, typer.Argument(help="Prompts; lines of standard input where left out.")]


def demo(
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens a reply.")] = 40,
    as_json: Json = False,
) -> None:
    """Text and labels for a handful of prompts, from one pass each, on a small model that runs on any CPU."""
    from .demo import HEADS, PROMPTS, run_demo

    console = create_console(stderr=as_json)
    console.print(
        f"[bold]llama_probe demo[/bold]: one small chat model replies to {len(PROMPTS)} prompts. While it reads a prompt, two "
        f"probe heads ({', '.join(HEADS)}) look at its hidden states and say what they think of it.\n"
    )
    if not as_json:
        console.print("Preparing the model (the first time it is converted, which takes about half a minute) ...\n")
    rows = []
    for row in run_demo(max_new_tokens):
        rows.append(row)
        if not as_json:
            _print_reply(console, row)
    if as_json:
        print(json.dumps(rows))
        return
    whole, plain = (sum(row[key] for row in rows) for key in ("seconds", "seconds_without_heads"))
    # Of the pairs: a machine that stops for a moment, once, would be most of the sums.
    ratio = statistics.median(row["seconds"] / row["seconds_without_heads"] for row in rows)
    console.print(
        f"All {len(rows)} replies: {whole:.2f} s with both heads, {plain:.2f} s without; a reply takes {ratio:.2f}x in the median. "
        "The texts are the same with and without heads; the labels cost no further pass of the model."
    )


def _print_reply(console: Console, row: dict[str, Any]) -> None:
    verdict = "   ".join(
        f"{name}: {label} ({row['probabilities'][name][label]:.0%})" for name, label in row["labels"].items()
    )
    console.print(
        Panel(
            escape(row["reply"]) or "(empty)",
            title=f"[bold]{escape(row['prompt'])}[/bold]",
            title_align="left",
            subtitle=escape(verdict),
            subtitle_align="left",
        )
    )
    console.print(f"  {row['seconds']:.2f} s with both heads, {row['seconds_without_heads']:.2f} s without\n")


def generate(
    prompts: Prompts = None,
    probe: Probes = ["toxicchat-mha"],  # noqa: B006 - typer copies it
    backbone: Backbone = "demo",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens a reply.")] = 60,
    halt_on: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{HALTING_FORMS}: prompts with that label get no reply, and where the head reads replies these end at a token "
            "with it, the last of so many in a row; may be given again."
        ),
    ] = None,
    halt_reply: Annotated[str | None, typer.Option(help="What halted prompts get in place of a reply.")] = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Reply to prompts, with the labels of each head from the same pass."""
    rows = []
    rules = read_halting(halt_on or [])
    if halt_reply is not None and not rules:
        raise ProbeError("--halt-reply is what halted prompts get, and nothing halts here: give --halt-on as well")
    for model, inputs, tokenizer, texts in _batches(prompts, probe, backbone, dtype, rules=rules):
        halting = {"halt_on": rules, "halt_reply": halt_reply, "tokenizer": tokenizer} if rules else {}
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **halting)
        replies = tokenizer.batch_decode(out.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        part = _rows(texts, out.probe_labels, out.probe_probabilities, replies)
        for name in set(out.probe_token_logits or {}) - set(out.probe_logits):
            _add_reply_scores(part, name, out.probe_token_logits[name], model.probes[name].config)
        for row, halt in zip(part, out.probe_halts or [None] * len(part), strict=True):
            if rules:
                row["halted"] = None if halt is None else dataclasses.asdict(halt)
        rows += part
    _print_rows(rows, {name: model.probes[name].config for name in rows[0]["labels"]}, as_json)


def classify(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="Prompts; lines of standard input where left out. With --input: further files."),
    ] = None,
    probe: Probes = ["toxicchat-mha"],  # noqa: B006 - typer copies it
    backbone: Backbone = "demo",
    input: Annotated[
        list[str] | None,
        typer.Option(help="Files of rows, or a pattern: parquet, jsonl, csv or tsv, all but parquet also with .gz."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the labels of the rows of --input.")] = None,
    text_column: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    prompt_column: PromptColumn = None,
    keep_column: Annotated[
        list[str] | None, typer.Option(help="A column of the input to keep in the output; may be given again.")
    ] = None,
    chunk_rows: Annotated[int, typer.Option(help="Rows that are held at a time, and in a file of the output.")] = 2048,
    resume: Annotated[bool, typer.Option(help="Go on with a job that was stopped.")] = False,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Label prompts, or the rows of files (--input), without replying.

    With --input the rows of any number of files are read a chunk at a time, and each chunk becomes a parquet file in
    --output. What is done is not done again with --resume. Under torchrun the processes divide the chunks.
    """
    if input or output is not None:
        job = {
            "text_column": text_column,
            "prompt_column": prompt_column,
            "keep_columns": keep_column or [],
            "chunk_rows": chunk_rows,
            "resume": resume,
        }
        _score_files([*(input or []), *(prompts or [])], output, probe, backbone, dtype, as_json, job)
        return
    from ..distributed import launched

    if launched():
        raise ProbeError("prompts are labelled in one process: start it without torchrun, or give files with --input")
    rows = []
    for model, inputs, _, texts in _batches(prompts, probe, backbone, dtype, replies=False):
        found = model.classify(**inputs)
        labels = {name: output.labels for name, output in found.items()}
        rows += _rows(texts, labels, {name: output.probabilities for name, output in found.items()})
    _print_rows(rows, {name: model.probes[name].config for name in rows[0]["labels"]}, as_json)


def _score_files(
    inputs: list[str],
    output: Path | None,
    probes: list[str],
    backbone: str,
    dtype: str,
    as_json: bool,
    job: dict[str, Any],
) -> None:
    from ..distributed import is_main, process_group
    from ..evaluation.scoring_job import MANIFEST_NAME, ScoringJob

    if not inputs or output is None:
        raise ProbeError("--input and --output go together: files of rows, and a folder for their labels")
    with process_group():
        with contextlib.redirect_stdout(sys.stderr):
            done = ScoringJob(inputs, output, probes, backbone, dtype=dtype, **job).execute()
        if is_main():
            told = (
                f"{done['rows']:,} rows in {len(done['parts'])} files in {output}; {MANIFEST_NAME} says what is where"
            )
            print(json.dumps(done) if as_json else told)


def _batches(
    prompts: list[str] | None,
    probes: list[str],
    backbone: str,
    dtype: str,
    replies: bool = True,
    rules: dict[str, dict[str, Any]] | None = None,
    size: int = 8,
):
    from ..backbone.loading import backbone_target, load_backbone
    from ..data.prompts import PromptFormat, check_alike
    from ..serving.auto import AutoModelForProbedGeneration
    from ..serving.halting import Halter
    from ..serving.sources import read_heads

    if not prompts and sys.stdin.isatty():
        print("prompts, one a line, then Ctrl-D:", file=sys.stderr)
    try:
        texts = prompts or [line.strip() for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as error:
        raise ProbeError(f"standard input is not in {error.encoding}: {error}") from None
    if not texts:
        raise ProbeError("there is no prompt: give some, or lines on standard input")
    heads = read_heads(probes, backbone_target(backbone))
    check_alike({name: head.config for name, head in heads.items()})
    reading = [name for name, head in heads.items() if head.config.token_scope == "response"]
    if reading and not replies:
        raise ProbeError(
            f"{reading[0]!r} reads replies, and here are prompts alone: give files of both (--input with --prompt-column), or "
            "let llama-probe generate write the replies"
        )
    if rules:  # what generate() would raise when the LM is loaded
        Halter(rules, {name: head.config for name, head in heads.items()})
    with contextlib.redirect_stdout(sys.stderr):
        lm, tokenizer = load_backbone(backbone, dtype)
        model = AutoModelForProbedGeneration.from_causal_lm(lm, heads)
    first = next(iter(heads.values())).config
    prompt_format = PromptFormat.from_config(first, tokenizer)
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        yield model, {key: value.to(model.device) for key, value in prompt_format.batch(part).items()}, tokenizer, part


def _rows(
    texts, labels: dict[str, list], probabilities: dict[str, Any], replies: list[str] | None = None
) -> list[dict]:
    rows = []
    for i, text in enumerate(texts):
        row = {"prompt": text}
        if replies is not None:
            row["reply"] = replies[i]
        row["labels"] = {name: values[i] for name, values in labels.items()}
        row["probabilities"] = {name: values[i].tolist() for name, values in probabilities.items()}
        rows.append(row)
    return rows


def _add_reply_scores(rows: list[dict], name: str, logits, config) -> None:
    """What a head that reads nothing but replies says of each; nothing where no token of it was read."""
    from ..heads.decision import reply_outputs

    for row, output in zip(rows, reply_outputs(logits, config), strict=True):
        row["labels"][name] = None if output is None else output.labels[0]
        row["probabilities"][name] = [] if output is None else output.probabilities[0].tolist()


def _print_rows(rows: list[dict], configs: dict[str, ProbeConfig], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows))
        return
    from ..heads.decision import in_words

    replies = "reply" in rows[0]
    table = Table("prompt", *(["reply"] if replies else []), *map(escape, configs), show_lines=replies)
    for row in rows:
        cells = []
        for name, config in configs.items():
            scores = dict(zip(config.id2label.values(), row["probabilities"][name], strict=False))
            cells.append(escape(in_words(row["labels"][name], scores, config)) if scores else "-")
        table.add_row(escape(row["prompt"]), *([_shown_reply(row)] if replies else []), *cells)
    print_table(table)


def _shown_reply(row: dict) -> str:
    return ("[bold]halted[/bold] " if row.get("halted") else "") + escape(row["reply"])
