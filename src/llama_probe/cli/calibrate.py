"""`llama-probe calibrate`."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ..backbone.loading import backbone_target, load_backbone
from ..data.files import MAX_TEXT
from ..data.prompts import PromptFormat
from ..data.states import PromptDataset
from ..distributed import is_main, process_group
from ..errors import ProbeError
from ..evaluation.novelty import MAX_ROWS, MIN_ROWS, fit_novelty
from ..heads.configuration import ProbeConfig
from ..heads.match import check_backbone
from ..heads.novelty import novelty_layers
from ..heads.probe import ProbeModel
from ..hub.resolve import resolve_head
from .console import create_console, escape, print_table
from .options import Dtype, HeadsBackbone, Json, TrustRemoteCode, backbone_of
from .rows import DATA, ROWS_HELP, LabelledRows, TextColumn, check_head_folder, read_texts, short_name


def calibrate(
    probe: Annotated[str, typer.Option(help="A head folder. Its thresholds, or its novelty, are replaced.")],
    benign: Annotated[
        list[str] | None, typer.Option(help=f"Rows to flag seldom; they need no label column: {DATA}. Repeatable.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Labelled rows; those with the first label count as well.")] = None,
    rate: Annotated[
        list[float],
        typer.Option(
            help="Share of these rows that may be flagged. The first one's threshold is the head's. Repeatable."
        ),
    ] = [0.02, 0.005],  # noqa: B006 - typer copies it
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
    label_column: Annotated[str, typer.Option(help=ROWS_HELP["label_column"])] = "label",
    data_dir: Annotated[Path | None, typer.Option(help=ROWS_HELP["data_dir"])] = None,
    max_text: Annotated[int, typer.Option(min=1, help=ROWS_HELP["max_text"])] = MAX_TEXT,
    backbone: HeadsBackbone = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Fit thresholds of a head on rows that it should flag seldom, or how unlike its training data a prompt is."""
    check_head_folder(probe, "calibrate")
    thresholds = bool(benign) or data is not None
    if not thresholds and not novelty_data:
        raise ProbeError("calibrate needs rows: give --benign or --data for thresholds, or --novelty-data")
    if novelty_validation and not novelty_data:
        raise ProbeError(f"--novelty-validation {novelty_validation[0]} needs --novelty-data")
    backbone = backbone_of(probe, backbone)
    # These take seconds to import.
    from ..evaluation.calibration import check_rates, with_rates
    from ..evaluation.report import predict_logits

    with process_group(), contextlib.redirect_stdout(sys.stderr):
        head = ProbeModel.from_pretrained(
            resolve_head(probe, backbone_target(backbone)), trust_remote_code=trust_remote_code
        )
        if novelty_data:
            novelty_layers(head.config)
        if thresholds:
            check_rates(head.config, rate)
        shared = {"text_column": text_column, "data_dir": data_dir, "max_text": max_text}
        given = {"train": novelty_data or [], "validation": novelty_validation or []}
        rows = {
            split: [
                text
                for source in sources
                for text in read_texts(source, head.config, split=split, limit=max_rows, **shared)
            ]
            for split, sources in given.items()
        }
        parts = [LabelledRows(source, benign=True, **shared) for source in benign or ()]
        if data is not None:
            parts.append(LabelledRows(data, label_column=label_column, **shared))
        texts = [text for part in parts for text in _harmless(part, head.config)]
        if thresholds:
            check_rates(head.config, rate, len(texts))
        lm, tokenizer = load_backbone(backbone, dtype)
        check_backbone(probe, head.config, lm)
        head.to(lm.device).set_backbone(lm)
        prompts = PromptFormat.from_config(head.config, tokenizer)

        def dataset(texts: list) -> PromptDataset:
            ids, masks, _ = prompts.encode_for(head.config, texts)
            return PromptDataset(ids, np.zeros(len(texts)), masks)

        found, later = {}, {}
        if thresholds:
            head.config = with_rates(head.config, predict_logits(head, dataset(texts), progress=True), rate)
            later["thresholds_from"] = found = {
                "sources": [short_name(part.data) for part in parts],
                "rows": len(texts),
                "rates": dict(zip(head.config.thresholds, rate, strict=True)),
            }
            found = found | {"threshold": head.config.threshold, "thresholds": head.config.thresholds}
        if novelty_data:
            train, validation = rows["train"], rows["validation"] or None
            if validation is None:
                held = set(np.random.default_rng(0).permutation(len(train))[: len(train) // 4].tolist())
                validation = [text for row, text in enumerate(train) if row in held]
                train = [text for row, text in enumerate(train) if row not in held]
            fitted = fit_novelty(head, dataset(train), dataset(validation), progress=True)
            sources = [short_name(source) for source in (*novelty_data, *(novelty_validation or ()))]
            later["novelty"] = {"sources": sources, **fitted}
        if not is_main():
            return
        head.results = (head.results or {}) | later
        head.save_pretrained(probe)
    if as_json:
        print(json.dumps(found | ({"novelty": later["novelty"]} if novelty_data else {})))
        return
    if novelty_data:
        counts = later["novelty"]["rows"]
        create_console().print(
            escape(f"{probe}: novelty fitted on {counts['train']:,} rows, calibrated on {counts['validation']:,}")
        )
    if not thresholds:
        return
    rows = [(name, f"{threshold:.4f}") for name, threshold in head.config.thresholds.items()]
    title = f"{probe} on {len(texts):,} rows that it should not flag"
    print_table(title, ("threshold", "from a probability of"), rows)


def _harmless(rows: LabelledRows, config: ProbeConfig) -> list:
    """Return the texts of the rows with the first label."""
    labelled = rows.read(config)
    return [text for text, label in zip(labelled.texts, labelled.labels, strict=True) if label == 0]
