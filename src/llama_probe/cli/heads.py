"""`llama-probe inspect`."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial

from ..backbone.loading import DtypeName, backbone_target, load_backbone, model_id
from ..errors import ProbeError
from ..files import JSON
from ..heads.configuration import ProbeConfig, read_config
from ..heads.match import Check, compare
from ..heads.probe import ProbeModel
from ..hub.card import kept_share, markdown_table, plain
from ..hub.folder import read_results, training_results
from ..hub.resolve import ALIASES, bundled_heads
from ..hub.transport import HubOptions
from .console import print_table, with_spread
from .options import Result


def inspect(
    probe: str | None = None,
    /,
    *,
    backbone: str | None = None,
    dtype: DtypeName = "auto",
    revision: str | None = None,
    markdown: bool = False,
    trust_remote_code: bool = False,
) -> Result:
    """Show a head, check it against a backbone, or list the bundled heads.

    Args:
        probe: a head folder, a Hub id or an alias. Default: all bundled heads.
        backbone: compare with this model: 'demo', a folder, or a Hub id.
        markdown: print the results of all bundled heads, or what was measured of one on each backbone, in Markdown.
    """
    if markdown and probe:
        measured = read_measured(probe)
        return measured, partial(print, measured_table(measured))
    if probe is None:
        if backbone or revision:
            raise ProbeError("--backbone and --revision need a head: name it first")
        heads = bundled_heads()
        configs = {alias: read_config(folder) for alias, folder in heads.items()}
        show = partial(print, results_table()) if markdown else partial(_print_heads, configs)
        return {alias: config.to_dict() for alias, config in configs.items()}, show
    target = None if backbone is None else backbone_target(backbone)
    head = ProbeModel.load_for(probe, target, HubOptions(revision, trust_remote_code=trust_remote_code))
    if backbone is not None:
        lm, tokenizer = load_backbone(backbone, dtype)
        lm.config._name_or_path = model_id(backbone)
        checks = compare(head.config, lm, tokenizer)
        return [asdict(check) for check in checks], partial(_print_checks, probe, backbone, checks)
    values = head.config.to_dict() | {"num_parameters": head.num_parameters()}
    values["flagged"] = head.config.flagged_labels or None
    rows = [(key, json.dumps(value, ensure_ascii=False)) for key, value in sorted(values.items())]
    return values, partial(print_table, probe, ("field", "value"), rows, left=2)


def results_table() -> str:
    """Return a Markdown table of the bundled heads with their test results: mean and standard deviation over the seeds."""
    rows = []
    for alias, folder in bundled_heads().items():
        config, results = read_config(folder), training_results(read_results(folder))
        test = results["summary"].get("test", {})
        scores = (with_spread(test[metric]) if metric in test else "-" for metric in ("accuracy", "f1", "auprc"))
        labels, parameters = plain(", ".join(config.id2label.values())), f"{results['num_parameters']:,}"
        counts = parameters, labels, test.get("rows") or "-", len(results["runs"])
        rows.append([f"`{alias}`", config.probe_type, *counts, *scores])
    columns = "head", "kind", "parameters", "labels", "test rows", "seeds", "accuracy", "F1", "AUPRC"
    return markdown_table(columns, rows, "llrlrrrrr")


def measured_table(measured: JSON) -> str:
    """Return a Markdown table of what one recipe has measured of heads, by backbone, beside TF-IDF, with 95 % intervals.

    A row is a set of rows and a figure: the share with a label that is flagged at the first threshold, AUROC, or AUPRC.
    The sets and TF-IDF are those of the first head. An asterisk marks the figures of an ablation.
    """
    heads, rows = list(measured.values()), []
    parts_by_name = [{part["name"]: part for part in head["parts"]} for head in heads]
    rate = next(iter(heads[0]["rates"]), None)

    def share(part: JSON, label: str) -> str:
        flagged = part.get("labels", {}).get(label, {}).get(rate)
        return "{:.2f} [{:.2f}, {:.2f}]".format(flagged["share"], *flagged["interval"]) if flagged else "-"

    def score(part: JSON, metric: str) -> str:
        value = part.get(metric)
        return "-" if value is None else "{:.3f} [{:.3f}, {:.3f}]".format(value, *part["intervals"][metric])

    for part in heads[0]["parts"]:
        name = plain(part["name"]) + ("*" if part["ablation"] is not None else "")
        parts = [*(by_name.get(part["name"], {}) for by_name in parts_by_name), part.get("tfidf", {})]
        for label, shares in part.get("labels", {}).items():
            if rate in shares:
                figures = [share(head_part, label) for head_part in parts]
                rows.append([f"{name}, {shares['rows']:,} {plain(label)}", f"flagged at {rate}", *figures])
            elif "auroc" in shares:  # one of several labels to find, against all other rows
                figures = [score(head_part.get("labels", {}).get(label, {}), "auroc") for head_part in parts]
                rows.append([f"{name}, {shares['rows']:,} {plain(label)} of {part['rows']:,}", "AUROC", *figures])
        for metric in ("auroc", "auprc"):
            if part.get(metric) is not None:
                figures = [score(head_part, metric) for head_part in parts]
                rows.append([f"{name}, {part['rows']:,}", metric.upper(), *figures])
    rows_of, figure = ("flagged ones, ", "still flagged (harmless ones)") if rate else ("", "all labels stay")
    titles = {"wrappings": "wrapped", "attacks": "attacks", "documents": "documents", "long": "long texts"}
    for group, title in titles.items():
        first, *others = (head.get(group, {}) for head in heads)
        for name in first.get("kept", {}):
            figures = [kept_share(kept, name) for kept in (first, *others, first.get("tfidf", {}))]
            rows.append([f"{rows_of}{title}: {plain(name)}", figure, *figures])
    return markdown_table(["rows", "figure", *map(plain, measured), "TF-IDF"], rows, "ll" + "r" * (len(heads) + 1))


def read_measured(alias: str) -> JSON:
    """Return what its recipe has measured of a bundled head on each backbone, by the backbone's name."""
    name = ALIASES.get(alias, alias)
    measured = {}
    for folder in bundled_heads().values():
        if folder.name == name and "measured" in (results := read_results(folder) or {}):
            measured[read_config(folder).base_model_name_or_path.rpartition("/")[2]] = results["measured"]
    if not measured:
        raise ProbeError(f"--markdown takes a bundled head that its recipe has measured, not {alias}")
    return measured


def _print_heads(configs: dict[str, ProbeConfig]) -> None:
    rows = [
        (alias, config.probe_type, ", ".join(config.id2label.values()), config.base_model_name_or_path)
        for alias, config in configs.items()
    ]
    print_table("bundled heads", ("alias", "kind", "labels", "backbone"), rows, left=4)


def _print_checks(probe: str, backbone: str, checks: list[Check]) -> None:
    rows = [(check.field, check.recorded, check.actual, check.verdict) for check in checks]
    print_table(f"{probe} on {backbone}", ("", "the head was trained with", "this backbone", "verdict"), rows, left=4)
    differing = [check for check in checks if check.verdict == "differs"]
    guess = next((check.guess for check in checks if check.guess), None)  # from the fingerprints
    if any(check.fatal for check in differing):
        print("The head cannot run on this backbone: it was made for a model of another size.")
    elif differing:
        print(f"The head runs on this backbone{f' ({guess}?)' if guess else ''}, but its scores may be meaningless.")
    elif guess:
        print(f"The head belongs to this backbone, which is {guess} of the one that it was trained on.")
    else:
        print("The head belongs to this backbone: nothing that was recorded differs.")
