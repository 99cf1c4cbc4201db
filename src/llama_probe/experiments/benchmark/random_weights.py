"""Models of random weights: what they cost to run does not depend on the values, so a config is enough to measure it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel, T5Config

from ...backbone.loading import check_dtype, resolve_backbone
from ...errors import ProbeError


@dataclass(frozen=True)
class Shape:
    """Public dimensions of a model. paper: what stands beside it in the paper's table."""

    config: type[PreTrainedConfig]
    architecture: str
    paper: str | None = None
    values: dict[str, Any] = field(default_factory=dict)

    def create(self) -> PreTrainedConfig:
        """A config of these dimensions."""
        return self.config(architectures=[self.architecture], **self.values)


_LLAMA = {"num_attention_heads": 32, "num_hidden_layers": 32, "hidden_size": 4096, "max_position_embeddings": 8192}

SHAPES = {
    "llama-3b": Shape(
        LlamaConfig,
        "LlamaForCausalLM",
        None,
        {
            "vocab_size": 128256,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
    ),
    "t5-large": Shape(
        T5Config,
        "T5ForConditionalGeneration",
        "T5-large",
        {
            "vocab_size": 32128,
            "d_model": 1024,
            "d_kv": 64,
            "d_ff": 4096,
            "num_layers": 24,
            "num_heads": 16,
            "decoder_start_token_id": 0,
        },
    ),
    "llama-7b": Shape(
        LlamaConfig,
        "LlamaForCausalLM",
        "WildGuard-7B",
        {**_LLAMA, "vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": 32},
    ),
    "llama-8b": Shape(
        LlamaConfig,
        "LlamaForCausalLM",
        "Llama Guard 3 8B",
        {**_LLAMA, "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8},
    ),
}


def read_model_config(name: str, random_weights: bool = False) -> PreTrainedConfig:
    """The config of a model, without its weights.

    Args:
        name: `"demo"`, a folder or a Hub id; with `random_weights` also one of `SHAPES`, which comes first.

    Raises:
        ProbeError: there is none; or random weights would not be of the model's size, because its own are quantised.
    """
    if random_weights and name in SHAPES:
        return SHAPES[name].create()
    try:
        config = AutoConfig.from_pretrained(resolve_backbone(name))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        shapes = ", ".join(SHAPES)
        hint = f"built-in shapes: {shapes}" if random_weights else f"with --random-weights also {shapes}"
        raise ProbeError(
            f"the config of {name!r} cannot be read: {reason} - give a folder or a Hub id; {hint}"
        ) from error
    if random_weights and getattr(config, "quantization_config", None) is not None:
        raise ProbeError(f"{name} is quantised, and random weights are not: leave out --random-weights")
    return config


def model_dtype(config: PreTrainedConfig, dtype: str) -> torch.dtype:
    """The dtype of the weights; with `"auto"` the config's own, or fp32.

    Raises:
        ProbeError: it is not allowed.
    """
    check_dtype(dtype)
    return getattr(torch, dtype) if dtype != "auto" else config.dtype or torch.float32


def random_model(
    auto_class: Any, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A model with fresh weights, made in place in that dtype and on that device, in eval mode.

    Args:
        auto_class: such as `AutoModelForCausalLM`.
    """
    with device:
        return auto_class.from_config(config, dtype=dtype).eval()


def weight_bytes(auto_class: Any, config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of a model's weights, without making them."""
    return held_bytes([random_model(auto_class, config, dtype, torch.device("meta"))])


def held_bytes(models: Iterable[torch.nn.Module]) -> int:
    """Bytes of the parameters of models; shared ones count once."""
    parameters = {id(parameter): parameter for model in models for parameter in model.parameters()}
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; `None` where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None


def check_fits(weights: dict[str, int], device: torch.device) -> None:
    """Refuses models whose weights do not fit beside each other.

    Args:
        weights: bytes by name.

    Raises:
        ProbeError: they need more memory than is free; the message says how much.
    """
    free = free_bytes(device)
    if free is not None and sum(weights.values()) > free:
        parts = " + ".join(f"{size / 1e9:.1f} GB for {name}" for name, size in weights.items())
        raise ProbeError(
            f"the weights do not fit: {parts}, and {free / 1e9:.1f} GB are free on {device}. Choose smaller models, "
            "--dtype bfloat16, or another --device"
        )


def check_length(name: str, config: PreTrainedConfig, tokens: int) -> None:
    """Refuses prompts that are longer than a model has positions for.

    Raises:
        ProbeError: it has fewer.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise ProbeError(f"{name} has {longest} positions, too few for {tokens} tokens: give fewer --tokens")
