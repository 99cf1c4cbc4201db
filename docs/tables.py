"""Print a table of a page: the bundled heads with their test results, or what was measured of one head on each backbone.

python docs/tables.py
python docs/tables.py safety
"""

import sys
from collections.abc import Iterable, Sequence

from llama_probe.cli.console import with_spread
from llama_probe.files import JSON
from llama_probe.heads.configuration import read_config
from llama_probe.hub.card import kept_share, plain
from llama_probe.hub.folder import read_results, training_results
from llama_probe.hub.resolve import ALIASES, bundled_heads


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]], aligned: str) -> str:
    """Return a table in Markdown; `aligned` has `l` or `r` for each column."""
    rules = "|".join("---" if side == "l" else "---:" for side in aligned)
    first, *others = (f"| {' | '.join(map(str, cells))} |" for cells in (columns, *rows))
    return "\n".join([first, f"|{rules}|", *others])


def results_table() -> str:
    """Return a Markdown table of the bundled heads: mean and standard deviation of their test results over the seeds."""
    rows = []
    for alias, folder in bundled_heads().items():
        config = read_config(folder)
        results = training_results(read_results(folder))
        test = results["summary"].get("test", {})
        scores = [with_spread(test[metric]) if metric in test else "-" for metric in ("accuracy", "f1", "auprc")]
        labels = plain(", ".join(config.id2label.values()))
        counts = [f"{results['num_parameters']:,}", labels, test.get("rows") or "-", len(results["runs"])]
        rows.append([f"`{alias}`", config.probe_type, *counts, *scores])
    columns = "head", "type", "parameters", "labels", "test rows", "seeds", "accuracy", "F1", "AUPRC"
    return markdown_table(columns, rows, "llrlrrrrr")


def read_measured(alias: str) -> JSON:
    """Return what its recipe has measured of a bundled head on each backbone, by the backbone's name."""
    measured = {}
    for folder in bundled_heads().values():
        results = read_results(folder) or {}
        if folder.name == ALIASES.get(alias, alias) and "measured" in results:
            backbone = read_config(folder).base_model_name_or_path
            measured[backbone.rpartition("/")[2]] = results["measured"]
    if not measured:
        sys.exit(f"tables.py takes a bundled head that its recipe has measured, not {alias}")
    return measured


def measured_table(measured: JSON) -> str:
    """Return a Markdown table of `read_measured`, beside TF-IDF, with 95 % intervals.

    A row is a set of rows and a figure: the share with a label that is flagged at the first threshold, AUROC, or AUPRC.
    The first head gives the sets and TF-IDF. An asterisk marks the figures of an ablation trained without that set.
    """
    heads = list(measured.values())
    rate = next(iter(heads[0]["rates"]), None)
    rows = []
    for part in heads[0]["parts"]:
        same_part = [{each["name"]: each for each in head["parts"]}.get(part["name"], {}) for head in heads]
        rows += _part_rows(part, [*same_part, part.get("tfidf", {})], rate)
    for group, title in (
        ("wrappings", "wrapped"),
        ("attacks", "attacks"),
        ("documents", "documents"),
        ("long", "long texts"),
    ):
        groups = [head.get(group, {}) for head in heads]
        groups.append(groups[0].get("tfidf", {}))
        for name in groups[0].get("kept", {}):
            shares = [kept_share(each, name) for each in groups]
            if rate:
                rows.append([f"flagged ones, {title}: {plain(name)}", "still flagged (harmless ones)", *shares])
            else:
                rows.append([f"{title}: {plain(name)}", "all labels stay", *shares])
    columns = ["rows", "figure", *map(plain, measured), "TF-IDF"]
    return markdown_table(columns, rows, "ll" + "r" * (len(heads) + 1))


def _part_rows(part: JSON, parts: list[JSON], rate: str | None) -> list[list[str]]:
    """Return the table's rows of a set of rows; `parts` has it for each column."""
    name = plain(part["name"]) + ("*" if part["ablation"] is not None else "")
    rows = []
    for label, shares in part.get("labels", {}).items():
        labels = [each.get("labels", {}).get(label, {}) for each in parts]
        if rate in shares:
            figures = [_share(each.get(rate)) for each in labels]
            rows.append([f"{name}, {shares['rows']:,} {plain(label)}", f"flagged at {rate}", *figures])
        elif "auroc" in shares:  # one of several labels to find, against all other rows
            figures = [_score(each, "auroc") for each in labels]
            rows.append([f"{name}, {shares['rows']:,} {plain(label)} of {part['rows']:,}", "AUROC", *figures])
    for metric in ("auroc", "auprc"):
        if part.get(metric) is not None:
            rows.append([f"{name}, {part['rows']:,}", metric.upper(), *(_score(each, metric) for each in parts)])
    return rows


def _share(flagged: JSON | None) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(flagged["share"], *flagged["interval"]) if flagged else "-"


def _score(part: JSON, metric: str) -> str:
    if part.get(metric) is None:
        return "-"
    return "{:.3f} [{:.3f}, {:.3f}]".format(part[metric], *part["intervals"][metric])


if __name__ == "__main__":
    print(measured_table(read_measured(sys.argv[1])) if sys.argv[1:] else results_table())
