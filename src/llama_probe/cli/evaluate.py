"""`llama-probe evaluate`."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import numpy as np
import typer

from ..data.known import slices_of
from ..data.labels import read_labels
from ..data.row_files import MAX_TEXT
from ..data.row_sources import ROWS_HELP
from ..distributed import is_main, process_group
from ..errors import ProbeError
from ..evaluation.asking import asked, check_shares
from ..files import short_path
from ..heads.configuration import ProbeConfig
from ..heads.novelty import FAR
from ..hub.folder import measured_rules, read_results
from .console import print_records, print_table, print_text
from .inputs import ScoredHead, check_head_folder, read_rows, read_texts
from .options import (
    Benign,
    DataDir,
    Dtype,
    HeadsBackbone,
    LabelColumn,
    MaxText,
    Probe,
    PromptColumn,
    Result,
    TextColumn,
    TrustRemoteCode,
)


_MAX_CONFUSION = 12  # labels of the largest confusion matrix that is printed
_MAX_AGAINST = 500  # rows of each other kind of texts


def evaluate(
    data: Annotated[str, typer.Option(help=f"Labelled rows to measure the head on: {ROWS_HELP}.")],
    probe: Probe = "safety",
    backbone: HeadsBackbone = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    prompt_column: PromptColumn = None,
    benign: Benign = False,
    slice_column: Annotated[
        list[str] | None,
        typer.Option(help="Report also by the values of this column. Named data sets have their own. Repeatable."),
    ] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Rows of --data at most, at random.")] = None,
    record: Annotated[
        str | None,
        typer.Option(help="Keep the measurements in the head folder under this name, and show them in its card."),
    ] = None,
    wrappings: Annotated[
        bool,
        typer.Option(
            "--wrappings",
            help="Also wrap the flagged rows in twelve ways, and report how often they are still flagged.",
        ),
    ] = False,
    attacks: Annotated[
        bool,
        typer.Option(
            "--attacks",
            help="Also hide the flagged rows in up to 7,500 tokens of the harmless rows, in codes, role play and turns.",
        ),
    ] = False,
    ask: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of the rows, those nearest to the threshold, that a judge decides: report recall and false alarms "
            "then. Repeatable."
        ),
    ] = None,
    judge_column: Annotated[
        str | None,
        typer.Option(help="Column with the judge's labels for --ask; without it the judge is always right."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Texts of another kind, by name or file, without labels, 500 at most: report how well the head's novelty tells "
            "them from --data. Repeatable."
        ),
    ] = None,
    bootstrap: Annotated[
        int, typer.Option(min=0, max=100_000, help="Resamples of the rows for 95 % confidence intervals; 0 for none.")
    ] = 1000,
    data_dir: DataDir = None,
    max_text: MaxText = MAX_TEXT,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Score a head on labelled rows, with its saved temperature and threshold."""
    if record is not None:
        check_head_folder(probe, "--record")
    check_shares(ask or ())
    if judge_column is not None and not ask:
        raise ProbeError(f"--judge-column {judge_column} needs --ask, the share of the rows to ask about")
    with process_group():
        scored = ScoredHead(probe, backbone, dtype, trust_remote_code)
        head = scored.head
        # These take seconds to import.
        from ..evaluation import detection, report
        from ..evaluation.novelty_fit import against_others
        from ..evaluation.prediction import follow_replies, predict_rows, strongest_of
        from ..evaluation.reading import token_texts
        from ..evaluation.transformations import ATTACKS, kept_labels

        if against and head.novelty is None:
            raise ProbeError(f"--against {against[0]}: {probe} has no novelty; calibrate --novelty-data fits it")
        rules = measured_rules(head.results) if head.config.reads_reply else {}
        place = {"data_dir": data_dir, "max_text": max_text}
        columns = {"text_column": text_column, "label_column": label_column, "prompt_column": prompt_column}
        labelled = read_rows(data, head.config, benign, **columns, **place).at_most(max_rows, seed=0)
        slices = slices_of(labelled.columns, data, slice_column or ())
        if ask:
            head.config.need_flagged_index("--ask")
        verdicts = None if judge_column is None else _verdicts(labelled, head.config, judge_column)
        others = {}
        for source in against or ():
            others[short_path(source)] = read_texts(source, head.config, _MAX_AGAINST, split="test", **place)
        scored.attach()
        dataset, followed = scored.prompts.encode_for(head.config, labelled.texts, labelled.labels), None
        if dataset.reply_lengths is None:
            logits, novelty = predict_rows(head, dataset, progress=True)
        else:
            (followed,) = follow_replies([head], dataset, progress=True)
            logits = strongest_of(head, followed)
        novelties = {}
        for name, texts in others.items():
            _, novelties[name] = predict_rows(head, scored.dataset(texts), progress=True)
        groups = (["wrappings"] if wrappings else []) + (list(ATTACKS) if attacks else [])
        transformed = kept_labels(head, labelled, scored.prompts, groups, progress=True) if groups else {}
        if not is_main():
            return None
        result = report.detailed_report(head.config, logits, labelled.labels, slices, bootstrap)
        if (flagged := head.config.flagged_index) is not None:
            result = report.without_undefined(result, labelled.labels, flagged)
            result["flagged"] = report.flagged_share(head.config, logits)
        if followed is not None and rules:
            result["halting"] = detection.apply_rules(head.config, rules, followed, labelled.labels)
        if followed is not None and flagged is not None:
            tokenizer, spans = scored.prompts.tokenizer, labelled.columns.get("spans")
            pairs = zip(dataset.prompts, dataset.reply_lengths, strict=True)
            replies = [token_texts(tokenizer, row[-n:]) for row, n in pairs] if spans else []
            marked = [detection.span_mask(texts, parts) for texts, parts in zip(replies, spans or (), strict=True)]
            measured = detection.reply_report(head.config, followed, labelled.labels, marked or None, bootstrap)
            result["replies"] = measured
        if others:
            result["novelty"] = against_others(novelty, novelties, bootstrap)
        result |= transformed
        if ask:
            result["asking"] = asked(head.config, logits, labelled.labels, ask, verdicts)
        if record is not None:
            head.results = read_results(probe) or {}  # another evaluation may have been recorded in the meantime
            measured = report.describe_evaluation(result, source=short_path(data))
            head.results.setdefault("evaluations", {})[record] = measured
            head.save_pretrained(probe)
    return result, partial(_print_report, f"{probe} on {data}", result, head.config.temperature, bootstrap)


def _verdicts(labelled: Any, config: ProbeConfig, column: str) -> np.ndarray:
    """Return the labels of a column, which are given like those of the rows."""
    if column not in labelled.columns:
        raise ProbeError(f"--judge-column {column!r} must be a column: {', '.join(labelled.columns) or 'none'}")
    names = list(config.id2label.values())
    return read_labels(f"--judge-column {column}", labelled.columns[column], names, config.problem_type)[0]


def _print_report(title: str, result: dict[str, Any], temperature: float, bootstrap: int) -> None:
    from ..evaluation.transformations import GROUPS

    parts = {"all rows": {name: value for name, value in result.items() if not isinstance(value, list)}}
    for column, values in result.get("slices", {}).items():
        parts |= {f"{column} = {value}": part for value, part in values.items()}
    flagged = result.get("flagged")
    print_records(f"{title}, for the label {flagged['label']}" if flagged else title, parts)
    if "labels" in result:
        print_records("each label against the others", result["labels"])
        calibration = {f"with the saved temperature, {temperature:.3f}": result["calibration"] | {"bins": {}}}
        print_records("expected calibration error", calibration)
    if len(matrix := result.get("confusion", ())) <= _MAX_CONFUSION:
        rows = [(name, *counts) for name, counts in zip(result.get("labels", ()), matrix, strict=False)]
        print_table("true labels (rows) and labels from the head (columns)", ("", *result.get("labels", ())), rows)
    if flagged:
        thresholds = flagged.get("named", {}) | {"own": flagged}
        print_records(f"rows that are flagged as {flagged['label']}, by threshold", thresholds)
    if novelty := result.get("novelty"):
        title = f"novelty of these rows against others; {novelty['own']['far']:.1%} of them are above {FAR}"
        print_records(title, novelty["against"])
    transformed = {
        name: {
            "rows": part["rows"],
            "same label": "too long" if kept is None else kept,
            "harmless rows": part["harmless"],
            "flagged": part["alarms"][name],
        }
        for part in map(result.get, GROUPS)
        if part
        for name, kept in part["kept"].items()
    }
    print_records("transformed: share of the flagged rows with the same label, and of harmless rows", transformed)
    asking = {f"share {row['share']:.3f}": row for row in result.get("asking", ())}
    print_records("with a judge for the rows nearest to the threshold", asking)
    if replies := result.get("replies"):
        areas = {name: replies[name] for name in ("r_auc", "t_auc") if name in replies}
        print_records(
            f"replies with {replies['label']} against the others",
            {"all rows": areas | {"intervals": replies["intervals"]}},
        )
        thresholds = {name: rule | rule["delay"] for name, rule in replies["thresholds"].items()}
        print_records(f"replies halted at the first token with {replies['label']}, by threshold", thresholds)
    for label, rules in result.get("halting", {}).items():
        tested = {
            f"patience {rule['patience']}, window {rule.get('window', 1)}": rule | rule["test"] | rule["test"]["delay"]
            for rule in rules
        }
        print_records(f"replies halted by {label} while they are written", tested)
    if bootstrap:
        print_text(f"In brackets: 95 % intervals from {bootstrap:,} resamples of the rows.")
