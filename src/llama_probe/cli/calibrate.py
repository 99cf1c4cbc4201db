"""`llama-probe calibrate`."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import numpy as np
import typer

from ..data.row_files import MAX_TEXT
from ..data.row_sources import ROWS_HELP
from ..distributed import is_main, process_group
from ..errors import ProbeError
from ..files import short_path
from ..heads.novelty import MAX_ROWS, MIN_ROWS, novelty_layers
from .console import print_table, print_text
from .inputs import ScoredHead, check_head_folder, read_texts
from .options import DataDir, Dtype, HeadsBackbone, MaxText, PromptColumn, Result, TextColumn, TrustRemoteCode


def calibrate(
    probe: Annotated[str, typer.Option(help="A head folder. Its thresholds, or its novelty, are replaced.")],
    backbone: HeadsBackbone = None,
    benign: Annotated[
        list[str] | None,
        typer.Option(help=f"Rows to flag seldom; they need no label column: {ROWS_HELP}. Repeatable."),
    ] = None,
    rate: Annotated[
        list[float],
        typer.Option(
            help="Share of these rows that may be flagged. The first gives the head's own threshold. Repeatable."
        ),
    ] = [0.02, 0.005],  # noqa: B006 - typer copies it
    flag: Annotated[
        str | None,
        typer.Option(
            help="Label that the thresholds are for. Default: the one that the head flags. It is saved with the head."
        ),
    ] = None,
    novelty_data: Annotated[
        list[str] | None,
        typer.Option(
            help="Rows that the head was trained on, to fit how unlike them a prompt is; they need no label column. Repeatable."
        ),
    ] = None,
    novelty_validation: Annotated[
        list[str] | None,
        typer.Option(help="Further rows of that kind, to calibrate novelty on. Default: a quarter of --novelty-data."),
    ] = None,
    max_rows: Annotated[
        int,
        typer.Option(min=MIN_ROWS, help="Rows of each --novelty-data and --novelty-validation at most, at random."),
    ] = MAX_ROWS,
    text_column: TextColumn = "text",
    prompt_column: PromptColumn = None,
    data_dir: DataDir = None,
    max_text: MaxText = MAX_TEXT,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Fit thresholds of a head on rows that it should rarely flag, or its novelty: how unlike its training data a prompt is."""
    check_head_folder(probe, "calibrate")
    if not benign and not novelty_data:
        raise ProbeError("calibrate needs rows: give --benign for thresholds, or --novelty-data")
    if novelty_validation and not novelty_data:
        raise ProbeError(f"--novelty-validation {novelty_validation[0]} needs --novelty-data")
    if flag is not None and not benign:
        raise ProbeError(f"--flag {flag} needs --benign, rows to fit its thresholds on")
    with process_group():
        scored = ScoredHead(probe, backbone, dtype, trust_remote_code)
        head, place = scored.head, {"text_column": text_column, "data_dir": data_dir, "max_text": max_text}
        place["prompt_column"] = prompt_column
        # These take seconds to import.
        from ..evaluation.calibration import check_rates, with_rates
        from ..evaluation.novelty_fit import fit_novelty
        from ..evaluation.prediction import predict_logits

        if novelty_data:
            novelty_layers(head.config)
        if flag is not None:
            head.config = head.config.replace(flagged=[flag], threshold=None, thresholds=None)
        if benign:
            head.config.need_flagged_index("--benign")
            check_rates(head.config, rate)

        def read(sources: list[str] | None, split: str, limit: int | None = max_rows) -> list:
            each = (read_texts(source, head.config, limit, split=split, **place) for source in sources or ())
            return [text for texts in each for text in texts]

        train, validation = read(novelty_data, "train"), read(novelty_validation, "validation")
        texts = read(benign, "test", None)
        if benign:
            check_rates(head.config, rate, len(texts))
        scored.attach()
        found, later = {}, {}
        if benign:
            head.config = with_rates(head.config, predict_logits(head, scored.dataset(texts), progress=True), rate)
            later["thresholds_from"] = {
                "flagged": head.config.flagged[0],
                "sources": list(map(short_path, benign)),
                "rows": len(texts),
                "rates": dict(zip(head.config.thresholds, rate, strict=True)),
            }
            found |= later["thresholds_from"]
            found |= {"threshold": head.config.threshold, "thresholds": head.config.thresholds}
        if novelty_data:
            if not validation:
                held = set(np.random.default_rng(0).permutation(len(train))[: len(train) // 4].tolist())
                validation = [text for row, text in enumerate(train) if row in held]
                train = [text for row, text in enumerate(train) if row not in held]
            fitted = fit_novelty(head, scored.dataset(train), scored.dataset(validation), progress=True)
            sources = list(map(short_path, (*novelty_data, *(novelty_validation or ()))))
            found["novelty"] = later["novelty"] = {"sources": sources, **fitted}
        if not is_main():
            return None
        head.results = (head.results or {}) | later
        head.save_pretrained(probe)
    return found, partial(_print, probe, found)


def _print(probe: str, found: dict[str, Any]) -> None:
    if "novelty" in found:
        counts = found["novelty"]["rows"]
        print_text(f"{probe}: novelty fitted on {counts['train']:,} rows, calibrated on {counts['validation']:,}")
    if "thresholds" in found:
        label = found["flagged"]
        title = f"{probe} on {found['rows']:,} rows that it should not flag"
        print_table(title, ("threshold", f"{label} from a probability of"), list(found["thresholds"].items()))
