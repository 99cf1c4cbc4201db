"""`llama-probe calibrate`."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from ..backbone.loading import backbone_target, load_backbone
from ..data.files import MAX_TEXT
from ..data.prompts import PromptFormat
from ..data.states import PromptDataset
from ..distributed import is_main, process_group
from ..errors import ProbeError
from ..evaluation.calibration import check_rates, with_rates
from ..evaluation.report import predict_logits
from ..heads.configuration import ProbeConfig
from ..heads.match import check_backbone
from ..heads.probe import ProbeModel
from ..hub.resolve import resolve_head
from .console import escape, print_table
from .options import Dtype, HeadsBackbone, Json, TrustRemoteCode, backbone_of
from .rows import DATA, ROWS_HELP, LabelledRows, TextColumn, check_head_folder, short_name


def calibrate(
    probe: Annotated[str, typer.Option(help="A head folder. Its thresholds are replaced.")],
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
    text_column: TextColumn = "text",
    label_column: Annotated[str, typer.Option(help=ROWS_HELP["label_column"])] = "label",
    data_dir: Annotated[Path | None, typer.Option(help=ROWS_HELP["data_dir"])] = None,
    max_text: Annotated[int, typer.Option(min=1, help=ROWS_HELP["max_text"])] = MAX_TEXT,
    backbone: HeadsBackbone = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Fit thresholds of a head on rows that it should flag seldom, and save them by name."""
    check_head_folder(probe, "calibrate")
    if not benign and data is None:
        raise ProbeError("calibrate needs rows: give --benign, --data or both")
    backbone = backbone_of(probe, backbone)
    with process_group(), contextlib.redirect_stdout(sys.stderr):
        head = ProbeModel.from_pretrained(
            resolve_head(probe, backbone_target(backbone)), trust_remote_code=trust_remote_code
        )
        check_rates(head.config, rate)
        shared = {"text_column": text_column, "data_dir": data_dir, "max_text": max_text}
        parts = [LabelledRows(source, benign=True, **shared) for source in benign or ()]
        if data is not None:
            parts.append(LabelledRows(data, label_column=label_column, **shared))
        texts = [text for part in parts for text in _harmless(part, head.config)]
        check_rates(head.config, rate, len(texts))
        lm, tokenizer = load_backbone(backbone, dtype)
        check_backbone(probe, head.config, lm)
        head.to(lm.device).set_backbone(lm)
        ids, masks, _ = PromptFormat.from_config(head.config, tokenizer).encode_for(head.config, texts)
        logits = predict_logits(head, PromptDataset(ids, np.zeros(len(texts)), masks), progress=True)
        if not is_main():
            return
        head.config = with_rates(head.config, logits, rate)
        found = {
            "sources": [short_name(part.data) for part in parts],
            "rows": len(texts),
            "rates": dict(zip(head.config.thresholds, rate, strict=True)),
        }
        head.results = (head.results or {}) | {"thresholds_from": found}
        head.save_pretrained(probe)
    if as_json:
        print(json.dumps(found | {"threshold": head.config.threshold, "thresholds": head.config.thresholds}))
        return
    table = Table("threshold", title=escape(f"{probe} on {len(texts):,} rows that it should not flag"))
    table.add_column("from a probability of", justify="right")
    for name, threshold in head.config.thresholds.items():
        table.add_row(escape(name), f"{threshold:.4f}")
    print_table(table)


def _harmless(rows: LabelledRows, config: ProbeConfig) -> list:
    """Return the texts of the rows with the first label."""
    labelled = rows.read(config)
    return [text for text, label in zip(labelled.texts, labelled.labels, strict=True) if label == 0]
