"""The models of a benchmark, known by their config before any weights are loaded or made at random.

Time and memory do not depend on the values of the weights, so a config is enough to measure a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import transformers

from ...backbone.loading import load_causal_lm, resolve_backbone
from ...errors import ProbeError, first_line


# Public dimensions that random weights take by name. llama-7b has those of WildGuard, llama-8b those of Llama Guard 3.
_T5 = "vocab_size d_model d_kv d_ff num_layers num_heads"
_LLAMA = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings tie_word_embeddings"
)
_SIZES = {
    "t5-large": (_T5, 32128, 1024, 64, 4096, 24, 16),
    "llama-3b": (_LLAMA, 128256, 3072, 8192, 28, 24, 8, 131072, True),
    "llama-7b": (_LLAMA, 32000, 4096, 11008, 32, 32, 32, 8192, False),
    "llama-8b": (_LLAMA, 128256, 4096, 14336, 32, 32, 8, 8192, False),
}
SHAPES = tuple(_SIZES)

# Endings of the architectures that can guard, with the auto classes that load them.
_CAUSAL_LM = "AutoModelForCausalLM"
_GUARDS = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForCausalLM": _CAUSAL_LM,
    "LMHeadModel": _CAUSAL_LM,
}


def _shape_config(name: str) -> transformers.PreTrainedConfig:
    names, *values = _SIZES[name]
    sizes = dict(zip(names.split(), values, strict=True))
    if names is _T5:
        return transformers.T5Config(architectures=["T5ForConditionalGeneration"], decoder_start_token_id=0, **sizes)
    return transformers.LlamaConfig(architectures=["LlamaForCausalLM"], **sizes)


@dataclass(frozen=True)
class ModelPlan:
    """A model whose config is read and whose weights are not loaded yet.

    Attributes:
        name: `"demo"`, a folder or a Hub id. With `random_weights` also one of `SHAPES`, which comes first.
        random_weights: make the weights instead of loading them.
        auto_class: name of the class of transformers that loads it.
    """

    name: str
    config: transformers.PreTrainedConfig
    dtype: torch.dtype
    random_weights: bool
    auto_class: str = _CAUSAL_LM

    @classmethod
    def read(cls, name: str, dtype: str, random_weights: bool, tokens: int, guards: bool = False) -> ModelPlan:
        """Read the config of a causal LM or of a guard.

        Args:
            dtype: `"auto"` means the config's own, or fp32.
            tokens: longest prompt that the model will run over.
            guards: allow a sequence classifier and an encoder-decoder as well.

        Raises:
            ProbeError: there is no such config, the model has too few positions, it neither classifies nor generates, or
                random weights were asked of a quantised model.
        """
        try:
            if random_weights and name in SHAPES:
                config = _shape_config(name)
            else:
                config = transformers.AutoConfig.from_pretrained(resolve_backbone(name))
        except (OSError, ValueError) as error:
            shapes = f"a folder, a Hub id or, with --random-weights, one of {', '.join(SHAPES)}"
            raise ProbeError(f"no config of {name!r}: {first_line(error)}. Give {shapes}") from error
        if random_weights and getattr(config, "quantization_config", None) is not None:
            raise ProbeError(f"{name} is quantised, which random weights are not: leave out --random-weights")
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and tokens > longest:
            raise ProbeError(f"{name} has {longest} positions, too few for {tokens} tokens: give fewer --tokens")
        auto_class, architectures = _CAUSAL_LM, config.architectures or []
        if guards:
            suited = (made for ending, made in _GUARDS.items() if any(a.endswith(ending) for a in architectures))
            if (auto_class := next(suited, None)) is None:
                raise ProbeError(f"{name} is no guard: architectures={architectures}; allowed: {', '.join(_GUARDS)}")
        own = config.dtype or torch.float32
        return cls(name, config, own if dtype == "auto" else getattr(torch, dtype), random_weights, auto_class)

    @property
    def text_config(self) -> transformers.PreTrainedConfig:
        """The config of the decoder."""
        return self.config.get_text_config(decoder=True)

    def load(self, device: torch.device) -> transformers.PreTrainedModel:
        """Load or make the weights, in eval mode on the device."""
        auto_class = getattr(transformers, self.auto_class)
        if self.random_weights:
            with device:
                return auto_class.from_config(self.config, dtype=self.dtype).eval()
        load = load_causal_lm if self.auto_class == _CAUSAL_LM else auto_class.from_pretrained
        try:
            return load(resolve_backbone(self.name), dtype=self.dtype).to(device).eval()
        except (OSError, ValueError) as error:
            raise ProbeError(f"{self.name!r} cannot be loaded: {first_line(error)}") from error


def held_bytes(models: Iterable[torch.nn.Module]) -> int:
    """Return the bytes of all parameters. Shared parameters count once."""
    parameters = {id(parameter): parameter for model in models for parameter in model.parameters()}
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())


def ask_guard(
    guard: transformers.PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Return one answer a prompt: a classifier's logits, or ids with one new token. Only its cost matters.

    Args:
        input_ids (`[B, T]`): ids of any vocabulary. They are mapped into the guard's own.
        attention_mask (`[B, T]`).
    """
    ids = input_ids % guard.config.get_text_config().vocab_size
    if not guard.can_generate():
        if guard.config.pad_token_id is None:  # a classifier on a decoder reads the last token that is not padding
            guard.config.pad_token_id = 0
        with torch.no_grad():
            return guard(input_ids=ids, attention_mask=attention_mask).logits
    return guard.generate(ids, attention_mask=attention_mask, max_new_tokens=1, do_sample=False, pad_token_id=0)
