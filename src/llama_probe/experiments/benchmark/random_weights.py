"""Models that are read in two steps: the config, to check what fits, then the weights, loaded or made at random.

Time and memory do not depend on the values of the weights, so a config is enough to measure a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, T5Config

from ...backbone.loading import check_dtype, load_causal_lm, resolve_backbone
from ...errors import ProbeError


# Public dimensions that random weights take by name, each with its row in the paper's table.
SHAPES = {
    "llama-3b": None,
    "t5-large": "T5-large",
    "llama-7b": "WildGuard-7B",
    "llama-8b": "Llama Guard 3 8B",
}
# vocab_size, hidden_size, intermediate_size, layers, heads, key-value heads, max_position_embeddings, tie_word_embeddings.
_LLAMAS = {
    "llama-3b": (128256, 3072, 8192, 28, 24, 8, 131072, True),
    "llama-7b": (32000, 4096, 11008, 32, 32, 32, 8192, False),
    "llama-8b": (128256, 4096, 14336, 32, 32, 8, 8192, False),
}
_T5_LARGE = {"vocab_size": 32128, "d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16}


def _shape_config(name: str) -> PreTrainedConfig:
    if name == "t5-large":
        return T5Config(architectures=["T5ForConditionalGeneration"], decoder_start_token_id=0, **_T5_LARGE)
    vocab, hidden, intermediate, layers, heads, kv_heads, positions, tied = _LLAMAS[name]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
    )


@dataclass(frozen=True)
class ModelPlan:
    """A model whose config is read and whose weights are not loaded yet.

    Attributes:
        name: `"demo"`, a folder or a Hub id. With `random_weights` also one of `SHAPES`, which comes first.
        auto_class: the class that loads it, such as `AutoModelForCausalLM`.
        random_weights: make the weights instead of loading them.
    """

    name: str
    config: PreTrainedConfig
    dtype: torch.dtype
    random_weights: bool
    auto_class: Any = AutoModelForCausalLM

    @classmethod
    def read(cls, name: str, dtype: str = "auto", random_weights: bool = False) -> ModelPlan:
        """Read the config of a causal LM.

        Args:
            dtype: `"auto"` means the config's own, or fp32.

        Raises:
            ProbeError: there is no such config, the dtype is not allowed, or random weights were asked of a quantised model.
        """
        check_dtype(dtype)
        config = _shape_config(name) if random_weights and name in SHAPES else cls._read_config(name)
        if random_weights and getattr(config, "quantization_config", None) is not None:
            raise ProbeError(f"{name} is quantised, which random weights are not: leave out --random-weights")
        dtype = getattr(torch, dtype) if dtype != "auto" else config.dtype or torch.float32
        return cls(name, config, dtype, random_weights)

    @staticmethod
    def _read_config(name: str) -> PreTrainedConfig:
        try:
            return AutoConfig.from_pretrained(resolve_backbone(name))
        except (OSError, ValueError) as error:
            reason, shapes = str(error).strip().splitlines()[0], ", ".join(SHAPES)
            raise ProbeError(
                f"no config of {name!r}: {reason}. Give a folder, a Hub id or, with --random-weights, {shapes}"
            ) from error

    @property
    def text_config(self) -> PreTrainedConfig:
        """The config of the decoder."""
        return self.config.get_text_config(decoder=True)

    @property
    def paper(self) -> str | None:
        """Its row in the paper's table."""
        return SHAPES.get(self.name) if self.random_weights else None

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights, computed without allocating them."""
        return held_bytes([self._make(torch.device("meta"))])

    def load(self, device: torch.device) -> PreTrainedModel:
        """Load or make the weights. Return the model in eval mode, on its device.

        Raises:
            ProbeError: the weights cannot be loaded.
        """
        if self.random_weights:
            return self._make(device)
        load = load_causal_lm if self.auto_class is AutoModelForCausalLM else self.auto_class.from_pretrained
        try:
            return load(resolve_backbone(self.name), dtype=self.dtype).to(device).eval()
        except (OSError, ValueError) as error:
            raise ProbeError(f"{self.name!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error

    def _make(self, device: torch.device) -> PreTrainedModel:
        with device:
            return self.auto_class.from_config(self.config, dtype=self.dtype).eval()

    def check_length(self, tokens: int) -> None:
        """Check that the model has positions for so many tokens.

        Raises:
            ProbeError: it has fewer.
        """
        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and tokens > longest:
            raise ProbeError(f"{self.name} has {longest} positions, too few for {tokens} tokens: give fewer --tokens")


def held_bytes(models: Iterable[torch.nn.Module]) -> int:
    """Return the bytes of all parameters. Shared parameters count once."""
    parameters = {id(parameter): parameter for model in models for parameter in model.parameters()}
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes, or `None` if it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")  # Linux
    if device.type != "cpu" or not meminfo.is_file():
        return None
    found = (line.split() for line in meminfo.read_text(encoding="ascii").splitlines())
    return next((1024 * int(words[1]) for words in found if words[0] == "MemAvailable:"), None)


def check_fits(plans: Iterable[ModelPlan], device: torch.device) -> None:
    """Check that the weights of several models fit beside each other.

    Raises:
        ProbeError: they need more memory than is free.
    """
    weights, free = {plan.name: plan.weight_bytes for plan in plans}, free_bytes(device)
    if free is not None and sum(weights.values()) > free:
        parts = " + ".join(f"{size / 1e9:.1f} GB for {name}" for name, size in weights.items())
        raise ProbeError(f"weights need {parts}, and {free / 1e9:.1f} GB are free on {device}: choose smaller models")
