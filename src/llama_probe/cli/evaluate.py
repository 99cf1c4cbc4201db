"""`llama-probe evaluate`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from ..data.known import slices_of
from ..distributed import is_main
from ..errors import ProbeError
from ..files import JSON, short_path
from ..hub.folder import measured_rules, read_results
from .console import print_values
from .inputs import HeadOptions, LabelledRows, ScoredHead, check_head_folder
from .options import COUNT, PROBE, ROWS, Result


_MAX_CONFUSION = 12  # labels of the largest confusion matrix that is printed
_MAX_AGAINST = 500  # rows of each file of --against


def evaluate(
    *,
    rows: LabelledRows,
    options: HeadOptions,
    data: Annotated[str, ROWS],
    probe: Annotated[str, PROBE] = "safety",
    slice_column: list[str] | None = None,
    max_rows: Annotated[int | None, COUNT] = None,
    record: str | None = None,
    wrappings: bool = False,
    attacks: bool = False,
    against: list[str] | None = None,
    bootstrap: Annotated[int, {"min": 0, "max": 100_000}] = 1000,
    max_length: Annotated[int | None, COUNT] = None,
) -> Result:
    """Score a head on labelled rows, with its saved temperature and threshold.

    Args:
        slice_column: report also by the values of this column. Data sets known by name have columns of their own.
        max_rows: rows of --data at most, at random.
        record: keep the measurements in the head folder under this name, and show them in its card.
        wrappings: also wrap the flagged rows in twelve ways, and report how often they are still flagged.
        attacks: also hide the flagged rows in up to 7,500 tokens of the harmless rows, in codes, role play and turns.
        against: at most 500 other texts, without labels: report how well novelty tells them from the rows of --data.
        bootstrap: resamples of the rows for 95 % confidence intervals; 0 for none.
    """
    if record is not None:
        check_head_folder(probe, "--record")
    scored = ScoredHead(probe, options, max_length)
    head = scored.head
    # These take seconds to import.
    from ..evaluation import detection, report
    from ..evaluation.novelty_fit import against_others
    from ..evaluation.prediction import predict_rows
    from ..evaluation.transformations import ATTACKS, check_transformable, kept_labels
    from ..serving.texts import warn_beyond_backbone

    if against and head.novelty is None:
        raise ProbeError(f"--against {against[0]}: {probe} has no novelty; calibrate --novelty-data fits it")
    groups = [*(["wrappings"] if wrappings else []), *(ATTACKS if attacks else [])]
    if groups:
        check_transformable(" and ".join(groups), head.config)
    rules = measured_rules(head.results) if head.config.reads_reply else {}
    labelled = rows.labelled(data, head.config).at_most(max_rows, seed=0)
    slices = slices_of(labelled.columns, data, slice_column or ())
    others = {short_path(name): rows.texts(name, head.config, _MAX_AGAINST, "test") for name in against or ()}
    scored.attach()
    dataset = scored.prompts.encode_for(head.config, labelled.texts, labelled.labels)
    warn_beyond_backbone(scored.model, dataset.prompts)
    logits, novelty, followed = predict_rows(head, dataset)
    novelties = {name: predict_rows(head, scored.dataset(texts))[1] for name, texts in others.items()}
    transformed = kept_labels(head, labelled, scored.prompts, groups) if groups else {}
    if not is_main():
        return None
    result = report.detailed_report(head.config, logits, labelled.labels, slices, bootstrap)
    has_flagged = head.config.flagged_index is not None
    if has_flagged:
        result["flagged"] = report.flagged_share(head.config, logits)
    if followed is not None and rules:
        result["halting"] = detection.apply_rules(head.config, rules, followed, labelled.labels)
    if followed is not None and (has_flagged or head.config.problem_type == "multi_label_classification"):
        result["replies"] = detection.reply_report(head.config, followed, labelled.labels, bootstrap)
    if others:
        result["novelty"] = against_others(novelty, novelties, bootstrap)
    result |= transformed
    if record is not None:
        head.results = read_results(probe) or {}  # another evaluation may have been recorded in the meantime
        measured = report.describe_evaluation(result, source=short_path(data))
        head.results.setdefault("evaluations", {})[record] = measured
        head.save_pretrained(probe)
    return result, partial(print_values, f"{probe} on {data}", _for_display(result))


def _for_display(result: JSON) -> JSON:
    """Return a report for `print_values`: a small confusion by names of labels, and halting rules measured on these rows."""
    shown = result | {"confusion": {}, "halting": {}}
    matrix = result.get("confusion", ())
    if len(matrix) <= _MAX_CONFUSION:
        names = list(result.get("labels", ()))
        for name, counts in zip(names, matrix, strict=False):  # regression has labels and no confusion
            shown["confusion"][name] = dict(zip(names, counts, strict=True))
    for label, rules in result.get("halting", {}).items():
        shown["halting"][label] = [{**rule, **rule["test"], "validation": {}, "test": {}} for rule in rules]
    return shown
