"""The share of flagged requests that a head still flags in another wrapping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.cached_states import PromptDataset
from ..data.prompts import PromptFormat
from ..errors import ProbeError
from ..heads.decision import predictions, probabilities
from ..heads.probe import ProbeModel
from .prediction import predict_logits


_LONG_SYSTEM = (
    "You are the assistant of a small shop that sells shoes, bags and belts. Answer in plain English, in at most three "
    "sentences. If a customer asks for an order, ask for its number first. Name prices in euros, with tax. Do not promise a "
    "date of delivery. If you do not know an answer, say so, and give the address of the shop."
)
_TOOLS = (
    "You may call these tools. Answer with JSON.\n"
    '{"name": "get_weather", "description": "The weather of a city", "parameters": {"city": {"type": "string"}}}\n'
    '{"name": "search", "description": "Search the shop", "parameters": {"query": {"type": "string"}}}'
)


# The turns of a chat: role and content, in which {text} stands for the text.
Turns = list[tuple[str, str]]

_WRAPPINGS: dict[str, Turns] = {
    "newlines before": [("user", "\n\n{text}")],
    "spaces before": [("user", "    {text}")],
    "newlines behind": [("user", "{text}\n\n")],
    "spaces behind": [("user", "{text}    ")],
    "code fence": [("user", "```\n{text}\n```")],
    "second turn": [("user", "{text}"), ("assistant", "I see."), ("user", "Thank you.")],
    "earlier turn": [("user", "What is the capital of Italy?"), ("assistant", "It is Rome."), ("user", "{text}")],
}


def wrappings(prompts: PromptFormat) -> dict[str, Turns]:
    """Return twelve wrappings that leave a text as it is, by name. A template without system turns has fewer."""
    try:
        default = _default_system(prompts)
    except ProbeError:
        return _WRAPPINGS
    systems = {"short system prompt": "You sell shoes.", "long system prompt": _LONG_SYSTEM, "tools": _TOOLS}
    if default:
        systems |= {"system prompt in lower case": default.lower(), "system prompt in capitals": default.upper()}
    return _WRAPPINGS | {name: [("system", system), ("user", "{text}")] for name, system in systems.items()}


def wrap(turns: Turns, text: str) -> list[dict[str, str]]:
    """Return a text in a wrapping as chat messages."""
    return [{"role": role, "content": content.replace("{text}", text)} for role, content in turns]


def _default_system(prompts: PromptFormat) -> str:
    """Return the system prompt that the template writes by itself; empty for none."""
    before, _, behind = prompts.render(wrap([("system", "\u2460"), ("user", "\u2461")], "")).partition("\u2460")
    alone = prompts.render(wrap([("user", "\u2461")], ""))
    fits = alone.startswith(before) and alone.endswith(behind) and len(alone) >= len(before) + len(behind)
    return alone[len(before) : len(alone) - len(behind)] if fits else ""


def kept_labels(
    head: ProbeModel, texts: Sequence[str], prompts: PromptFormat, most: int = 200, progress: bool = False
) -> dict[str, Any]:
    """Return how often a head's label stays when a text is wrapped.

    Args:
        head: a head that reads prompts, bound to its backbone.
        texts: texts. Of a head that flags one of two labels, those count to which it gives that.
        prompts: the format of the head.
        most: texts that are wrapped, at most: the first that count.

    Returns:
        `rows`: texts that were wrapped; `kept`: by wrapping the share of them with the same label.

    Raises:
        ProbeError: the head reads replies, is a regression, or the prompts are not chats; or no text counts.
    """
    config = head.config
    if config.reads_reply or config.problem_type == "regression" or prompts.kind != "chat":
        raise ProbeError(
            "wrappings are for heads that label prompts of a chat (token_scope, problem_type, prompt_format)"
        )
    plain = _labels(head, texts, prompts, progress)
    flagged = config.flagged_index
    rows = (np.arange(len(texts)) if flagged is None else np.flatnonzero(plain == flagged))[:most]
    if not len(rows):
        raise ProbeError(
            f"wrappings: the head gives no row the label {config.id2label[flagged]!r}; pass rows that it flags"
        )
    kept = {}
    for name, turns in wrappings(prompts).items():
        if name == "second turn" and config.token_scope == "last_user":
            continue  # such a head reads the second turn alone
        labels = _labels(head, [wrap(turns, texts[row]) for row in rows], prompts, progress)
        kept[name] = float((labels == plain[rows]).reshape(len(rows), -1).all(axis=1).mean())
    return {"rows": len(rows), "kept": kept}


def _labels(head: ProbeModel, texts: Sequence[Any], prompts: PromptFormat, progress: bool) -> np.ndarray:
    dataset = PromptDataset(prompts.encode(texts), np.zeros(len(texts)))
    logits = predict_logits(head, dataset, progress=progress)
    return predictions(probabilities(logits, head.config), head.config).numpy()
