"""`llama-probe drift`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..data.prompts import is_text
from ..data.row_files import MAX_TEXT, InputFile
from ..errors import ProbeError
from ..files import check_writable, make_folder, write_atomically
from ..heads.novelty import FAR
from .console import print_records, print_table, print_text
from .inputs import ScoredHead
from .options import Dtype, HeadsBackbone, MaxText, Probe, Result, TextColumn, TrustRemoteCode


_SHOWN = 160  # characters of a text that are printed


def drift(
    probe: Probe,
    input: Annotated[
        list[str],
        typer.Option(help="Files of served prompts in their order, or a pattern: jsonl, csv, tsv or parquet."),
    ],
    backbone: HeadsBackbone = None,
    text_column: TextColumn = "text",
    output: Annotated[Path | None, typer.Option(help="Folder for drift.png: novelty and scores over the log.")] = None,
    top: Annotated[int, typer.Option(min=0, help="Rows to name as most worth labelling.")] = 20,
    max_rows: Annotated[int, typer.Option(min=1, help="Rows to read at most, spread evenly over the log.")] = 5000,
    max_text: MaxText = MAX_TEXT,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Compare a log of served prompts with the rows that a head was trained on."""
    if output is not None:
        check_writable(output, "the plot")
    scored = ScoredHead(probe, backbone, dtype, trust_remote_code)
    head = scored.head
    reference = (head.results or {}).get("novelty")
    if head.novelty is None or reference is None:
        raise ProbeError(f"{probe} has no novelty to compare with; calibrate --novelty-data fits it")
    # These take seconds to import.
    from ..evaluation.novelty_fit import compare_log
    from ..evaluation.plots import drift_plot, png_writer
    from ..evaluation.prediction import predict_rows

    texts = _texts(input, text_column, max_text)
    rows = np.unique(np.linspace(0, len(texts) - 1, min(len(texts), max_rows)).round().astype(int)).tolist()
    scored.attach()
    logits, novelty = predict_rows(head, scored.dataset([texts[row] for row in rows]), progress=True)
    found = compare_log(head.config, reference, logits, novelty, top)
    for row in found["worth_labelling"]:
        row["row"] = rows[row["row"]]
        row["text"] = texts[row["row"]]
    if output is not None:
        figure = drift_plot(head.config, logits, novelty, reference)
        make_folder(output)
        write_atomically({output / "drift.png": png_writer(lambda: figure)})
    return found, partial(_print, probe, found, output)


def _texts(patterns: list[str], text_column: str, max_text: int) -> list[Any]:
    """Return the texts of all files in their order; rows without one are skipped."""
    texts: list[Any] = []
    for file in InputFile.find(patterns, max_text):
        if text_column not in (fields := file.fields()):
            raise ProbeError(f"{file.path} has no column {text_column!r}; it has: {', '.join(fields) or 'none'}")
        for chunk in file.chunks([text_column], 2048, lambda _number: True):
            texts += [text for text in chunk.columns[text_column] if text and is_text(text)]
    if not texts:
        raise ProbeError(f"--input {', '.join(patterns)} holds no texts in the column {text_column!r}")
    return texts


def _print(probe: str, found: dict[str, Any], output: Path | None) -> None:
    novelty, (low, high) = found["novelty"], found["novelty"]["interval"]
    print_text(
        f"{found['rows']:,} prompts. Novelty above {FAR}: {novelty['far']:.1%} (95 % interval {low:.1%} to {high:.1%}; "
        f"1.0% of the validation rows). Median {novelty['median']:.2f} (0.50)."
    )
    print_records(
        f"labels that {probe} gives: share in the log, and the one that was expected", found.get("labels", {})
    )
    deciles = {
        name: {"log": part["found"][1:10:4], "expected": part["expected"][1:10:4]}
        for name, part in found["scores"].items()
    }
    print_records("deciles 10, 50 and 90 % of the scores", deciles)
    rows = [(row["row"], row["novelty"], row["unsure"], _shorten(row["text"])) for row in found["worth_labelling"]]
    print_table("most worth labelling: new, and unsure", ("row", "novelty", "unsure", "text"), rows, left=4)
    if output is not None:
        print(f"written: {output / 'drift.png'}")


def _shorten(text: str | list[dict[str, Any]]) -> str:
    words = " ".join(str(text if isinstance(text, str) else text[-1]["content"]).split())
    return words if len(words) <= _SHOWN else f"{words[:_SHOWN]} ..."
