"""`llama-probe generate` and `llama-probe classify`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

from ..data.prompts import PromptFormat, check_alike
from ..data.row_files import MAX_TEXT
from ..distributed import is_main, launched
from ..errors import ProbeError
from ..files import JSON
from ..heads.configuration import ProbeConfig
from ..heads.decision import in_words
from ..heads.novelty import abstain_levels
from ..heads.probe import ProbeModel
from ..vllm.halting_words import read_halting
from .console import print_marked, print_table, print_text
from .inputs import HeadOptions
from .options import COUNT, PROBE, Result


_BATCH = 8  # prompts of a pass
_MAX_CELL = 300  # characters of a prompt in a table


def generate(
    prompts: list[str] | None = None,
    /,
    *,
    loading: HeadOptions,
    probe: Annotated[list[str], PROBE] = ("safety",),
    max_new_tokens: Annotated[int, COUNT] = 60,
    halt_on: list[str] | None = None,
    halt_reply: str | None = None,
    abstain_at: float | None = None,
) -> Result:
    """Reply to prompts, with the labels of each head from the same pass.

    Args:
        halt_on: write HEAD[:LABEL[:THRESHOLD]] or HEAD={"label": ..., "threshold": 0.6, "patience": 2}: prompts with that
            label get no reply. A head that reads replies ends a reply at the last of `patience` tokens in a row with the label.
        halt_reply: the reply to halted prompts.
    """
    rules = read_halting(halt_on or [])
    if halt_reply is not None and not rules:
        raise ProbeError("--halt-reply needs --halt-on: nothing halts without it")
    texts = _read_prompts(prompts)
    heads = loading.read(probe)
    configs = _configs_of(heads, abstain_at)
    check_alike(configs)
    if rules:
        from ..serving.halting import Halter  # takes seconds to import

        for rule in Halter(rules, configs).rules:
            print_text(str(rule))
    model, tokenizer = loading.attach(heads, probe[0])
    # A prompt that gets a reply is not cut, and is a turn of the user if any head reads such turns.
    config = min(configs.values(), key=lambda config: config.token_scope == "tool").replace(max_length=None)
    prompt_format = PromptFormat.from_config(config, tokenizer)
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "abstain_at": abstain_at}
    settings |= {"halt_on": rules or None, "halt_reply": halt_reply, "tokenizer": tokenizer}
    rows = []
    for start in range(0, len(texts), _BATCH):
        part = texts[start : start + _BATCH]
        inputs = {key: value.to(model.device) for key, value in prompt_format.batch(part).items()}
        out = model.generate(**inputs, **settings)
        for text, reply, record in zip(part, out.texts, out.describe(len(part)), strict=True):
            rows.append({"prompt": text, **record, "reply": reply})
    return rows, partial(print_rows, rows)


def _configs_of(heads: dict[str, ProbeModel], abstain_at: float | None) -> dict[str, ProbeConfig]:
    """Return the configs of heads. Raise `ProbeError` if `abstain_at` does not suit them."""
    configs = {name: head.config for name, head in heads.items()}
    abstain_levels(abstain_at, configs)
    return configs


def classify(
    prompts: list[str] | None = None,
    /,
    *,
    loading: HeadOptions,
    probe: Annotated[list[str], PROBE] = ("safety",),
    input: list[str] | None = None,
    output: Path | None = None,
    text_column: str = "text",
    prompt_column: str | None = None,
    keep_column: list[str] | None = None,
    chunk_rows: Annotated[int, COUNT] = 2048,
    resume: bool = False,
    max_text: Annotated[int, COUNT] = MAX_TEXT,
    max_length: Annotated[int | None, COUNT] = None,
    abstain_at: float | None = None,
    spans: bool = False,
) -> Result:
    """Label prompts, or the rows of files (--input), without a reply.

    With --input the rows of any number of files are read a chunk at a time, and each chunk becomes a parquet file in
    --output. --resume keeps the finished chunks. Under torchrun the processes divide the chunks.

    Args:
        prompts: prompts. Default: lines of standard input. With --input: further files.
        input: files of rows, or a pattern: parquet, jsonl, csv or tsv; all but parquet also with .gz.
        output: folder for the labels of the rows of --input.
        keep_column: a column of the input to keep in the output.
        chunk_rows: rows in memory at a time, and in each output file.
        resume: resume a job that was stopped.
        max_text: characters of the longest text of --input; a chunk may have 64 times as many.
        spans: also give the passage in which a head with windows found each flagged label.
    """
    if input or output is not None:
        if abstain_at is not None:
            raise ProbeError(f"--abstain-at {abstain_at} is for prompts, not for --input")
        files = [*(input or []), *(prompts or [])]
        if not files or output is None:
            raise ProbeError("--input and --output go together: files of rows, and a folder for their labels")
        from ..evaluation.scoring_job import MANIFEST_NAME, ScoringJob  # needs pyarrow

        done = ScoringJob(
            files, output, probe, loading.backbone_of(probe[0]), text_column, prompt_column, keep_column or [],
            chunk_rows, loading.dtype, resume, max_text, max_length, passages=spans,
        ).execute()  # fmt: skip
        if not is_main():
            return None
        summary = f"{done['rows']:,} rows in {len(done['parts'])} files in {output}; {MANIFEST_NAME} lists them"
        return done, partial(print, summary)
    if launched():
        raise ProbeError("prompts are labelled in one process: start it without torchrun, or give files with --input")
    texts = _read_prompts(prompts)
    heads = loading.read(probe)
    configs = _configs_of(heads, abstain_at)
    for name, config in configs.items():
        if config.reads_reply:
            raise ProbeError(f"{name!r} reads replies: give such rows (--input, --prompt-column), or use generate")
    if spans:
        from ..serving.passages import check_finds_passages  # takes seconds to import

        check_finds_passages(configs)
    model, tokenizer = loading.attach(heads, probe[0])
    settings = {"abstain_at": abstain_at, "max_length": max_length, "passages": spans}
    outputs = model.classify(texts, tokenizer=tokenizer, **settings)
    described = {name: output.describe() for name, output in outputs.items()}
    rows = [
        {"prompt": text, "probes": {name: each[row] for name, each in described.items()}}
        for row, text in enumerate(texts)
    ]
    return rows, partial(print_rows, rows)


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


def print_rows(rows: list[JSON]) -> None:
    """Print a table of prompts, replies if there are any, and the prediction of each head; below it the passages, if there are any."""
    has_replies = "reply" in rows[0]
    columns = ["prompt", *(["reply"] if has_replies else []), *rows[0]["probes"]]
    lines = []
    for row in rows:
        prompt = row["prompt"]
        cells = [prompt if len(prompt) <= _MAX_CELL else prompt[:_MAX_CELL] + "…"]
        if has_replies:
            cells.append(f"halted: {row['reply']}" if row.get("halted") else row["reply"])
        for prediction in row["probes"].values():
            cells.append("-" if prediction is None else in_words(prediction))
        lines.append(cells)
    print_table(None, columns, lines, left=len(columns), show_lines=has_replies)
    for number, row in enumerate(rows, 1):
        for head, prediction in row["probes"].items():
            for passage in (prediction or {}).get("passages", ()):
                title = f"{head}: {passage['label']}"
                print_passage(title if len(rows) == 1 else f"prompt {number}: {title}", row["prompt"], passage)


def print_passage(title: str, text: str, passage: JSON) -> None:
    """Print a passage within its text, or alone if it is not of the text."""
    if passage["start"] is None:
        print_marked(f"{title}, in the chat template", passage["text"], 0, len(passage["text"]))
    else:
        place = f"characters {passage['start']:,} to {passage['end']:,}"
        print_marked(f"{title}, {place}", text, passage["start"], passage["end"])
