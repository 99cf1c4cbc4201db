"""Rules for the values of fields, and the rules of the fields of a `ProbeConfig`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeGuard, get_args

from ..errors import ProbeError
from ..hub.folder import default_label_names
from .turns import TURN_ROLES


REPLY_SCOPES = ("response", "all")
TURN_SCOPES = ("last_user", "user", "turns")
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
Pool = Literal["mean", "max"]
Normalize = Literal["none", "layernorm", "rms"]
TokenScope = Literal["last_user", "user", "turns", "tool", "prompt", "content", "response", "all"]
PROMPT_FORMATS = ("chat", "raw")
UNKNOWN_FORMAT = "unknown"  # of rows that the user has tokenised

# What a field may hold: a description and a check.
Rule = tuple[str, Callable[[object], bool]]

# A guard against hostile files, far above any model: larger sizes are refused before anything is built.
MAX_SIZE = 2**20

# A lone surrogate (from JSON escapes or a non-UTF-8 shell). Tokenizers reject it.
HALF_PAIR = re.compile("[\\ud800-\\udfff]")

# Control characters, line breaks, characters that reorder the text around them, and letters that are never drawn.
_NOT_IN_NAMES = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\U000e0000-\\U000e007f]")


def _is_number(value: object) -> TypeGuard[float]:
    """Return True for an int or a float that is finite. torch takes no larger int."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63


def _is_int(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_SIZE


def _is_even(value: object) -> bool:
    return isinstance(value, int) and _is_int(value, least=0) and value % 2 == 0


def _is_share(value: object) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _are_ids(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(_is_int(index, least=0) for index in value)


def _is_list_of(value: object, holds: Callable[[object], bool]) -> TypeGuard[list[object]]:
    return isinstance(value, list) and value != [] and all(map(holds, value))


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and HALF_PAIR.search(value) is None


def _is_name(value: object) -> bool:
    """Return True for a text that cannot write to a terminal, start a log line, or reorder the text around it."""
    return _is_text(value) and _NOT_IN_NAMES.search(value) is None


def _is_marker(value: object) -> bool:
    if not isinstance(value, dict) or set(value) != {"ids", "skip"}:
        return False
    return value["ids"] != [] and _are_ids(value["ids"]) and _is_int(value["skip"], least=0)


def _are_markers(value: object) -> bool:
    if not isinstance(value, dict) or not {"user", "assistant"} <= set(value) <= set(TURN_ROLES):
        return False
    return all(map(_is_marker, value.values()))


def _are_thresholds(value: object) -> bool:
    if not isinstance(value, dict) or not all(map(_is_share, value.values())):
        return False
    return all(_is_name(name) and name.strip() for name in value)


def _is_novelty(value: object) -> bool:
    if not isinstance(value, dict) or set(value) != {"layers", "rank"}:
        return False
    layers, rank = value["layers"], value["rank"]
    return _are_ids(layers) and layers == sorted(set(layers)) != [] and _is_int(rank)


def _are_layers(value: object) -> bool:
    return value == "all" or (_are_ids(value) and len(set(value)) == len(value) > 0)


def _one_of(*allowed: str) -> Rule:
    return f"one of {', '.join(allowed)}", allowed.__contains__


_SIZE = (f"a whole number from 1 to {MAX_SIZE}", _is_int)
_RATE: Rule = ("a number at least 0 and below 1", lambda value: _is_number(value) and 0 <= value < 1)
_NAME = ("text without line breaks, control characters and characters that reorder text (U+202E)", _is_name)
# Fields that say nothing about scores.
NOT_SCORED = [f"base_model_{name}" for name in ("name_or_path", "revision", "type", "class", "dtype", "quantization")]
NOT_SCORED += ["llama_probe_version", "transformers_version"]

RULES: dict[str, Rule] = {
    "problem_type": _one_of(*get_args(ProblemType)),
    "pool": _one_of(*get_args(Pool)),
    "normalize": _one_of(*get_args(Normalize)),
    "token_scope": _one_of(*get_args(TokenScope)),
    "prompt_format": _one_of(*PROMPT_FORMATS, UNKNOWN_FORMAT),
    "layers": ("'all' or a list of different state indices from 0", _are_layers),
    **dict.fromkeys(("num_labels", "num_attention_heads", "downcast", "max_length"), _SIZE),
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "vocab_size"), _SIZE),
    **dict.fromkeys(("dropout", "layer_dropout"), _RATE),
    "window": (f"an even number of tokens from 0 to {MAX_SIZE}", _is_even),
    # With a smaller temperature, logits of float32 overflow and give NaN.
    "temperature": ("a number above 0, at least 1e-6", lambda value: _is_number(value) and value >= 1e-6),
    "causal": ("True or False", lambda value: isinstance(value, bool)),
    "prefix_ids": ("a list of token ids", _are_ids),
    "turn_markers": (
        "{role: {'ids': [token ids], 'skip': 0 or more}} with the roles user and assistant",
        _are_markers,
    ),
    "threshold": (
        "a number from 0 to 1, a list of these",
        lambda value: _is_share(value) or _is_list_of(value, _is_share),
    ),
    "flagged": (
        "a list of different label names",
        lambda value: _is_list_of(value, _is_name) and len(set(value)) == len(value),
    ),
    "thresholds": ("{name: a number from 0 to 1} with printable names", _are_thresholds),
    "novelty": ("{'layers': [ascending state indices], 'rank': a whole number from 1}", _is_novelty),
    "fingerprint": ("a list of numbers", lambda value: _is_list_of(value, _is_number)),
    "options": ("a dict", lambda value: isinstance(value, dict)),
    "system_prompt": ("text", _is_text),
    **dict.fromkeys((*NOT_SCORED, "chat_template_hash", "weights_sha256"), _NAME),
}


def check_fields(owner: Any, rules: Mapping[str, Rule] = RULES) -> None:
    """Raise `ProbeError` for the first field of a dataclass that breaks its rule. The message names the field and the rule.

    None is allowed where it is the default.

    Args:
        rules: rules of some of the fields, by name. Defaults to the rules of a `ProbeConfig`.
    """
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name)
        if field.name not in rules or (value is None and field.default is None):
            continue
        allowed, holds = rules[field.name]
        if not holds(value):
            raise ProbeError(f"{field.name}={value!r} must be {allowed}")


def named_labels(num_labels: int | None, id2label: dict[int, str] | None) -> tuple[int, dict[int, str]]:
    """Return the number of labels and their names by index, `LABEL_0` and so on without `id2label`."""
    if id2label is None:
        return num_labels or 2, dict(enumerate(default_label_names(num_labels or 2)))
    by_text = {str(index): name for index, name in id2label.items()} if isinstance(id2label, dict) else {}
    if not by_text or by_text.keys() != {str(index) for index in range(len(id2label))}:
        raise ProbeError(f"id2label={id2label!r} must be a dict of label names by index: 0, 1, 2, ...")
    labels = {index: by_text[str(index)] for index in range(len(by_text))}
    if wrong := [name for name in labels.values() if not _is_name(name)]:
        raise ProbeError(f"id2label has the name {wrong[0]!r}; it must be {_NAME[0]}")
    if len(set(labels.values())) != len(labels):
        raise ProbeError(f"id2label has the names {list(labels.values())}; each name must occur once")
    if num_labels not in (None, len(labels)):
        raise ProbeError(f"num_labels={num_labels} but id2label names {len(labels)}; leave num_labels out")
    return len(labels), labels
