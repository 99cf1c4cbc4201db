"""`llama-probe generate` and `llama-probe classify`."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ..backbone.loading import backbone_target, load_backbone
from ..data.files import MAX_TEXT
from ..data.prompts import PromptFormat, check_alike
from ..distributed import is_main, launched, process_group
from ..errors import ProbeError
from ..heads.decision import in_words, reply_outputs
from ..heads.novelty import abstain_levels
from ..heads.probe import ProbeModel
from ..hub.transport import HubOptions
from ..serving.halting_words import read_halting
from ..serving.sources import read_heads
from .console import print_table, printable
from .options import AbstainAt, Dtype, HeadsBackbone, Probes, Result, TrustRemoteCode, backbone_of
from .rows import PromptColumn, TextColumn


_BATCH = 8  # prompts of a pass


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts. Default: lines of standard input.")] = None,
    probe: Probes = ["safety"],  # noqa: B006 - typer copies it
    backbone: HeadsBackbone = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each reply.")] = 60,
    halt_on: Annotated[
        list[str] | None,
        typer.Option(
            help='HEAD[:LABEL[:THRESHOLD]] or HEAD={"label": ..., "threshold": 0.6, "patience": 2}: prompts with that label get '
            "no reply. A head that reads replies ends a reply at the last of `patience` tokens in a row with that label. Repeatable."
        ),
    ] = None,
    halt_reply: Annotated[str | None, typer.Option(help="The reply to halted prompts.")] = None,
    abstain_at: AbstainAt = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Reply to prompts, with the labels of each head from the same pass."""
    rules = read_halting(halt_on or [])
    if halt_reply is not None and not rules:
        raise ProbeError("--halt-reply needs --halt-on: nothing halts without it")
    texts, backbone = _read_prompts(prompts), backbone_of(probe[0], backbone)
    model, tokenizer = _load(probe, backbone, dtype, trust_remote_code, rules=rules, abstain_at=abstain_at)
    config = next(iter(model.probes.values())).config
    # A prompt that gets a reply stays whole.
    prompt_format = PromptFormat.from_config(config.replace(max_length=None), tokenizer)
    halting = {"halt_on": rules, "halt_reply": halt_reply, "tokenizer": tokenizer} if rules else {}
    rows = []
    for start in range(0, len(texts), _BATCH):
        part = texts[start : start + _BATCH]
        inputs = {key: value.to(model.device) for key, value in prompt_format.batch(part).items()}
        out = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, abstain_at=abstain_at, **halting
        )
        replies = tokenizer.batch_decode(out.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found = _rows(part, out.probe_labels, out.probe_probabilities, out.probe_novelty, replies)
        for name in set(out.probe_token_logits or {}) - set(out.probe_logits):
            _add_reply_scores(found, name, out.probe_token_logits[name], model.probes[name].config)
        if rules:
            for row, halt in zip(found, out.probe_halts, strict=True):
                row["halted"] = None if halt is None else dataclasses.asdict(halt)
        rows += found
    return rows, partial(_print_rows, rows, model)


def classify(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="Prompts. Default: lines of standard input. With --input: further files."),
    ] = None,
    probe: Probes = ["safety"],  # noqa: B006 - typer copies it
    backbone: HeadsBackbone = None,
    input: Annotated[
        list[str] | None,
        typer.Option(help="Files of rows, or a pattern: parquet, jsonl, csv or tsv; all but parquet also with .gz."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the labels of the rows of --input.")] = None,
    text_column: TextColumn = "text",
    prompt_column: PromptColumn = None,
    keep_column: Annotated[
        list[str] | None, typer.Option(help="A column of the input to keep in the output. Repeatable.")
    ] = None,
    abstain_at: AbstainAt = None,
    chunk_rows: Annotated[int, typer.Option(min=1, help="Rows in memory at a time, and in each output file.")] = 2048,
    resume: Annotated[bool, typer.Option(help="Resume a job that was stopped.")] = False,
    max_text: Annotated[
        int, typer.Option(min=1, help="Characters of the longest text of --input; a chunk may have 64 times as many.")
    ] = MAX_TEXT,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Label prompts, or the rows of files (--input), without a reply.

    With --input the rows of any number of files are read a chunk at a time, and each chunk becomes a parquet file in
    --output. --resume keeps the finished chunks. Under torchrun the processes divide the chunks.
    """
    if input or output is not None:
        if abstain_at is not None:
            raise ProbeError(f"--abstain-at {abstain_at} is for prompts, not for --input")
        files = [*(input or []), *(prompts or [])]
        if not files or output is None:
            raise ProbeError("--input and --output go together: files of rows, and a folder for their labels")
        backbone = backbone_of(probe[0], backbone)
        settings = {"text_column": text_column, "prompt_column": prompt_column, "keep_columns": keep_column or []}
        settings |= {"chunk_rows": chunk_rows, "resume": resume, "dtype": dtype, "max_text": max_text}
        probes = _read_heads(probe, backbone, True) if trust_remote_code else probe
        from ..evaluation.scoring_job import MANIFEST_NAME, ScoringJob  # needs pyarrow

        with process_group():
            done = ScoringJob(files, output, probes, backbone, **settings).execute()
            if not is_main():
                return None
        summary = f"{done['rows']:,} rows in {len(done['parts'])} files in {output}; {MANIFEST_NAME} lists them"
        return done, partial(print, summary)
    if launched():
        raise ProbeError("prompts are labelled in one process: start it without torchrun, or give files with --input")
    texts, backbone = _read_prompts(prompts), backbone_of(probe[0], backbone)
    model, tokenizer = _load(probe, backbone, dtype, trust_remote_code, replies=False, abstain_at=abstain_at)
    found = model.classify(texts, tokenizer=tokenizer, abstain_at=abstain_at)
    labels = {name: output.labels for name, output in found.items()}
    novelty = {name: output.novelty for name, output in found.items() if output.novelty is not None}
    probabilities = {name: output.probabilities for name, output in found.items()}
    rows = _rows(texts, labels, probabilities, novelty)
    return rows, partial(_print_rows, rows, model)


def _read_prompts(prompts: list[str] | None) -> list[str]:
    if not prompts and sys.stdin.isatty():
        print("prompts, one a line, then Ctrl-D:", file=sys.stderr)
    try:
        texts = prompts or [line.strip() for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as error:
        raise ProbeError(f"standard input is not in {error.encoding}: {error}") from None
    if not texts:
        raise ProbeError("there is no prompt: give some as arguments, or as lines of standard input")
    return texts


def _read_heads(probes: list[str], backbone: str, trust_remote_code: bool) -> dict[str, ProbeModel]:
    return read_heads(probes, backbone_target(backbone), HubOptions(trust_remote_code=trust_remote_code))


def _load(
    probes: list[str],
    backbone: str,
    dtype: str,
    trust_remote_code: bool,
    replies: bool = True,
    rules: dict[str, dict[str, Any]] | None = None,
    abstain_at: float | None = None,
) -> tuple[Any, Any]:
    """Check the heads and the halting rules, then load the backbone with them, and its tokenizer."""
    heads = _read_heads(probes, backbone, trust_remote_code)
    configs = {name: head.config for name, head in heads.items()}
    if replies:
        check_alike(configs)
    abstain_levels(abstain_at, configs)
    followers = [name for name, config in configs.items() if config.token_scope == "response"]
    if followers and not replies:
        raise ProbeError(
            f"{followers[0]!r} reads replies: give files of prompts and replies (--input with --prompt-column), or use generate"
        )
    if rules:
        from ..serving.halting import Halter

        Halter(rules, configs)
    from ..serving.auto import AutoModelForProbedGeneration

    lm, tokenizer = load_backbone(backbone, dtype)
    return AutoModelForProbedGeneration.from_causal_lm(lm, heads), tokenizer


def _rows(
    texts: list[str],
    labels: dict[str, list],
    probabilities: dict[str, Any],
    novelty: dict[str, Any] | None = None,
    replies: list[str] | None = None,
) -> list[dict]:
    rows = []
    for i, text in enumerate(texts):
        row = {"prompt": text} | ({} if replies is None else {"reply": replies[i]})
        row["labels"] = {name: values[i] for name, values in labels.items()}
        row["probabilities"] = {name: values[i].tolist() for name, values in probabilities.items()}
        if novelty:
            row["novelty"] = {name: float(values[i]) for name, values in novelty.items()}
        rows.append(row)
    return rows


def _add_reply_scores(rows: list[dict], name: str, logits: Any, config: Any) -> None:
    """Add the scores of a head that reads replies only; no scores if it read no token."""
    for row, output in zip(rows, reply_outputs(logits, config), strict=True):
        row["labels"][name] = None if output is None else output.labels[0]
        row["probabilities"][name] = [] if output is None else output.probabilities[0].tolist()


def _print_rows(rows: list[dict], model: Any) -> None:
    replies, heads = "reply" in rows[0], list(rows[0]["labels"])
    lines = []
    for row in rows:
        cells: list[str | Text] = [row["prompt"]]
        if replies:
            halted = ("halted ", "bold") if row.get("halted") else ""
            cells.append(Text.assemble(halted, printable(row["reply"])))
        for name in heads:
            config = model.probes[name].config
            scores = dict(zip(config.id2label.values(), row["probabilities"][name], strict=False))
            cells.append(in_words(row["labels"][name], scores, config) if scores else "-")
        lines.append(cells)
    columns = ("prompt", *(["reply"] if replies else []), *heads)
    print_table(None, columns, lines, left=len(columns), show_lines=replies)
