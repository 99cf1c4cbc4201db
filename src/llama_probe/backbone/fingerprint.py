"""Which backbone a head was trained on, and whether the one at hand is the same.

Names and sizes do not tell a fine-tuned copy from the original. So a head also keeps a fingerprint: a short summary of
the states that its backbone gives to a fixed sequence of tokens. Rounding moves it a little - on SmolLM2-135M-Instruct a
bf16 copy by 0.6 %, 8-bit weights by 2 %, 4-bit weights by 20 to 25 % - and training moves it further the longer it lasts:
5 steps of AdamW at 1e-5 by 1.5 %, 20 steps at 5e-5 by 18 % (`python examples/fingerprint_distances.py`). What is tolerated
depends on the coarser precision of the two sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.prompts import template_hash
from ..errors import ProbeError
from ..heads.configuration import ProbeConfig
from .capture import collect_hidden_states
from .decoder import find_decoder, without_peft
from .state_proof import check_states


logger = logging.get_logger(__name__)

_TOKENS, _DEPTHS, _DIRECTIONS = 32, 4, 8

# Relative distance of two fingerprints that is put down to rounding, by bits a weight of the coarser side.
_TOLERANCES = {32: 0.003, 16: 0.02, 8: 0.06, 4: 0.4}


def fingerprint(lm: nn.Module, vocab_size: int | None = None) -> list[float]:
    """Summary of a backbone's behaviour: 32 numbers, comparable between machines, dtypes and placements.

    The backbone runs once over 32 fixed tokens. States at a quarter, a half, three quarters and the whole of its depth
    are layer-normalised, averaged over all tokens but the first (where many models park outliers), and projected on 8
    fixed random directions.

    Args:
        lm: a causal LM, or a PEFT model around one; put into eval mode for the pass and back.
        vocab_size: the tokens are chosen below it; the backbone's own where left out.
    """
    decoder = find_decoder(lm)
    vocab_size = vocab_size or _vocab_size(lm)
    # multiplicative hashing: far apart, and the same everywhere
    ids = torch.tensor([[(i * 2654435761 + 17) % vocab_size for i in range(1, _TOKENS + 1)]])
    layers = [max(1, round(decoder.num_hidden_layers * k / _DEPTHS)) for k in range(1, _DEPTHS + 1)]
    training = [module for module in lm.modules() if module.training]
    try:
        lm.eval()
        states = collect_hidden_states(lm, sorted(set(layers)), ids)
    finally:
        for module in training:
            module.training = True
    by_layer = dict(zip(sorted(set(layers)), states, strict=True))
    # RandomState's stream is frozen by NumPy's compatibility policy, unlike torch's.
    directions = np.random.RandomState(0).standard_normal((decoder.hidden_size, _DIRECTIONS))
    summary = []
    for layer in layers:
        state = by_layer[layer][0, 1:].float().cpu()  # [n, D]
        mean = F.layer_norm(state, state.shape[-1:]).mean(dim=0).numpy()  # [D]
        summary.append(mean @ directions / np.sqrt(decoder.hidden_size))
    return [round(float(value), 6) for value in np.concatenate(summary)]


def distance(recorded: list[float], found: list[float]) -> float:
    """Relative distance of two fingerprints: 0 for the same behaviour, about 1.4 for unrelated models."""
    if len(recorded) != len(found):
        return float("inf")
    a, b = np.asarray(recorded), np.asarray(found)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-12))


def tolerance(recorded: tuple[str | None, str | None], found: tuple[str | None, str | None]) -> float:
    """The distance that rounding explains between two copies of one model.

    Args:
        recorded, found: dtype and quantisation of each side, as in `ProbeConfig.base_model_dtype` and
            `.base_model_quantization`. The same quantisation on both sides has rounded both alike.
    """
    if recorded[1] == found[1]:
        recorded, found = (recorded[0], None), (found[0], None)
    return _TOLERANCES[min(_bits(*recorded), _bits(*found))]


def describe(lm: nn.Module, config: ProbeConfig) -> ProbeConfig:
    """`config` with everything that a head records of its backbone, for a head that is about to be trained on it.

    Raises:
        ProbeError: the config was made for other sizes, or the backbone's states are not found, see `check_states`, or are no
            numbers.
    """
    config = find_decoder(lm).match(config)
    check_states(lm)
    facts = _facts(lm)
    facts["base_model_name_or_path"] = config.base_model_name_or_path or facts["base_model_name_or_path"]
    found = fingerprint(lm)
    if not np.isfinite(found).all():
        raise ProbeError(
            f"the states of this backbone, in {facts['base_model_dtype']}, are no finite numbers, and no head can read them: its "
            "weights are damaged, or its states too large for its dtype (float32 and bfloat16 hold more than float16)"
        )
    return config.replace(**facts, fingerprint=found)


@dataclass(frozen=True)
class Check:
    """One line of a comparison.

    Attributes:
        field: what is compared.
        recorded, found: its value in the head and in the backbone; `None` where it is not known.
        verdict: `"same"`, `"differs"`, `"unknown"`, or `"explained"` where it differs but the fingerprints agree.
        fatal: whether a head cannot run at all where it differs.
    """

    field: str
    recorded: Any
    found: Any
    verdict: str
    fatal: bool = False


def compare(
    config: ProbeConfig,
    lm: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    behaviour: bool | Callable[[int | None], list[float]] = True,
) -> list[Check]:
    """Compares what a head knows of its backbone with the one at hand, most decisive first.

    Args:
        config: of the head.
        lm: the backbone.
        tokenizer: compares the chat template too.
        behaviour: compare the fingerprints, which runs the backbone over 32 tokens; or what takes its fingerprint for a
            vocabulary size.
    """
    decoder = find_decoder(lm)
    found = _facts(lm)
    checks = [
        Check(name, getattr(config, name), value, _verdict(getattr(config, name), value), fatal=True)
        for name, value in (("hidden_size", decoder.hidden_size), ("num_hidden_layers", decoder.num_hidden_layers))
    ]
    vouched = False
    if config.fingerprint is not None and not any(check.verdict == "differs" for check in checks):
        checks.append(_compare_behaviour(config, lm, found, behaviour))
        vouched = checks[-1].verdict == "same"
    for name, value in found.items():
        recorded = getattr(config, name)
        verdict = _verdict(recorded, value, name)
        # Copies in other dtypes or folders, and commits that leave the weights alone, are no other backbone.
        explained = {"base_model_revision", "base_model_dtype", "base_model_quantization"}
        if value is not None and name == "base_model_name_or_path" and Path(value).is_dir():
            explained.add(name)
        if verdict == "differs" and name in explained and vouched:
            verdict = "explained"
        checks.append(Check(name, recorded, value, verdict))
    if config.prompt_format == "chat" and tokenizer is not None:
        value = template_hash(tokenizer)
        checks.append(
            Check("chat_template_hash", config.chat_template_hash, value, _verdict(config.chat_template_hash, value))
        )
    return checks


def check_backbone(
    name: str,
    config: ProbeConfig,
    lm: nn.Module,
    strict: bool = False,
    behaviour: bool | Callable[[int | None], list[float]] | None = None,
) -> None:
    """Warns, once for a head, of all that tells its backbone from the one it was trained on.

    Args:
        behaviour: see `compare`; where left out, the fingerprints are compared unless weights are offloaded.

    Raises:
        ProbeError: with `strict`, instead of a warning; without, only where the sizes differ, or the backbone's states
            are not found.
    """
    find_decoder(lm).match(config)
    check_states(lm)
    behaviour = _is_loaded(lm) if behaviour is None else behaviour
    differing = [check for check in compare(config, lm, behaviour=behaviour) if check.verdict == "differs"]
    # dtypes by themselves say nothing: a head is trained in one and served in another
    telling = [check for check in differing if check.field not in ("base_model_dtype", "base_model_quantization")]
    if not telling:
        return
    message = f"head {name!r} {', '.join(_explain(check) for check in telling)}: its scores may mean nothing here"
    if strict:
        raise ProbeError(f"{message}. strict=False attaches it with a warning")
    logger.warning(message)


def _explain(check: Check) -> str:
    if check.field == "base_model_name_or_path":
        return f"was trained on {check.recorded}, this backbone is {check.found}"
    if check.field == "fingerprint":
        return f"has a fingerprint {check.found} away from this backbone's (fine-tuned since, or another model?)"
    return f"was trained with {check.field} {check.recorded}, here it is {check.found}"


def _compare_behaviour(
    config: ProbeConfig, lm: nn.Module, found: dict[str, Any], run: bool | Callable[[int | None], list[float]]
) -> Check:
    allowed = tolerance(
        (config.base_model_dtype, config.base_model_quantization),
        (found["base_model_dtype"], found["base_model_quantization"]),
    )
    wanted = f"within {allowed:.1%}"
    fits = config.vocab_size is None or found["vocab_size"] is None or config.vocab_size <= found["vocab_size"]
    if not run or not fits:
        return Check("fingerprint", wanted, None, "unknown")
    here = fingerprint(lm, config.vocab_size) if run is True else run(config.vocab_size)
    apart = distance(config.fingerprint, here)
    return Check("fingerprint", wanted, f"{apart:.2%}", "same" if apart <= allowed else "differs")


def _verdict(recorded: Any, found: Any, name: str = "") -> str:
    if name == "base_model_quantization":  # None means not quantised
        return "same" if recorded == found else "differs"
    if recorded is None or found is None:
        return "unknown"
    if name == "base_model_name_or_path":
        # Copies of one model lie under many paths; the last part of the name is what they share.
        return "same" if Path(recorded).name.lower() == Path(found).name.lower() else "differs"
    return "same" if recorded == found else "differs"


def _facts(lm: nn.Module) -> dict[str, Any]:
    base = without_peft(lm)
    decoder = find_decoder(base)
    # A probed class is its plain class with heads: what matters is the plain one.
    plain = getattr(base, "_causal_lm_class", type(base))
    return {
        # An exported repository has a name of its own, and says in its config whose weights it holds.
        "base_model_name_or_path": getattr(base.config, "base_model_name_or_path", None) or decoder.name_or_path,
        "base_model_revision": getattr(base.config, "_commit_hash", None),
        "base_model_type": decoder.model_type,
        "base_model_class": plain.__name__,
        "vocab_size": _vocab_size(base),
        "base_model_dtype": str(base.dtype).removeprefix("torch."),
        "base_model_quantization": _quantization(base.config),
    }


def _vocab_size(lm: nn.Module) -> int:
    return without_peft(lm).config.get_text_config(decoder=True).vocab_size


def _quantization(config) -> str | None:
    """For instance `bitsandbytes-4bit`; a folder that was dequantised on disk says so in `dequantized_from`."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return getattr(config, "dequantized_from", None)
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = getattr(settings.get("quant_method"), "value", settings.get("quant_method")) or "quantized"
    bits = settings.get("bits") or settings.get("nbits")
    if settings.get("load_in_4bit") or settings.get("_load_in_4bit"):
        bits = 4
    elif settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        bits = 8
    return f"{method}-{bits}bit" if bits else str(method)


def _bits(dtype: str | None, quantization: str | None) -> int:
    if quantization is not None:
        return 8 if "8bit" in quantization or "fp8" in quantization or "int8" in quantization else 4
    if dtype is not None and "float8" in dtype:
        return 8
    return 32 if dtype in ("float32", "float64") else 16


def _is_loaded(lm: nn.Module) -> bool:
    """Whether a pass is cheap: not with weights that are offloaded and would be read from disk for it."""
    return not any(parameter.is_meta for parameter in lm.parameters())
