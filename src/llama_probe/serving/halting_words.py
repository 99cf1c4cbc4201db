"""Halting rules as a command line spells them. Nothing here takes long to import."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from ..errors import ProbeError


# THRESHOLD is a number or the name of one. A head's name has neither `:` nor `=`. A label with a `:` needs the second form.
HALTING_FORMS = 'HEAD[:LABEL[:THRESHOLD]] or HEAD={"label": ..., "threshold": 0.6, "patience": 2}'
_WORD = re.compile(r"([\w-]+)(?:=(.*)|:([^:]*)(?::([^:]*))?)?", re.DOTALL)


def read_halting(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the `halt_on` that the words of a command line give, each in one of `HALTING_FORMS`.

    Raises:
        ProbeError: a word has another form, or two words name one head.
    """
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        match = _WORD.fullmatch(word)
        head, text, label, threshold = (None,) * 4 if match is None else match.groups()
        try:
            options = json.loads(text) if text is not None else {}
            if threshold is not None:
                options["threshold"] = _number_or_name(threshold)
        except ValueError:
            options = None
        if head is None or not isinstance(options, dict) or "" in (label, threshold):
            raise ProbeError(f"--halt-on {word!r} must be {HALTING_FORMS}")
        if head in found:
            raise ProbeError(f"--halt-on names {head} more than once: give each head once")
        found[head] = options if label is None else {"label": label, **options}
    return found


def _number_or_name(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
