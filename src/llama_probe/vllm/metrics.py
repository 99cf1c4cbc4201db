"""Counters on vLLM's `/metrics`, by head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import Counter


_SCORED = Counter("llama_probe_scored", "Prompts that the head scored.", ["probe"])
_FLAGGED = Counter("llama_probe_flagged", "Prompts in which the head flagged a label.", ["probe"])
_HALTED = Counter("llama_probe_halted", "Prompts that got no reply because of the head.", ["probe"])


def announce(heads: Iterable[str]) -> None:
    """Show the counters of heads before they count anything."""
    for name in heads:
        for counter in (_SCORED, _FLAGGED, _HALTED):
            counter.labels(name)


def count(known: Mapping[str, Any]) -> None:
    """Count one prompt, by what the engine says of it; see `answer`."""
    for name, said in known["probes"].items():
        if "error" not in said:
            _SCORED.labels(name).inc()
        if said.get("flagged"):
            _FLAGGED.labels(name).inc()
    if halted := known.get("halted"):
        _HALTED.labels(halted["head"]).inc()
