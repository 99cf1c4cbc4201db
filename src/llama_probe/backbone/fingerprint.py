"""Summarizes what a backbone computes in 32 numbers, to tell a fine-tuned copy from the original.

Rounding moves a fingerprint a little: on SmolLM2-135M-Instruct a bf16 copy by 0.6 %, 8-bit weights by 2 %, 8-bit weights
and activations by 7 %, 4-bit weights by 20 to 25 %. Training moves it further: 5 steps of AdamW at 1e-5 by 1.5 %, 20 steps at
5e-5 by 18 % (`python examples/fingerprint_distances.py`). The tolerance depends on the coarser precision of the two sides.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from ..files import JSON
from .capture import collect_hidden_states
from .decoder import backbone_name, find_decoder, without_peft


_TOKENS, _DEPTHS, _DIRECTIONS = 32, 4, 8

# Largest relative distance that rounding explains, by bits a weight of the coarser side.
_TOLERANCES = {32: 0.003, 16: 0.02, 8: 0.1, 4: 0.4}
ROUNDING = max(_TOLERANCES.values())
UNRELATED = 0.8  # farther apart than copies that are fine-tuned; unrelated models are at about 1.4


def fingerprint(lm: nn.Module, vocab_size: int | None = None) -> list[float]:
    """Return 32 numbers that summarize a backbone, comparable between machines, dtypes and devices.

    The backbone runs once, in eval mode, over 32 fixed tokens below `vocab_size`, which defaults to its own. The hidden states
    at a quarter, a half, three quarters and the whole of its depth are layer-normalized, averaged over the tokens, and
    projected on 8 fixed random directions.
    """
    decoder = find_decoder(lm)
    vocab_size = vocab_size or _vocab_size(lm)
    # Multiplicative hashing spreads the ids, and gives the same ones everywhere.
    ids = torch.tensor([[(i * 2654435761 + 17) % vocab_size for i in range(1, _TOKENS + 1)]])
    layers = [max(1, round(decoder.num_hidden_layers * k / _DEPTHS)) for k in range(1, _DEPTHS + 1)]
    training = [module for module in lm.modules() if module.training]
    try:
        lm.eval()
        states = collect_hidden_states(lm, layers, ids)
    finally:
        for module in training:
            module.training = True
    # NumPy keeps the stream of RandomState fixed; torch does not promise this.
    directions = np.random.RandomState(0).standard_normal((decoder.hidden_size, _DIRECTIONS))
    summary = []
    for hidden in states:
        # First token is skipped: many models park outliers there.
        hidden = hidden[0, 1:].float().cpu()  # [n, D]
        mean = F.layer_norm(hidden, hidden.shape[-1:]).mean(dim=0).numpy()  # [D]
        summary.append(mean @ directions / np.sqrt(decoder.hidden_size))
    return [round(float(value), 6) for value in np.concatenate(summary)]


def distance(recorded: list[float], actual: list[float]) -> float:
    """Return the relative distance of two fingerprints: 0 for equal ones, about 1.4 for unrelated models."""
    if len(recorded) != len(actual):
        return float("inf")
    a, b = np.asarray(recorded), np.asarray(actual)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-12))


def tolerance(recorded: tuple[str | None, str | None], actual: tuple[str | None, str | None]) -> float:
    """Return the distance that rounding explains between two copies of one model.

    Args:
        recorded, actual: dtype and quantization of each side, as in `ProbeConfig.base_model_dtype` and
            `ProbeConfig.base_model_quantization`. Equal quantization on both sides adds no distance.
    """
    if recorded[1] == actual[1]:
        recorded, actual = (recorded[0], None), (actual[0], None)
    return _TOLERANCES[min(_bits(*recorded), _bits(*actual))]


def template_hash(tokenizer: transformers.PreTrainedTokenizerBase) -> str | None:
    """Return the sha256 of a tokenizer's chat template, or None if it has no template."""
    template = tokenizer.chat_template
    return hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None


def backbone_facts(lm: nn.Module) -> JSON:
    """Return what a head records of its backbone beside sizes and fingerprint, by `ProbeConfig` field."""
    base = without_peft(lm)
    config = base.config
    return {
        "base_model_name_or_path": backbone_name(base),
        "base_model_revision": getattr(config, "_commit_hash", None),
        "base_model_type": config.model_type,
        # A probed class adds heads to a plain class, and the plain one is recorded.
        "base_model_class": getattr(type(base), "_causal_lm_class", type(base)).__name__,
        "vocab_size": _vocab_size(base),
        "base_model_dtype": str(base.dtype).removeprefix("torch."),
        "base_model_quantization": _quantization(base),
    }


def _vocab_size(lm: nn.Module) -> int:
    return without_peft(lm).config.get_text_config(decoder=True).vocab_size


def _quantization(lm: transformers.PreTrainedModel) -> str | None:
    """Return method and bits of quantised weights, such as `bitsandbytes-4bit`."""
    settings = getattr(lm.config, "quantization_config", None)
    if settings is None:
        # `torchao.quantization.quantize_` changes the weights, and not the config.
        packed = next((weight for weight in lm.parameters() if type(weight).__module__.startswith("torchao.")), None)
        if packed is None:
            return getattr(lm.config, "dequantized_from", None)  # set for GGUF files in `loading.py`
        settings = {"quant_method": "torchao", "quant_type": (type(packed), getattr(packed, "target_dtype", None))}
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = getattr(settings.get("quant_method"), "value", settings.get("quant_method")) or "quantized"
    # torchao names the types of weights and activations, `Int8WeightOnlyConfig` or `torch.int4`; bitsandbytes sets a flag.
    flags = [name for name, is_set in settings.items() if "load_in_" in name and is_set]
    widths = re.findall(r"(?:int|float|load_in_)(\d+)", str([settings.get("quant_type"), *flags]).lower())
    bits = settings.get("bits") or settings.get("nbits") or min(map(int, widths), default=None)
    return f"{method}-{bits}bit" if bits else str(method)


def _bits(dtype: str | None, quantization: str | None) -> int:
    if quantization is not None:
        return 8 if any(name in quantization for name in ("8bit", "fp8", "int8")) else 4
    if dtype is not None and "float8" in dtype:
        return 8
    return 32 if dtype in ("float32", "float64") else 16
