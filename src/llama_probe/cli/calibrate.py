"""`llama-probe calibrate`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import numpy as np

from ..distributed import is_main
from ..errors import ProbeError
from ..files import short_path
from ..heads.novelty import MAX_ROWS, MIN_ROWS, novelty_layers
from .console import print_values
from .inputs import HeadOptions, ScoredHead, TextRows, check_head_folder
from .options import ROWS, Result


def calibrate(
    *,
    rows: TextRows,
    options: HeadOptions,
    probe: str,
    benign: Annotated[list[str] | None, ROWS] = None,
    rate: list[float] = (0.02, 0.005),
    flagged: str | None = None,
    novelty_data: list[str] | None = None,
    novelty_validation: list[str] | None = None,
    max_rows: Annotated[int, {"min": MIN_ROWS}] = MAX_ROWS,
) -> Result:
    """Fit thresholds of a head on rows that it should rarely flag, or its novelty: how unlike its training data a prompt is.

    Args:
        probe: a head folder. Its thresholds, or its novelty, are replaced.
        benign: rows to flag seldom; they need no label column.
        rate: share of these rows that may be flagged. The first gives the head's own threshold.
        flagged: label that the thresholds are for. Default: the one that the head flags. It is saved with the head.
        novelty_data: rows that the head was trained on, to fit how unlike them a prompt is; they need no label column.
        novelty_validation: further rows of that kind, to calibrate novelty on. Default: a quarter of --novelty-data.
        max_rows: rows of each --novelty-data and --novelty-validation at most, at random.
    """
    check_head_folder(probe, "calibrate")
    if not benign and not novelty_data:
        raise ProbeError("calibrate needs rows: give --benign for thresholds, or --novelty-data")
    if novelty_validation and not novelty_data:
        raise ProbeError(f"--novelty-validation {novelty_validation[0]} needs --novelty-data")
    if flagged is not None and not benign:
        raise ProbeError(f"--flagged {flagged} needs --benign, rows to fit its thresholds on")
    scored = ScoredHead(probe, options)
    head = scored.head
    # These take seconds to import.
    from ..evaluation.calibration import check_rates, with_rates
    from ..evaluation.novelty_fit import fit_novelty
    from ..evaluation.prediction import predict_logits

    if novelty_data:
        novelty_layers(head.config)
    before = head.config
    if flagged is not None:
        head.config = head.config.replace(flagged=[flagged], threshold=None, thresholds=None)
    if benign:
        check_rates(head.config, rate)

    def read(sources: list[str] | None, split: str, limit: int | None = max_rows) -> list:
        return [text for source in sources or () for text in rows.texts(source, head.config, limit, split)]

    train, validation = read(novelty_data, "train"), read(novelty_validation, "validation")
    texts = read(benign, "test", None)
    if benign:
        check_rates(head.config, rate, len(texts))
    scored.attach()
    results, shown = head.results or {}, {}
    if benign:
        head.config = with_rates(head.config, predict_logits(head, scored.dataset(texts)), rate)
        results["thresholds_from"] = {
            "flagged": head.config.flagged[0],
            "sources": list(map(short_path, benign)),
            "rows": len(texts),
            "rates": dict(zip(head.config.thresholds, rate, strict=True)),
        }
        fitted = {"threshold": head.config.threshold, "thresholds": head.config.thresholds}
        shown = results["thresholds_from"] | fitted
        # The new thresholds may have the names of those that were measured.
        if "measured" in results and before.flagged_index is not None:
            earlier = before.thresholds or {"threshold": before.threshold or 0.5}
            then = {"flagged": before.flagged_labels[0], "thresholds": earlier}
            results["measured"] = {"before_calibration": then, **results["measured"]}
    if novelty_data:
        if not validation:
            held = set(np.random.default_rng(0).permutation(len(train))[: len(train) // 4].tolist())
            validation = [text for row, text in enumerate(train) if row in held]
            train = [text for row, text in enumerate(train) if row not in held]
        fitted = fit_novelty(head, scored.dataset(train), scored.dataset(validation))
        sources = list(map(short_path, (*novelty_data, *(novelty_validation or ()))))
        shown["novelty"] = results["novelty"] = {"sources": sources, **fitted}
        for evaluation in results.get("evaluations", {}).values():
            evaluation.pop("novelty", None)  # of the one before
    if not is_main():
        return None
    head.results = results
    head.save_pretrained(probe)
    return shown, partial(print_values, probe, shown)
