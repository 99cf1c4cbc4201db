"""`llama-probe evaluate`."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import typer

from ..data.cached_states import PromptDataset
from ..data.known import find_benchmark
from ..data.labels import read_labels
from ..data.row_sources import ROWS_HELP
from ..distributed import is_main, process_group
from ..errors import ProbeError
from ..evaluation.asking import asked, check_shares
from ..heads.configuration import ProbeConfig
from ..heads.novelty import FAR
from ..hub.folder import measured_rules, read_results
from .console import print_table, print_text
from .inputs import BENIGN, HeadOptions, RowOptions, check_head_folder, check_source, read_rows, read_texts
from .options import Fields, Result, short_name


_MAX_CONFUSION = 12  # labels of the largest confusion matrix that is printed
_MAX_AGAINST = 500  # rows of each other kind of texts


def evaluate(
    scored: Annotated[HeadOptions, Fields("Head", defaults={"probe": "safety"})],
    data: Annotated[str, typer.Option(help=f"Labelled rows to measure the head on: {ROWS_HELP}.")],
    columns: Annotated[dict[str, Any], Fields("Data", of=RowOptions)],
    benign: Annotated[bool, typer.Option("--benign", help=BENIGN)] = False,
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
) -> Result:
    """Score a head on labelled rows, with its saved temperature and threshold."""
    probe = scored.probe
    check_source(data)
    if record is not None:
        check_head_folder(probe, "--record")
    check_shares(ask or ())
    if judge_column is not None and not ask:
        raise ProbeError(f"--judge-column {judge_column} needs --ask, the share of the rows to ask about")
    with process_group():
        head = scored.load()
        # These take seconds to import.
        from ..evaluation import detection, report
        from ..evaluation.novelty import against_others
        from ..evaluation.prediction import predict_rows
        from ..evaluation.wrappings import kept_labels

        if against and head.novelty is None:
            raise ProbeError(f"--against {against[0]}: {probe} has no novelty; calibrate --novelty-data fits it")
        rules = measured_rules(head.results) if head.config.reads_reply else {}
        labelled = read_rows(data, head.config, benign, **columns).at_most(max_rows, seed=0)
        slices = _slices(labelled.columns, data, slice_column)
        if ask:
            head.config.need_flagged_index("--ask")
        verdicts = None if judge_column is None else _verdicts(labelled, head.config, judge_column)
        place = {"split": "test", "data_dir": columns["data_dir"], "max_text": columns["max_text"]}
        others = {}
        for source in against or ():
            others[short_name(source)] = read_texts(source, head.config, _MAX_AGAINST, **place)
        scored.attach()
        ids, masks, lengths = scored.prompts.encode_for(head.config, labelled.texts)
        dataset, followed = PromptDataset(ids, labelled.labels, masks), None
        if lengths is None:
            logits, novelty = predict_rows(head, dataset, progress=True)
        else:
            followed = detection.follow_replies(head, dataset, lengths, progress=True)
            logits = torch.stack([tokens[-1] for tokens in followed])
        novelties = {}
        for name, texts in others.items():
            _, novelties[name] = predict_rows(head, scored.dataset(texts), progress=True)
        if not is_main():
            return None
        result = report.detailed_report(head.config, logits, labelled.labels, slices, bootstrap)
        if (flagged := head.config.flagged_index) is not None:
            result = report.without_undefined(result, labelled.labels, flagged)
            result["flagged"] = report.flagged_share(head.config, logits)
        if followed is not None and rules:
            result["halting"] = detection.apply_rules(head.config, rules, followed, labelled.labels)
        if others:
            result["novelty"] = against_others(novelty, novelties, bootstrap)
        if wrappings:
            result["wrappings"] = kept_labels(head, labelled.texts, scored.prompts, progress=True)
        if ask:
            result["asking"] = asked(head.config, logits, labelled.labels, ask, verdicts)
        if record is not None:
            head.results = read_results(probe) or {}  # another evaluation may have been recorded in the meantime
            measured = report.describe_evaluation(result, source=short_name(data))
            head.results.setdefault("evaluations", {})[record] = measured
            head.save_pretrained(probe)
    return result, partial(_print_report, f"{probe} on {data}", result, head.config.temperature, bootstrap)


def _slices(found: dict[str, list], source: str, columns: list[str] | None) -> dict[str, list]:
    """Return the columns to report by: those that were asked for, or those of a named data set."""
    for column in columns or ():
        if column not in found:
            raise ProbeError(f"--slice-column {column!r} must be a column of {source}: {', '.join(found) or 'none'}")
    known = find_benchmark(source)
    return {column: found[column] for column in columns or (known[0].slices if known else ()) if column in found}


def _verdicts(labelled: Any, config: ProbeConfig, column: str) -> np.ndarray:
    """Return the labels of a column, which are given like those of the rows."""
    if column not in labelled.columns:
        raise ProbeError(f"--judge-column {column!r} must be a column: {', '.join(labelled.columns) or 'none'}")
    names = list(config.id2label.values())
    return read_labels(f"--judge-column {column}", labelled.columns[column], names, config.problem_type)[0]


def _print_report(title: str, result: dict[str, Any], temperature: float, bootstrap: int) -> None:
    parts = {"all rows": {name: value for name, value in result.items() if not isinstance(value, (dict, list))}}
    if "intervals" in result:
        parts["all rows"]["intervals"] = result["intervals"]
    for column, values in result.get("slices", {}).items():
        parts |= {f"{column} = {value}": part for value, part in values.items()}
    if flagged := result.get("flagged"):
        title += f", for the label {flagged['label']}"
    _print_parts(title, parts)
    if "labels" in result:
        _print_parts("each label against the others", result["labels"])
        if "confusion" in result:
            _print_confusion(list(result["labels"]), result["confusion"])
        found = result["calibration"]
        print_text(
            f"Expected calibration error: {_cell(found, 'error', ' ')} with the saved temperature {temperature:.3f}, "
            f"{_cell(found, 'error_uncalibrated', ' ')} at temperature 1."
        )
    if found := result.get("flagged"):
        for name, part in {f"Flagged as {found['label']}": found, **found.get("named", {})}.items():
            low, high = part["interval"]
            print_text(
                f"{name}, from a probability of {part['threshold']:.3f} on: {part['share']:.1%} of the rows "
                f"(95 % interval {low:.1%} to {high:.1%})."
            )
    if found := result.get("novelty"):
        _print_novelty(found)
    if found := result.get("wrappings"):
        title = f"{found['rows']:,} rows, wrapped: share with the same label"
        print_table(title, ("wrapping", "kept"), [(name, f"{share:.3f}") for name, share in found["kept"].items()])
    if found := result.get("asking"):
        _print_asking(found)
    for label, rules in result.get("halting", {}).items():
        _print_halting(label, rules)
    if bootstrap:
        print_text(f"In brackets: 95 % intervals from {bootstrap:,} resamples of the rows.")


def _print_parts(title: str, parts: dict[str, dict[str, Any]]) -> None:
    """Print a row for each part, a column for each metric, and intervals below the numbers."""
    metrics = [name for name in next(iter(parts.values())) if name != "intervals"]
    rows = [(name, *(_cell(part, metric, "\n") for metric in metrics)) for name, part in parts.items()]
    print_table(title, ("", *metrics), rows)


def _print_novelty(found: dict[str, Any]) -> None:
    rows = []
    for name, part in found["against"].items():
        spread = f" [{', '.join(map(_number, part['interval']))}]" if part.get("interval") else ""
        rows.append((name, f"{part['rows']:,}", f"{part['auroc']:.3f}{spread}", f"{part['far']:.1%}"))
    columns = ("novelty of these rows against", "rows", "AUROC", f"above {FAR}")
    print_table(f"{found['own']['far']:.1%} of these rows are above {FAR}", columns, rows)


def _print_asking(found: list[dict[str, Any]]) -> None:
    rows = []
    for row in found:
        band = " and ".join(map(_number, row["band"] or ())) or "-"
        rows.append((f"{row['share']:.1%}", band, _number(row["recall"]), _number(row["false_alarms"])))
    columns = ("share asked", "between", "recall", "false alarms")
    print_table("with a judge for the rows nearest to the threshold", columns, rows, left=2)


def _print_halting(label: str, rules: list[dict[str, Any]]) -> None:
    columns = ("patience", "threshold", "detected", "in vain", "delay, median", "90 % below", "of the reply")
    rows = []
    for rule in rules:
        found = rule["test"] | rule["test"]["delay"]
        forms = {"detected": ".1%", "false_halts": ".1%", "median": ".0f", "p90": ".0f", "share": ".0%"}
        cells = ["-" if found[name] is None else f"{found[name]:{form}}" for name, form in forms.items()]
        rows.append((f"{rule['patience']}{' *' if rule['chosen'] else ''}", f"{rule['threshold']:.3f}", *cells))
    print_table(f"replies halted by {label} while they are written", columns, rows, left=0)


def _print_confusion(names: list[str], matrix: list[list[int]]) -> None:
    if len(names) > _MAX_CONFUSION:
        print_text(f"The confusion matrix of the {len(names)} labels is in the output of --json.")
        return
    rows = [(name, *(f"{count:,}" for count in counts)) for name, counts in zip(names, matrix, strict=True)]
    print_table("true labels (rows) and labels from the head (columns)", ("", *names), rows)


def _cell(part: dict[str, Any], metric: str, separator: str) -> str:
    value, interval = part[metric], part.get("intervals", {}).get(metric)
    text = _number(value)
    return text if interval is None or value is None else f"{text}{separator}[{', '.join(map(_number, interval))}]"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if 0.001 <= abs(value) < 1000 or not value else f"{value:.3g}"
