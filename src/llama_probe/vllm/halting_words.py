"""Halting rules in the words of a command line. This file imports fast, for `--help`."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from ..errors import ProbeError
from ..files import JSON
from ..hub.folder import head_name


# THRESHOLD is a number or the name of a threshold. HEAD may be the head's folder. A label with a `:` needs the second form.
HALTING_FORMS = 'HEAD[:LABEL[:THRESHOLD]] or HEAD={"label": ..., "threshold": 0.6, "patience": 2}'
_WORD = re.compile(r"([\w.-]+)(?:=(.*)|:([^:]+)(?::([^:]+))?)?", re.DOTALL)
# The end of a judge's URL tells the protocol.
JUDGE_PATHS = MODERATIONS, CHAT, GUARDRAIL = "/moderations", "/chat/completions", "/beta/litellm_basic_guardrail_api"


def read_halting(words: Sequence[str], option: str = "--halt-on") -> dict[str, JSON]:
    """Return `halt_on` for the words of an option, each in one of `HALTING_FORMS`."""
    spec: dict[str, JSON] = {}
    for word in words:
        wrong = ProbeError(f"{option} {word!r} must be {HALTING_FORMS}")
        match = _WORD.fullmatch(word)
        if match is None:
            raise wrong
        folder, text, label, threshold = match.groups()
        options = {} if label is None else {"label": label}
        if text is not None:
            try:
                options = json.loads(text)
            except ValueError:
                raise wrong from None
        if not isinstance(options, dict):
            raise wrong
        head = head_name(folder)
        if head in spec:
            raise ProbeError(f"{option} names {head} more than once: give each head once")
        if threshold is not None:
            with contextlib.suppress(ValueError):  # a word that is no number is the name of a threshold
                threshold = float(threshold)
            options["threshold"] = threshold
        spec[head] = options
    return spec


def read_unsure(words: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return the bands of scores of words `HEAD=LOW:HIGH`, by head."""
    bands: dict[str, tuple[float, float]] = {}
    for word in words:
        folder, _, band = word.partition("=")
        head = head_name(folder)
        try:
            low, high = map(float, band.split(":"))
        except ValueError:
            low = high = 0.0
        if not head or not low < high or head in bands:
            raise ProbeError(f"--unsure {word!r} must be HEAD=LOW:HIGH, LOW below HIGH, once a head")
        bands[head] = low, high
    return bands


def judge_path(url: str) -> str:
    """Return which of `JUDGE_PATHS` the URL of a judge ends with."""
    parts = urlsplit(url)
    path = next((path for path in JUDGE_PATHS if parts.path.endswith(path)), None)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ProbeError("--judge holds a name, a password or a query; a key belongs into LLAMA_PROBE_JUDGE_KEY")
    if parts.scheme not in ("http", "https") or path is None:
        raise ProbeError(f"--judge {url!r} must be http(s)://HOST/... and end with {', '.join(JUDGE_PATHS)}")
    return path
