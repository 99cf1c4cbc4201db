"""The share of flagged requests that a head still flags in another wrapping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..data.prompts import PromptFormat
from ..data.states import PromptDataset
from ..errors import ProbeError
from ..heads.decision import predictions, probabilities
from ..heads.probe import ProbeModel
from .report import predict_logits


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


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _under(system: str, text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, _user(text)]


def wrappings(prompts: PromptFormat) -> dict[str, Callable[[str], list[dict[str, str]]]]:
    """Return functions from a text to a chat, by name: twelve things that leave the text as it is.

    A template without system turns has fewer.
    """
    found = {
        "newlines before": lambda text: [_user(f"\n\n{text}")],
        "spaces before": lambda text: [_user(f"    {text}")],
        "newlines behind": lambda text: [_user(f"{text}\n\n")],
        "spaces behind": lambda text: [_user(f"{text}    ")],
        "code fence": lambda text: [_user(f"```\n{text}\n```")],
        "second turn": lambda text: [_user(text), {"role": "assistant", "content": "I see."}, _user("Thank you.")],
        "earlier turn": lambda text: [
            _user("What is the capital of Italy?"),
            {"role": "assistant", "content": "It is Rome."},
            _user(text),
        ],
    }
    try:
        default = _default_system(prompts)
    except ProbeError:
        return found
    systems = {"short system prompt": "You sell shoes.", "long system prompt": _LONG_SYSTEM, "tools": _TOOLS}
    if default:
        systems |= {"system prompt in lower case": default.lower(), "system prompt in capitals": default.upper()}
    return found | {name: lambda text, system=system: _under(system, text) for name, system in systems.items()}


def _default_system(prompts: PromptFormat) -> str:
    """Return the system prompt that the template writes by itself; empty for none."""
    before, _, behind = prompts.render(_under("\u2460", "\u2461")).partition("\u2460")
    alone = prompts.render([_user("\u2461")])
    fits = alone.startswith(before) and alone.endswith(behind) and len(alone) >= len(before) + len(behind)
    return alone[len(before) : len(alone) - len(behind)] if fits else ""


def kept_labels(
    head: ProbeModel, texts: Sequence[str], prompts: PromptFormat, most: int = 200, progress: bool = False
) -> dict[str, Any]:
    """Return how often a head's label stays when a text is wrapped.

    Args:
        head: a head that reads prompts, bound to its backbone.
        texts: texts. Of a head with two labels, those count to which it gives label 1.
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
    rows = np.arange(len(texts))
    if config.num_labels == 2 and config.problem_type == "single_label_classification":
        rows = np.flatnonzero(plain == 1)
    rows = rows[:most]
    if not len(rows):
        raise ProbeError(f"wrappings: the head gives no row the label {config.id2label[1]!r}; pass rows that it flags")
    kept = {}
    for name, wrap in wrappings(prompts).items():
        if name == "second turn" and config.token_scope == "last_user":
            continue  # such a head reads the second turn alone
        found = _labels(head, [wrap(texts[row]) for row in rows], prompts, progress)
        kept[name] = float((found == plain[rows]).reshape(len(rows), -1).all(axis=1).mean())
    return {"rows": len(rows), "kept": kept}


def _labels(head: ProbeModel, texts: Sequence[Any], prompts: PromptFormat, progress: bool) -> np.ndarray:
    dataset = PromptDataset(prompts.encode(texts), np.zeros(len(texts)))
    return predictions(
        probabilities(predict_logits(head, dataset, progress=progress), head.config), head.config
    ).numpy()
