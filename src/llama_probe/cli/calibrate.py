"""`llama-probe calibrate`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from ..data.prompts import Text
from ..distributed import is_main
from ..errors import ProbeError
from ..files import JSON, short_path
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
    from ..evaluation.calibration import check_rates, length_groups, own_threshold, thresholds_from, with_rates
    from ..evaluation.novelty_fit import fit_novelty, held_quarter
    from ..evaluation.prediction import predict_logits

    if novelty_data:
        novelty_layers(head.config)
    before = head.config
    if flagged is not None:
        head.config = head.config.replace(flagged=[flagged], threshold=None, thresholds=None)
    if benign:
        check_rates(head.config, rate)

    def read(sources: list[str] | None, split: str, limit: int | None) -> list[Text]:
        return [text for source in sources or () for text in rows.texts(source, head.config, limit, split)]

    train = read(novelty_data, "train", max_rows)
    validation = read(novelty_validation, "validation", max_rows)
    texts = read(benign, "test", None)
    if benign:
        check_rates(head.config, rate, len(texts))
    scored.attach()
    results = head.results or {}
    shown: JSON = {}
    if benign:
        dataset = scored.dataset(texts)
        logits = predict_logits(head, dataset)
        groups = length_groups(head.config, dataset)
        head.config = with_rates(head.config, logits, rate, groups)
        sources = list(map(short_path, benign))
        results["thresholds_from"] = thresholds_from(head.config, rate, sources, logits, groups)
        shown |= results["thresholds_from"]
        shown |= {"threshold": head.config.threshold, "thresholds": head.config.thresholds}
        # A new threshold may have the name of a threshold that was measured.
        if "measured" in results and before.flagged_index is not None:
            earlier = before.thresholds or {"threshold": own_threshold(before, before.flagged_index)}
            then = {"flagged": before.flagged[0], "thresholds": earlier}
            results["measured"] = {"before_calibration": then, **results["measured"]}
    if novelty_data:
        if not validation:
            held = set(held_quarter(len(train)))
            validation = [text for row, text in enumerate(train) if row in held]
            train = [text for row, text in enumerate(train) if row not in held]
        fitted = fit_novelty(head, scored.dataset(train), scored.dataset(validation))
        sources = list(map(short_path, (*novelty_data, *(novelty_validation or ()))))
        results["novelty"] = {"sources": sources, **fitted}
        shown["novelty"] = results["novelty"]
        for evaluation in results.get("evaluations", {}).values():
            evaluation.pop("novelty", None)  # it measured the earlier novelty
    if not is_main():
        return None
    head.results = results
    head.save_pretrained(probe)
    return shown, partial(print_values, probe, shown)
