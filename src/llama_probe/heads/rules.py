"""Rules for the fields of a `ProbeConfig`: the values that each may hold."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Literal, get_args

from ..errors import ProbeError
from .turns import TURN_ROLES


REPLY_SCOPES = ("response", "all")
TURN_SCOPES = ("last_user", "user", "turns")
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
Pool = Literal["mean", "max"]
Normalize = Literal["none", "layernorm", "rms"]
TokenScope = Literal["last_user", "user", "turns", "prompt", "content", "response", "all"]
RenderedFormat = Literal["chat", "raw"]
PROMPT_FORMATS = get_args(RenderedFormat)
UNKNOWN_FORMAT = "unknown"  # of rows that the user has tokenised

# A guard against hostile files, far above any model: larger sizes are refused before anything is built.
MAX_SIZE = 2**20

# A lone surrogate (from JSON escapes or a non-UTF-8 shell). Tokenizers reject it.
HALF_PAIR = re.compile("[\\ud800-\\udfff]")

# Control characters, line breaks, characters that reorder the text around them, and letters that are never drawn.
_NOT_IN_NAMES = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\U000e0000-\\U000e007f]")


def _is_int(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_SIZE


def _is_number(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**63  # torch takes no larger int
    return isinstance(value, float) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_list(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(holds, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and HALF_PAIR.search(value) is None


def _is_name(value: Any) -> bool:
    """Return True for a text that cannot write to a terminal, start a log line, or reorder the text around it."""
    return _is_text(value) and _NOT_IN_NAMES.search(value) is None


def _is_id(value: Any) -> bool:
    return _is_int(value, least=0)


def _is_marker(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"ids", "skip"}:
        return False
    return value["ids"] != [] and _is_list(value["ids"], _is_id) and _is_int(value["skip"], least=0)


def _one_of(*allowed: str) -> tuple[str, Callable[[Any], bool]]:
    return f"one of {', '.join(allowed)}", lambda value: value in allowed


def _or_none(rule: tuple[str, Callable[[Any], bool]]) -> tuple[str, Callable[[Any], bool]]:
    return f"{rule[0]}, or None", lambda value: value is None or rule[1](value)


_SIZE = (f"a whole number from 1 to {MAX_SIZE}", _is_int)
_RATE = ("a number at least 0 and below 1", lambda value: _is_number(value) and 0 <= value < 1)
_NAME = ("text without line breaks, control characters and characters that reorder text (U+202E)", _is_name)
_MARKERS = (
    "{role: {'ids': [token ids], 'skip': 0 or more}} with the roles user and assistant",
    lambda value: (
        isinstance(value, dict)
        and {"user", "assistant"} <= set(value) <= set(TURN_ROLES)
        and all(map(_is_marker, value.values()))
    ),
)
_THRESHOLDS = (
    "{name: a number from 0 to 1} with printable names",
    lambda value: (
        isinstance(value, dict)
        and all(_is_name(name) and name.strip() for name in value)
        and all(map(_is_share, value.values()))
    ),
)
_NOVELTY = (
    "{'layers': [ascending state indices], 'rank': a whole number from 1}",
    lambda value: (
        isinstance(value, dict)
        and set(value) == {"layers", "rank"}
        and _is_list(value["layers"], _is_id)
        and value["layers"] == sorted(set(value["layers"])) != []
        and _is_int(value["rank"])
    ),
)
_THRESHOLD = ("a number from 0 to 1, a list of these", lambda value: _is_share(value) or _is_list(value, _is_share))
_LAYERS = (
    "'all' or a list of different state indices from 0",
    lambda value: value == "all" or (_is_list(value, _is_id) and len(set(value)) == len(value) > 0),
)
_NUMBERS = ("a list of numbers", lambda value: _is_list(value, _is_number) and value != [])

# The rule of each field: a description and a check.
RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "problem_type": _one_of(*get_args(ProblemType)),
    "pool": _one_of(*get_args(Pool)),
    "normalize": _one_of(*get_args(Normalize)),
    "token_scope": _one_of(*get_args(TokenScope)),
    "prompt_format": _one_of(*PROMPT_FORMATS, UNKNOWN_FORMAT),
    "layers": _LAYERS,
    "num_attention_heads": _SIZE,
    "downcast": _SIZE,
    "hidden_size": _or_none(_SIZE),
    "num_hidden_layers": _or_none(_SIZE),
    "vocab_size": _or_none(_SIZE),
    "max_length": _or_none(_SIZE),
    "dropout": _RATE,
    "layer_dropout": _RATE,
    # With a smaller one, logits of float32 overflow and give NaN.
    "temperature": ("a number above 0, at least 1e-6", lambda value: _is_number(value) and value >= 1e-6),
    "causal": ("True or False", lambda value: isinstance(value, bool)),
    "prefix_ids": ("a list of token ids", lambda value: _is_list(value, _is_id)),
    "turn_markers": _or_none(_MARKERS),
    "threshold": _or_none(_THRESHOLD),
    "thresholds": _or_none(_THRESHOLDS),
    "novelty": _or_none(_NOVELTY),
    "fingerprint": _or_none(_NUMBERS),
    "options": ("a dict", lambda value: isinstance(value, dict)),
    "system_prompt": _or_none(("text", _is_text)),
    **dict.fromkeys(("chat_template_hash", "base_model_name_or_path", "base_model_revision"), _or_none(_NAME)),
    **dict.fromkeys(("base_model_type", "base_model_class", "base_model_dtype"), _or_none(_NAME)),
    **dict.fromkeys(("base_model_quantization", "weights_sha256"), _or_none(_NAME)),
    **dict.fromkeys(("llama_probe_version", "transformers_version"), _or_none(_NAME)),
}


def check_fields(values: dict[str, Any]) -> None:
    """Raise `ProbeError` for the first field that breaks its rule. The message names the field and what is allowed."""
    for name, (allowed, holds) in RULES.items():
        if not holds(values[name]):
            raise ProbeError(f"{name}={values[name]!r} must be {allowed}")


def named_labels(num_labels: int | None, id2label: dict[int, str] | None) -> tuple[int, dict[int, str]]:
    """Return the number of labels and their names by index, `LABEL_0` and so on if they have none.

    Raises:
        ProbeError: the indices are not 0, 1, 2, ..., a name is not allowed or occurs twice, or the two fields disagree.
    """
    if not (num_labels is None or _is_int(num_labels)):
        raise ProbeError(f"num_labels={num_labels!r} must be {_SIZE[0]}")
    if id2label is None:
        return num_labels or 2, {index: f"LABEL_{index}" for index in range(num_labels or 2)}
    try:
        labels = {int(index): name for index, name in id2label.items() if str(int(index)) == str(index)}
    except (AttributeError, TypeError, ValueError):
        labels = {}
    if not labels or sorted(labels) != list(range(len(id2label))):
        raise ProbeError(f"id2label={id2label!r} must be a dict of label names by index: 0, 1, 2, ...")
    if wrong := [name for name in labels.values() if not _is_name(name)]:
        raise ProbeError(f"id2label has the name {wrong[0]!r}; it must be {_NAME[0]}")
    if len(set(labels.values())) != len(labels):
        raise ProbeError(f"id2label has the names {list(labels.values())}; each name must occur once")
    if num_labels not in (None, len(labels)):
        raise ProbeError(f"num_labels={num_labels} but id2label names {len(labels)}; leave num_labels out")
    return len(labels), dict(sorted(labels.items()))
