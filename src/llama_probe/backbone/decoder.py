"""The decoder of a causal LM: its embeddings, layers and final norm."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from ..errors import ProbeError
from ..hub.resolve import Target
from .families import Modules, find_modules


# Config fields of multimodal models with the id of a token that represents part of an image, video or sound.
_PLACEHOLDERS = tuple(f"{what}_token_{field}" for what in ("image", "video", "audio") for field in ("id", "index"))


@dataclass(frozen=True)
class Decoder(Modules):
    """The parts of a causal LM that heads read; see `families.Family` for its modules.

    Attributes:
        origin: how the modules were found: `"table"`, `"registered"` or `"search"`; see `families.find_modules`.
        wrapper: the multimodal model around `model`, if there is one.
        placeholder_ids: ids of the tokens that represent images, videos or sounds in a prompt.
    """

    hidden_size: int
    model_type: str | None
    origin: str = "table"
    wrapper: transformers.PreTrainedModel | None = None
    placeholder_ids: tuple[int, ...] = ()

    @property
    def num_hidden_layers(self) -> int:
        """Number of decoder layers L. There are L + 1 hidden states."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Device of the last hidden state, also for offloaded weights. Heads belong there."""
        device = getattr(getattr(self.norm, "_hf_hook", None), "execution_device", None)
        if device is None:
            # OLMo's norm has no parameters.
            parameters = (p for module in (self.norm, self.layers[-1]) for p in module.parameters())
            device = next((p.device for p in parameters), "cpu")
        return _usable(torch.device("cuda", device) if isinstance(device, int) else torch.device(device))

    @property
    def input_device(self) -> torch.device:
        """Device for token ids."""
        return _usable(next(self.embeddings.parameters()).device)

    @property
    def cache_name(self) -> str:
        """Name of the KV cache among the decoder's arguments and outputs. It depends on the version of transformers."""
        return "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"

    def run(self, **inputs: Any) -> Any:
        """Run the backbone without its LM head on arguments of the decoder, or of its wrapper (`pixel_values`).

        Without `position_ids`, positions are counted from the first token that is not padding, as in `generate()`. Otherwise a
        model with learned positions (GPT-2) would read a prompt after left padding as another prompt.

        Args:
            inputs: the KV cache among them is called `cache`, whatever its name in this version of transformers.
        """
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if "cache" in inputs:
            inputs[self.cache_name] = inputs.pop("cache")
        names = inspect.signature(self.model.forward).parameters
        if self.wrapper is not None and not inputs.keys() <= names.keys():
            if self.wrapper.base_model is not self.wrapper:
                return self.wrapper.base_model(**inputs)
            # Llama 4 has no model without the LM head. The forward of its plain class runs no heads.
            plain = getattr(type(self.wrapper), "_causal_lm_class", type(self.wrapper))
            keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(plain.forward).parameters else {}
            return plain.forward(self.wrapper, **inputs, **keep)
        mask = inputs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and "position_ids" in names and "position_ids" not in inputs:
            is_token = mask.bool()
            if bool((is_token[:, 1:] & ~is_token[:, :-1]).any()):
                width = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"].shape[1]
                positions = (is_token.long().cumsum(dim=1) - 1).masked_fill(~is_token, 0)  # [B, past + T]
                inputs["position_ids"] = positions[:, -width:]
        return self.model(**inputs)

    def whole(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a forward pass, changed so that each layer runs over all tokens.

        A decoder that takes `logits_to_keep` itself (Gemma 4 with shared keys and values) drops tokens after some layer if
        it is a number, but not if it is a tensor of indices.
        """
        keep = inputs.get("logits_to_keep")
        drops = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        if not drops or not isinstance(keep, int) or keep <= 0:
            return inputs
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        return {**inputs, "logits_to_keep": torch.arange(-min(keep, tokens.shape[1]), 0, device=tokens.device)}


def without_peft(lm: nn.Module) -> transformers.PreTrainedModel:
    """Return the causal LM inside a PEFT model, with its adapters. Return any other model as it is."""
    if not isinstance(lm, nn.Module):
        raise ProbeError(f"a backbone must be a loaded model, not {lm!r}: load it with from_pretrained")
    model: Any = lm  # it may be of PEFT, which need not be installed
    return model.get_base_model() if hasattr(lm, "peft_config") and hasattr(lm, "get_base_model") else model


def is_tensor_parallel(lm: nn.Module | None) -> bool:
    """Return True if each process holds a part of every layer (`tp_plan`). All of them must then run the same rows."""
    return lm is not None and (getattr(without_peft(lm), "_tp_size", None) or 1) > 1


def find_decoder(lm: nn.Module) -> Decoder:
    """Find the decoder of a causal LM, also inside a PEFT model."""
    base = without_peft(lm)
    config = base.config.get_text_config(decoder=True)
    modules, origin = find_modules(base, config.num_hidden_layers)
    ids = map(vars(base.config).get, _PLACEHOLDERS)
    return Decoder(
        **vars(modules),
        hidden_size=config.hidden_size,
        model_type=base.config.model_type,
        origin=origin,
        wrapper=None if modules.model in (base, base.base_model) else base,
        placeholder_ids=tuple(value for value in ids if isinstance(value, int)),
    )


def backbone_name(lm: nn.Module) -> str | None:
    """Return the name that a head records of a backbone. An exported or saved model keeps it in its config."""
    config = without_peft(lm).config
    return getattr(config, "base_model_name_or_path", None) or config._name_or_path or None


def target_of(lm: nn.Module) -> Target:
    """Return the target for which a loaded LM's heads are looked up."""
    decoder, config = find_decoder(lm), without_peft(lm).config
    # If one repository has both, the head is taken from the backbone's commit.
    commit, name = getattr(config, "_commit_hash", None), config._name_or_path
    return Target(name or None, decoder.hidden_size, decoder.num_hidden_layers, commit, decoder.model_type)


def _usable(device: torch.device) -> torch.device:
    # Offloaded weights are on the meta device and run on the CPU.
    return torch.device("cpu") if device.type == "meta" else device
