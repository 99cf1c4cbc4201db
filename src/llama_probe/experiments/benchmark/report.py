"""The table of `llama-probe benchmark`."""

from __future__ import annotations

from typing import Any

from ...experiments import paper
from .serving_systems import AGAIN


def by_load(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Group the rows by load, such as `"batch 1, 512 tokens, 1 new"`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        title = f"batch {row['batch_size']}, {row['tokens']} tokens, {row['new_tokens']} new"
        found.setdefault(title, []).append(row)
    return found


def columns(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return titles and cells of the table of one load, without columns that would be empty."""
    shown = {
        "system": lambda row: row["system"],
        "ms": lambda row: f"{row['ms']['median']:.2f}",
        "ratio [quartiles]": lambda row: _ratio(row["ratio"]),
    }
    if any(row["step_ms"] for row in rows):
        shown["ms a further token"] = lambda row: f"{row['step_ms']['median']:.2f}"
        shown["its ratio [quartiles]"] = lambda row: _ratio(row["step_ratio"])
    shown["MB above base"] = lambda row: "-" if row["above_base_mb"] is None else f"{row['above_base_mb']:,.1f}"
    if any(row["paper_ratio"] for row in rows):
        shown["paper"] = lambda row: "-" if row["paper_ratio"] is None else f"{row['paper_ratio']:.2f}x"
    return list(shown), [[cell(row) for cell in shown.values()] for row in rows]


def notes(report: dict[str, Any]) -> list[str]:
    """Return the notes below the table: what ran, and how far to trust it."""
    settings, backbone = report["settings"], report["backbone"]
    weights = "random weights" if settings["random_weights"] else "its own weights"
    compiled = ", compiled by torch.compile" if settings["compile"] else ""
    found = [
        f"{backbone['name']} ({backbone['num_parameters'] / 1e6:,.0f} million parameters, {backbone['dtype']}, {weights}) on "
        f"{report['environment']['device']}, {report['environment']['threads']} threads{compiled}; "
        f"{settings['pairs']} pairs a system, in turn with the plain model.",
        f"Ratio: of the times in a pair, median and quartiles. The ratio of `{AGAIN}` shows the noise: a difference of its "
        "size says nothing. More --pairs and an idle machine make it smaller.",
        "MB above base: weights, and the peak memory of a call, above the plain model's. Guards get prompts of as many tokens, "
        "and give one token or class.",
    ]
    if any(row["paper_ratio"] for row in report["rows"]):
        found.append(f"Paper: {paper.BACKBONE} ({paper.SOURCE}, table 5), {paper.SERVING_SETTING}.")
    return found


def _ratio(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    low, high = found["quartiles"]
    return f"{found['median']:.3f}x [{low:.3f}, {high:.3f}]"
