"""Counters on vLLM's `/metrics`, by head."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Counter

from ..files import JSON
from .label_routes import LabelRequest
from .payloads import prompt_halt


_SCORED = Counter("llama_probe_scored", "Prompts that the head scored.", ["probe"])
_FLAGGED = Counter("llama_probe_flagged", "Prompts in which the head flagged a label.", ["probe"])
_HALTED = Counter("llama_probe_halted", "Prompts that got no reply because of the head.", ["probe"])
_TOKENS = Counter("llama_probe_reply_tokens", "Tokens of replies that the head scored.", ["probe"])
_FLAGGED_REPLIES = Counter("llama_probe_flagged_replies", "Replies in which the head flagged a label.", ["probe"])
_HALTED_REPLIES = Counter("llama_probe_halted_replies", "Replies that the head ended.", ["probe"])
JUDGED = Counter("llama_probe_judged", "Prompts that the head left to the judge, by its answer.", ["probe", "answer"])


def announce(heads: Iterable[str]) -> None:
    """Show the counters of the heads on `/metrics`, all of them 0."""
    for name in heads:
        for counter in (_SCORED, _FLAGGED, _HALTED, _TOKENS, _FLAGGED_REPLIES, _HALTED_REPLIES):
            counter.labels(name)


def count(result: JSON, labels: LabelRequest | None) -> None:
    """Count the result of one input; see `prompt_result`. An input of a route of labels may be a reply itself."""
    is_reply = labels is not None and labels.have_replies
    scored, flagged = (_TOKENS, _FLAGGED_REPLIES) if is_reply else (_SCORED, _FLAGGED)
    for name, probe in result["probes"].items():
        if "error" not in probe:
            scored.labels(name).inc()
        if probe.get("flagged"):
            flagged.labels(name).inc()
    if labels is None and (halted := prompt_halt(result)):
        _HALTED.labels(halted["head"]).inc()


def count_reply(reply: JSON | None) -> None:
    """Count one reply that has ended; see `Replies.summaries`."""
    if reply is None:
        return
    for name, probe in reply["probes"].items():
        _TOKENS.labels(name).inc(probe["tokens"])
        if probe.get("flagged"):
            _FLAGGED_REPLIES.labels(name).inc()
    if halted := reply["halted"]:
        _HALTED_REPLIES.labels(halted["head"]).inc()
