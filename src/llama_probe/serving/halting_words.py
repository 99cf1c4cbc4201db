"""Halting rules as a command line spells them. Nothing here takes long to import."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from typing import Any

from ..errors import ProbeError


# THRESHOLD is a number or the name of one. A head's name has neither `:` nor `=`. A label with a `:` needs the second form.
HALTING_FORMS = 'HEAD[:LABEL[:THRESHOLD]] or HEAD={"label": ..., "threshold": 0.6, "patience": 2}'
_WORD = re.compile(r"([\w-]+)(?:=(.*)|:([^:]+)(?::([^:]+))?)?", re.DOTALL)


def read_halting(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the `halt_on` that the words of a command line give, each in one of `HALTING_FORMS`.

    Raises:
        ProbeError: a word has another form, or two words name one head.
    """
    spec: dict[str, dict[str, Any]] = {}
    for word in words:
        match = _WORD.fullmatch(word)
        head, text, label, threshold = (None,) * 4 if match is None else match.groups()
        try:
            options = json.loads(text) if text is not None else {} if label is None else {"label": label}
        except ValueError:
            options = None
        if head is None or not isinstance(options, dict):
            raise ProbeError(f"--halt-on {word!r} must be {HALTING_FORMS}")
        if head in spec:
            raise ProbeError(f"--halt-on names {head} more than once: give each head once")
        if threshold is not None:
            with contextlib.suppress(ValueError):  # else the name of a threshold
                threshold = float(threshold)
            options["threshold"] = threshold
        spec[head] = options
    return spec
