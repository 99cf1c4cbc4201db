"""Model families: where the models of each keep their embeddings, layers and final norm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import transformers
from torch import nn

from ..errors import ProbeError


@dataclass(frozen=True)
class Modules:
    """The modules of a causal LM that heads read; see `Family`."""

    model: transformers.PreTrainedModel
    embeddings: nn.Module
    layers: nn.ModuleList
    norm: nn.Module


@dataclass(frozen=True)
class Family:
    """Dotted paths of modules, from the model with the LM head.

    Attributes:
        embeddings: the input embeddings.
        layers: the `nn.ModuleList` of decoder layers.
        norm: the norm after the last layer.
        model: the decoder without the LM head. Defaults to the module that owns the layers.
    """

    embeddings: str
    layers: str
    norm: str
    model: str | None = None

    def modules(self, lm: nn.Module, depth: int) -> Modules | None:
        """Return the modules. Return None if `lm`, with or without its LM head, lacks one or does not have `depth` layers."""
        model = self.layers.rpartition(".")[0] if self.model is None else self.model
        try:
            modules = Modules(*(_follow(lm, path) for path in (model, self.embeddings, self.layers, self.norm)))
        except AttributeError:
            return None
        if lm in (modules.embeddings, modules.norm):  # the path has one name, which does not exist
            return None
        return modules if isinstance(modules.layers, nn.ModuleList) and len(modules.layers) == depth else None


def _follow(lm: nn.Module, path: str) -> Any:
    """Return the module at a path. If `lm` has no LM head, the first name of the path is `lm` itself."""
    first, _, others = path.partition(".")
    # get_submodule is slower, and this runs before each forward pass with heads.
    return reduce(getattr, filter(None, others.split(".")), getattr(lm, first, lm))


_LLAMA = Family("model.embed_tokens", "model.layers", "model.norm")
# An LM inside a multimodal model.
_INSIDE = Family("model.language_model.embed_tokens", "model.language_model.layers", "model.language_model.norm")

# By `model_type`. tests/tiny_families.py has a tiny model of each.
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("deepseek_v3", "gemma", "gemma2", "gemma3_text", "gpt_oss", "llama", "llama4_text"), _LLAMA),
    **dict.fromkeys(("mistral", "mixtral", "olmo", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe"), _LLAMA),
    **dict.fromkeys(("gemma3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"), _INSIDE),
    "gpt2": Family("transformer.wte", "transformer.h", "transformer.ln_f"),
    "gpt_neox": Family("gpt_neox.embed_in", "gpt_neox.layers", "gpt_neox.final_layer_norm"),
    "llama4": Family("language_model.model.embed_tokens", "language_model.model.layers", "language_model.model.norm"),
}

_REGISTERED: dict[str, Family] = {}

# Names of final norms. A decoder may have other norms beside its final one, such as a norm of embeddings.
_NORM_NAMES = ("norm", "final_norm", "final_layernorm", "final_layer_norm", "layer_norm", "ln_f", "norm_f", "ln_out")

# Results of the search, by class.
_FOUND: dict[type, Family] = {}


def register_family(model_type: str, *, embeddings: str, layers: str, norm: str, model: str | None = None) -> None:
    """Register where the models of a family keep what heads read. This replaces the paths of a known family.

    Hidden state 0 is then the input of the first layer, hidden state i the output of layer i, and the last one the output
    of the norm, even if the model lists others with `output_hidden_states`.

    Args:
        model_type: from the config of the model with the LM head.
        embeddings, layers, norm: dotted paths from that model, such as `model.embed_tokens`, `model.layers` (an
            `nn.ModuleList`) and `model.norm`.
        model: path of the decoder without its LM head, which takes `input_ids` and `attention_mask`. Defaults to the
            module that owns the layers.
    """
    _REGISTERED[model_type] = Family(embeddings, layers, norm, model)


def find_modules(lm: transformers.PreTrainedModel, depth: int) -> tuple[Modules, str]:
    """Find the `model`, `embeddings`, `layers` and `norm` of a causal LM with `depth` decoder layers.

    Returns:
        The modules, and how they were found: `"registered"` by `register_family`, in the `"table"`, or by a
        `"search"` for the only place with `depth` layers and a final norm.
    """
    name, model_type = type(lm).__name__, lm.config.model_type
    if getattr(lm.config, "is_encoder_decoder", False):
        raise ProbeError(f"{name} is an encoder-decoder: heads read the hidden states of a causal LM")
    if (family := _REGISTERED.get(model_type)) is not None:
        if (modules := family.modules(lm, depth)) is None:
            wanted = f"a ModuleList {family.layers} of {depth} layers, {family.embeddings} and {family.norm}"
            raise ProbeError(f"{name} does not have the modules of register_family({model_type!r}, ...): {wanted}")
        return modules, "registered"
    for family, origin in ((FAMILIES.get(model_type), "table"), (_FOUND.get(type(lm)), "search")):
        if family is not None and (modules := family.modules(lm, depth)) is not None:
            return modules, origin
    candidates = list(_search(lm, depth))
    if len(candidates) == 1 and (modules := candidates[0].modules(lm, depth)) is not None:
        _FOUND[type(lm)] = candidates[0]
        return modules, "search"
    places = ", ".join(f"{family.layers} with {family.norm}" for family in candidates) or "none"
    raise ProbeError(
        f"the layers of {name} were not found: it must have one ModuleList of {depth} layers beside one final norm "
        f"(found: {places}). Give their paths: llama_probe.register_family({model_type!r}, embeddings=, layers=, norm=)"
    )


def _search(lm: transformers.PreTrainedModel, depth: int) -> Iterator[Family]:
    """Yield the places in the decoder that have a list of `depth` layers beside one final norm."""
    paths = {module: path for path, module in lm.named_modules()}
    embeddings = paths.get(lm.get_input_embeddings())
    if embeddings is None:
        return
    # An image encoder may have as many layers. Some models return another module as their decoder.
    decoder = lm.get_decoder() if hasattr(lm, "get_decoder") else None
    inside = decoder is not None and any(isinstance(module, nn.ModuleList) for module in decoder.modules())
    for owner in (decoder if inside else lm).modules():
        if owner not in paths or paths[owner].split(".")[0] == "probes":
            continue
        prefix = f"{paths[owner]}." if paths[owner] else ""
        children = list(owner.named_children())
        for place, (name, child) in enumerate(children):
            if not isinstance(child, nn.ModuleList) or len(child) != depth:
                continue
            norms = [other for other, _ in children if other in _NORM_NAMES]
            if not norms:
                norms = [other for other, norm in children[place + 1 :] if "norm" in type(norm).__name__.lower()]
            if len(norms) == 1:
                yield Family(embeddings, prefix + name, prefix + norms[0])
