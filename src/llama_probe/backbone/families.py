"""Model families: where each keeps its embeddings, its layers and its final norm, and which auto class loads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from ..errors import ProbeError


@dataclass(frozen=True)
class Family:
    """Dotted paths of modules, from the model with the LM head.

    Attributes:
        embeddings: the input embeddings.
        layers: the `nn.ModuleList` of decoder layers.
        norm: the norm after the last layer.
        model: the decoder without the LM head; the module that owns the layers, where left out.
    """

    embeddings: str
    layers: str
    norm: str
    model: str | None = None

    @property
    def model_path(self) -> str:
        """Path of the decoder without the LM head."""
        return self.layers.rpartition(".")[0] if self.model is None else self.model

    def within(self) -> Family:
        """The same, from the model without the LM head."""
        embeddings, layers, norm = (path.partition(".")[2] for path in (self.embeddings, self.layers, self.norm))
        return Family(embeddings, layers, norm, self.model_path.partition(".")[2])


_LLAMA = Family("model.embed_tokens", "model.layers", "model.norm")
# A language model inside a wrapper that reads images as well.
_INSIDE = Family("model.language_model.embed_tokens", "model.language_model.layers", "model.language_model.norm")

# By `model_type`. tests/test_families.py has a tiny model of each.
FAMILIES: dict[str, Family] = {
    "deepseek_v3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3": _INSIDE,
    "gemma3_text": _LLAMA,
    "gpt2": Family("transformer.wte", "transformer.h", "transformer.ln_f"),
    "gpt_neox": Family("gpt_neox.embed_in", "gpt_neox.layers", "gpt_neox.final_layer_norm"),
    "gpt_oss": _LLAMA,
    "llama": _LLAMA,
    "llama4": Family("language_model.model.embed_tokens", "language_model.model.layers", "language_model.model.norm"),
    "llama4_text": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_5_vl": _INSIDE,
    "qwen2_vl": _INSIDE,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "qwen3_vl": _INSIDE,
}

_REGISTERED: dict[str, Family] = {}

# How models call their final norm. Others, of embeddings that are added to each layer, may stand beside it.
_NORM_NAMES = ("norm", "final_norm", "final_layernorm", "final_layer_norm", "layer_norm", "ln_f", "norm_f", "ln_out")

# Where the search by structure found the parts of a class: it need not be done anew for each pass.
_FOUND: dict[type, Family] = {}


def register_family(model_type: str, *, embeddings: str, layers: str, norm: str, model: str | None = None) -> None:
    """Says where the models of a family keep what heads read. A type that is known already gets the new paths.

    State 0 is then what enters the first layer, state i the output of layer i, and the last one the output of the norm.
    These count as they are, also where the model lists others with `output_hidden_states`.

    Args:
        model_type: of the config of the model with the LM head.
        embeddings, layers, norm: dotted paths from that model, such as `model.embed_tokens`, `model.layers` (an
            `nn.ModuleList`) and `model.norm`.
        model: path of the decoder without its LM head, which takes `input_ids` and `attention_mask`; the module that owns
            the layers, where left out.

    Raises:
        ProbeError: a path is empty or not dotted names.
    """
    for name, path in (("embeddings", embeddings), ("layers", layers), ("norm", norm), ("model", model)):
        if path is not None and not all(part.isidentifier() or part.isdigit() for part in path.split(".")):
            raise ProbeError(f"{name}={path!r} is no path of a module; give dotted names, such as 'model.layers'")
    _REGISTERED[model_type] = Family(embeddings, layers, norm, model)


@dataclass(frozen=True)
class Parts:
    """The modules that a `Family` names. origin: who said so, `"table"`, `"registered"` or `"search"`."""

    model: nn.Module
    embeddings: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    origin: str


def find_parts(lm: PreTrainedModel, depth: int) -> Parts:
    """The parts of a causal LM: where its family has them, or else the only place that looks like them.

    Args:
        depth: its number of decoder layers.

    Raises:
        ProbeError: it is an encoder-decoder, or its parts are not found; the message says what to add.
    """
    kind, config = type(lm).__name__, lm.config
    if getattr(config, "is_encoder_decoder", False):
        raise ProbeError(
            f"{kind} is an encoder-decoder: its prompt is read by the encoder, and heads read the states of a decoder "
            "that goes on from the prompt. Use a causal LM"
        )
    registered = _REGISTERED.get(config.model_type)
    known = registered or FAMILIES.get(config.model_type)
    if known is not None:
        origin = "table" if registered is None else "registered"
        if (parts := _parts(lm, known, depth, origin) or _parts(lm, known.within(), depth, origin)) is not None:
            return parts
    if registered is not None:
        raise ProbeError(
            f"{kind} has not what register_family({config.model_type!r}, ...) says: {registered.layers} must be a "
            f"ModuleList of {depth} layers, and {registered.embeddings}, {registered.norm} and {registered.model_path} "
            "modules. Register its own paths"
        )
    found = _FOUND.get(type(lm))
    if found is not None and (parts := _parts(lm, found, depth, "search")) is not None:
        return parts
    candidates = list(_search(lm, depth))
    if len(candidates) == 1 and (parts := _parts(lm, candidates[0], depth, "search")) is not None:
        _FOUND[type(lm)] = candidates[0]
        return parts
    seen = ", ".join(f"{candidate.layers} with {candidate.norm}" for candidate in candidates) or "none"
    raise ProbeError(
        f"the layers of {kind} (model_type {config.model_type!r}) were not found: wanted is one ModuleList of {depth} "
        f"layers (num_hidden_layers) and one final norm in the same module; found: {seen}. Say where they are: "
        f'llama_probe.register_family("{config.model_type}", embeddings="model.embed_tokens", layers="model.layers", '
        'norm="model.norm"), with the paths of this model'
    )


def _parts(lm: nn.Module, family: Family, depth: int, origin: str) -> Parts | None:
    try:
        # get_submodule would take longer, and this is done before each pass with heads
        model, embeddings, layers, norm = (
            reduce(getattr, filter(None, path.split(".")), lm)
            for path in (family.model_path, family.embeddings, family.layers, family.norm)
        )
    except AttributeError:
        return None
    if not isinstance(layers, nn.ModuleList) or len(layers) != depth:
        return None
    return Parts(model, embeddings, layers, norm, origin)


def _search(lm: PreTrainedModel, depth: int) -> Iterator[Family]:
    """The places below the decoder where a list of so many layers stands beside one final norm."""
    paths = {module: path for path, module in lm.named_modules()}
    decoder = lm.get_decoder() if hasattr(lm, "get_decoder") else None
    # A wrapper may have as many layers in its image encoder; some models call something else their decoder.
    inside = decoder is not None and any(isinstance(module, nn.ModuleList) for module in decoder.modules())
    embeddings = paths.get(lm.get_input_embeddings())
    if embeddings is None:
        return
    for owner in (decoder if inside else lm).modules():
        if owner not in paths or paths[owner].split(".")[0] == "probes":
            continue
        prefix = f"{paths[owner]}." if paths[owner] else ""
        children = list(owner.named_children())
        for place, (name, child) in enumerate(children):
            if not isinstance(child, nn.ModuleList) or len(child) != depth:
                continue
            norms = [other for other, _ in children if other in _NORM_NAMES] or [
                other for other, module in children[place + 1 :] if "norm" in type(module).__name__.lower()
            ]
            if len(norms) == 1:
                yield Family(embeddings, prefix + name, prefix + norms[0], paths[owner])


def load_causal_lm(pretrained_model_name_or_path, *model_args, **kwargs) -> Any:
    """`AutoModelForCausalLM.from_pretrained`, also for types that only `AutoModelForImageTextToText` has.

    Raises:
        ProbeError: neither has the type.
    """
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        try:
            return auto_class.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except ValueError as error:
            # what the auto classes say, before they read any weights, of a config that they do not have
            if "Unrecognized configuration class" not in str(error):
                raise
    raise ProbeError(
        f"{pretrained_model_name_or_path} is no causal LM: transformers has its type neither in AutoModelForCausalLM nor "
        "in AutoModelForImageTextToText (encoders and encoder-decoders are not). Heads read the states of a decoder that "
        "goes on from the prompt"
    )
