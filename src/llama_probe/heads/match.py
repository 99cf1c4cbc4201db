"""Compare the backbone that a head records with the backbone that is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import transformers
from torch import nn
from transformers.utils import logging

from ..backbone.capture import check_states
from ..backbone.decoder import backbone_name, find_decoder
from ..backbone.fingerprint import (
    ROUNDING,
    UNRELATED,
    backbone_facts,
    distance,
    fingerprint,
    template_hash,
    tolerance,
)
from ..errors import ProbeError
from ..files import JSON
from ..hub.resolve import model_name, no_bundled_head
from .configuration import ProbeConfig
from .rules import TURN_SCOPES


logger = logging.get_logger(__name__)

SIZES = ("hidden_size", "num_hidden_layers")  # a head cannot run on a backbone of another size
_PRECISION = ("base_model_dtype", "base_model_quantization")
_ANOTHER = "another model"


def match(lm: nn.Module, config: ProbeConfig) -> ProbeConfig:
    """Return `config` with the backbone's sizes, name and type, if the config does not have them. Raise if the sizes differ."""
    decoder = find_decoder(lm)
    for name in SIZES:
        wanted, actual = getattr(config, name), getattr(decoder, name)
        if wanted not in (None, actual):
            base = f"; the head is for {config.base_model_name_or_path}" if config.base_model_name_or_path else ""
            raise ProbeError(f"{name}={wanted} in the head's config, but this backbone has {actual}{base}")
    return config.replace(
        hidden_size=decoder.hidden_size,
        num_hidden_layers=decoder.num_hidden_layers,
        base_model_name_or_path=config.base_model_name_or_path or backbone_name(lm),
        base_model_type=config.base_model_type or decoder.model_type,
    )


def describe(lm: nn.Module, config: ProbeConfig) -> ProbeConfig:
    """Return `config` with all facts that a new head records of its backbone, and its fingerprint."""
    facts = backbone_facts(lm)
    facts["base_model_name_or_path"] = config.base_model_name_or_path or facts["base_model_name_or_path"]
    config = match(lm, config)
    check_states(lm)
    numbers = fingerprint(lm)
    if not np.isfinite(numbers).all():
        raise ProbeError(f"hidden states are not finite in {facts['base_model_dtype']}; use float32 or bfloat16")
    return config.replace(**facts, fingerprint=numbers)


@dataclass(frozen=True)
class Check:
    """One config field of a comparison.

    Attributes:
        recorded, actual: value of the field in the head and in the backbone; `None` if not known.
        verdict: `"same"`, `"differs"`, `"unknown"`, or `"explained"` if the values differ but the fingerprints agree.
        guess: what this backbone may be, as the distance of the fingerprints suggests. None if it is the head's backbone.
    """

    field: str
    recorded: str | int | None
    actual: str | int | None
    verdict: str
    guess: str | None = None


def compare(
    config: ProbeConfig,
    lm: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
    take_fingerprint: Callable[[int | None], list[float]] | None = None,
) -> list[Check]:
    """Compare the backbone that a head records with a loaded backbone. The first entries decide most.

    Args:
        take_fingerprint: returns the backbone's fingerprint for a vocabulary size. Defaults to `fingerprint`, which runs the
            backbone over 32 tokens. Without an argument, a backbone with offloaded weights has no fingerprint.
    """
    decoder = find_decoder(lm)
    facts = backbone_facts(lm)
    checks = [_check_field(config, name, getattr(decoder, name)) for name in SIZES]
    explained: set[str] = set()  # fields that may differ between copies of one backbone
    if config.fingerprint is not None and all(check.verdict != "differs" for check in checks):
        if take_fingerprint is None and not any(parameter.is_meta for parameter in lm.parameters()):
            take_fingerprint = partial(fingerprint, lm)
        checks.append(_compare_fingerprints(config, facts, take_fingerprint))
        if checks[-1].verdict == "same":
            explained = {"base_model_revision", "vocab_size", *_PRECISION}  # a vocabulary may be padded
            path = facts["base_model_name_or_path"]
            if path is not None and Path(path).exists():
                explained.add("base_model_name_or_path")
    checks += [_check_field(config, name, actual, name in explained) for name, actual in facts.items()]
    if config.prompt_format == "chat" and tokenizer is not None:
        checks.append(_check_field(config, "chat_template_hash", template_hash(tokenizer)))
    return checks


def check_backbone(
    name: str,
    config: ProbeConfig,
    lm: nn.Module,
    strict: bool = False,
    take_fingerprint: Callable[[int | None], list[float]] | None = None,
    alias: str | None = None,
) -> None:
    """Log one warning with all differences between this backbone and the backbone of a head.

    Args:
        strict: raise instead of the warning.
        alias: of a bundled head, which is for one backbone and its copies.

    Raises:
        ProbeError: the sizes differ, or `check_states` refuses the backbone. With `alias`, also if the fingerprint is that of
            another model. With `strict`, also if any other field differs.
    """
    match(lm, config)
    check_states(lm)
    if config.token_scope in TURN_SCOPES and config.turn_markers is None and config.prompt_format == "chat":
        logger.warning(f"head {name!r} reads all turns: its chat template has no markers of turns")
    checks = compare(config, lm, take_fingerprint=take_fingerprint)
    apart = next((check.actual for check in checks if check.guess == _ANOTHER), None)
    if alias is not None and apart is not None:
        raise ProbeError(no_bundled_head(alias, backbone_name(lm), f"its fingerprint is {apart} away from theirs"))
    # A head is often trained in one dtype and served in another. This alone needs no warning.
    telling = [check for check in checks if check.verdict == "differs" and check.field not in _PRECISION]
    if not telling:
        return
    message = f"head {name!r} {', '.join(map(_explain, telling))}: its scores may mean nothing here"
    if strict:
        raise ProbeError(f"{message}; without probe_strict this is a warning")
    logger.warning(message)


def _explain(check: Check) -> str:
    if check.field == "base_model_name_or_path":
        return f"was trained on {check.recorded}, this backbone is {check.actual}"
    if check.field == "fingerprint":
        return f"has a fingerprint {check.actual} away from this backbone's ({check.guess}?)"
    return f"was trained with {check.field} {check.recorded}, here it is {check.actual}"


def _compare_fingerprints(
    config: ProbeConfig, facts: JSON, take_fingerprint: Callable[[int | None], list[float]] | None
) -> Check:
    recorded, actual = config.base_model_quantization, facts["base_model_quantization"]
    allowed = tolerance((config.base_model_dtype, recorded), (facts["base_model_dtype"], actual))
    wanted = f"within {allowed:.1%}"
    # The fingerprint's tokens are chosen by the recorded vocabulary. A smaller vocabulary may not have them.
    if config.fingerprint is None or take_fingerprint is None or (config.vocab_size or 0) > facts["vocab_size"]:
        return Check("fingerprint", wanted, None, "unknown")
    apart = distance(config.fingerprint, take_fingerprint(config.vocab_size))
    quantization = actual if actual != recorded else None
    verdict = "same" if apart <= allowed else "differs"
    return Check("fingerprint", wanted, f"{apart:.2%}", verdict, guess=_guess(apart, allowed, quantization))


def _guess(apart: float, allowed: float, quantization: str | None) -> str | None:
    """Return what this backbone may be. `quantization` is that of this backbone, if the head was not trained with it."""
    if apart > UNRELATED:
        return _ANOTHER
    quantised = f"a quantised copy ({quantization})" if quantization else "a quantised copy"
    if apart <= allowed:
        return quantised if quantization else None
    if quantization or apart <= ROUNDING:
        return f"{quantised}, or fine-tuned since"
    return f"fine-tuned since, or {_ANOTHER}"


def _check_field(config: ProbeConfig, name: str, actual: str | int | None, explained: bool = False) -> Check:
    recorded = getattr(config, name)
    is_same = recorded == actual
    if name == "base_model_name_or_path":  # copies of one model have different paths, but often the same last part
        is_same = model_name(str(recorded)) == model_name(str(actual))
    # For the quantization, None means "not quantized". For all other fields, None means "not known".
    if name != "base_model_quantization" and None in (recorded, actual):
        verdict = "unknown"
    elif is_same:
        verdict = "same"
    else:
        verdict = "explained" if explained else "differs"
    return Check(name, recorded, actual, verdict)
