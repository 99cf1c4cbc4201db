"""`llama-probe drift`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np

from ..data.labelled_texts import is_empty
from ..data.prompts import Text, is_text
from ..data.row_files import MAX_TEXT, InputFile
from ..errors import ProbeError
from ..files import JSON, check_writable, make_folder, write_atomically
from .console import print_records, print_values
from .inputs import HeadOptions, ScoredHead
from .options import COUNT, PROBE, Result


_SHOWN = 160  # characters of a text that are printed


def drift(
    *,
    options: HeadOptions,
    probe: Annotated[str, PROBE],
    input: list[str],
    text_column: str = "text",
    output: Path | None = None,
    top: Annotated[int, {"min": 0}] = 20,
    max_rows: Annotated[int, COUNT] = 5000,
    max_text: Annotated[int, COUNT] = MAX_TEXT,
) -> Result:
    """Compare a log of served prompts with the rows that a head was trained on.

    Args:
        input: files of served prompts in their order, or a pattern: jsonl, csv, tsv or parquet.
        output: folder for drift.png: novelty and scores over the log.
        top: rows to name as most worth labelling.
        max_rows: rows to read at most, spread evenly over the log.
    """
    if output is not None:
        check_writable(output, "the plot")
    scored = ScoredHead(probe, options)
    head = scored.head
    reference = (head.results or {}).get("novelty")
    if head.novelty is None or reference is None:
        raise ProbeError(f"{probe} has no novelty to compare with; calibrate --novelty-data fits it")
    # These take seconds to import.
    from ..evaluation.novelty_fit import compare_log
    from ..evaluation.plots import drift_plot, png
    from ..evaluation.prediction import predict_rows

    texts = _texts(input, text_column, max_text)
    places = np.unique(np.linspace(0, len(texts) - 1, min(len(texts), max_rows)).round().astype(int))
    rows = np.array(list(texts))[places].tolist()
    scored.attach()
    logits, novelty, _ = predict_rows(head, scored.dataset([texts[row] for row in rows]))
    report = compare_log(head.config, reference, logits, novelty, top)
    for row in report["worth_labelling"]:
        row["row"] = rows[row["row"]]
        row["text"] = texts[row["row"]]
    if output is not None:
        figure = drift_plot(head.config, logits, novelty, reference)
        make_folder(output)
        write_atomically(output / "drift.png", png(figure))
    return report, partial(_print, probe, report, output)


def _texts(patterns: list[str], text_column: str, max_text: int) -> dict[int, Text]:
    """Return the texts of all files in their order, by the number of their row; rows without one are skipped."""
    texts, rows = dict[int, Text](), 0
    for file in InputFile.find(patterns, max_text):
        file.fields([text_column])  # raises
        for numbers, columns in file.chunks([text_column], 2048):
            column = enumerate(columns[text_column], rows)
            texts |= {row: text for row, text in column if not is_empty(text) and is_text(text)}
            rows += len(numbers)
    if not texts:
        raise ProbeError(f"--input {', '.join(patterns)} holds no texts in the column {text_column!r}")
    return texts


def _print(probe: str, report: JSON, output: Path | None) -> None:
    print_values(f"{probe} on a log", report | {"scores": {}, "worth_labelling": {}})
    deciles = {name: {key: levels[1:10:4] for key, levels in part.items()} for name, part in report["scores"].items()}
    print_records("deciles 10, 50 and 90 % of the scores", deciles)
    rows = [row | {"text": _shorten(row["text"])} for row in report["worth_labelling"]]
    print_records("most worth labelling: new, and unsure", {str(row.pop("row")): row for row in rows}, left=4)
    if output is not None:
        print(f"written: {output / 'drift.png'}")


def _shorten(text: Text) -> str:
    words = " ".join(str(text if isinstance(text, str) else text[-1].get("content")).split())
    return words if len(words) <= _SHOWN else f"{words[:_SHOWN]} ..."
