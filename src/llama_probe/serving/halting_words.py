"""What command lines are told of halting: a word a head."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from ..errors import ProbeError


# Names of heads have neither `:` nor `=`. A label that has a `:` is for the second form.
HALTING_FORMS = 'HEAD[:LABEL[:THRESHOLD]] or HEAD={"label": ..., "threshold": 0.6, "patience": 2}'
_WORD = re.compile(r"([\w-]+)(?:=(.*)|:([^:]*)(?::([^:]*))?)?", re.DOTALL)


def read_halting(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`halt_on` (see `llama_probe.serving.halting.Halter`) out of words of `HALTING_FORMS`.

    Raises:
        ProbeError: a word is none of these, or two are of one head.
    """
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        match = _WORD.fullmatch(word)
        head, text, label, threshold = (None,) * 4 if match is None else match.groups()
        try:
            options = json.loads(text) if text is not None else {}
            if threshold is not None:
                options["threshold"] = float(threshold)
        except ValueError:
            options = None
        if head is None or not isinstance(options, dict) or "" in (label, threshold):
            raise ProbeError(f"--halt-on {word!r} must be {HALTING_FORMS}")
        if head in found:
            raise ProbeError(f"--halt-on names {head} more than once: give each head once")
        found[head] = options if label is None else {"label": label, **options}
    return found
