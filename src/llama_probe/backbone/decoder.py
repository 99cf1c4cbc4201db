"""The decoder of a causal LM: its embeddings, layers and final norm."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ProbeError
from ..heads.configuration import ProbeConfig
from .families import find_parts


# Names under which the configs of wrappers keep the ids of tokens that stand for a part of an image, a film or a sound.
_PLACEHOLDERS = tuple(f"{kind}_token_{what}" for kind in ("image", "video", "audio") for what in ("id", "index"))


@dataclass(frozen=True)
class Decoder:
    """The parts of a causal LM that heads read.

    Attributes:
        model: the decoder without its LM head.
        embeddings: its input embeddings.
        layers: the decoder layers, in order.
        norm: the norm after the last layer.
        hidden_size: size of a state.
        name_or_path, model_type: of the backbone's config.
        origin: who said where these are: `"table"`, `"registered"` or `"search"`; see `state_proof`.
        wrapper: what `model` is a part of, where that takes images or the like and puts them between the embeddings.
        placeholder_ids: ids of the tokens that stand for these in a prompt.
    """

    model: nn.Module
    embeddings: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    hidden_size: int
    name_or_path: str | None
    model_type: str | None
    origin: str = "table"
    wrapper: nn.Module | None = None
    placeholder_ids: tuple[int, ...] = ()

    @property
    def num_hidden_layers(self) -> int:
        """Number of decoder layers L; there are L+1 states."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Where the last state appears, and so where heads belong. Right for offloaded weights as well."""
        hook = getattr(self.norm, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        if device is None:
            # OLMo's norm has no parameters
            parameters = (p for module in (self.norm, self.layers[-1]) for p in module.parameters())
            device = next((p.device for p in parameters), torch.device("cpu"))
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def input_device(self) -> torch.device:
        """Where token ids belong."""
        device = next(self.embeddings.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def cache_name(self) -> str:
        """What the decoder calls its cache, as an argument and in its output: older versions of transformers otherwise."""
        return "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"

    def run(self, **inputs: Any) -> Any:
        """Runs the backbone without its LM head.

        Positions are counted as `generate()` counts them, from the first token that is not padding, where none are given:
        models with learned positions (GPT-2) would else see other prompts behind left padding.

        Args:
            inputs: of the decoder, or of the wrapper around it (`pixel_values`); what is `None` is left out.
        """
        inputs = {name: value for name, value in inputs.items() if value is not None}
        names = inspect.signature(self.model.forward).parameters
        if self.wrapper is not None and not inputs.keys() <= names.keys():
            return self._run_wrapper(inputs)
        mask = inputs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and "position_ids" in names and "position_ids" not in inputs:
            counted = mask.bool()
            if bool((counted[:, 1:] & ~counted[:, :-1]).any()):
                width = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"].shape[1]
                positions = (counted.long().cumsum(dim=1) - 1).masked_fill(~counted, 0)  # [B, past + T]
                inputs["position_ids"] = positions[:, -width:]
        return self.model(**inputs)

    def whole(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a pass of the LM, so that each layer runs over all tokens.

        A decoder that takes `logits_to_keep` itself (Gemma 4 with shared keys and values) may leave out the others from some
        layer on, where that is a number; where it names the same tokens one by one, it does not.
        """
        keep = inputs.get("logits_to_keep")
        if (
            not isinstance(keep, int)
            or keep <= 0
            or "logits_to_keep" not in inspect.signature(self.model.forward).parameters
        ):
            return inputs
        tokens = inputs.get("input_ids")
        tokens = inputs["inputs_embeds"] if tokens is None else tokens
        return {**inputs, "logits_to_keep": torch.arange(-min(keep, tokens.shape[1]), 0, device=tokens.device)}

    def _run_wrapper(self, inputs: dict[str, Any]) -> Any:
        inner = self.wrapper.base_model
        if inner is not self.wrapper:
            return inner(**inputs)
        # There is none without the LM head (Llama 4). The plain class's forward: heads that are attached do not run twice.
        plain = getattr(type(self.wrapper), "_causal_lm_class", type(self.wrapper))
        keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(plain.forward).parameters else {}
        return plain.forward(self.wrapper, **inputs, **keep)

    def match(self, config: ProbeConfig) -> ProbeConfig:
        """`config` with the backbone's sizes and name where it has none; `fingerprint.describe` adds the rest.

        Raises:
            ProbeError: it was made for another hidden size or number of layers.
        """
        for name in ("hidden_size", "num_hidden_layers"):
            wanted, found = getattr(config, name), getattr(self, name)
            if wanted is not None and wanted != found:
                made_for = f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else ""
                raise ProbeError(
                    f"{name}={wanted} in the head's config, but this backbone has {found}: "
                    f"the head was made for another model{made_for}"
                )
        return config.replace(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            base_model_name_or_path=config.base_model_name_or_path or self.name_or_path,
            base_model_type=config.base_model_type or self.model_type,
        )


def without_peft(lm: nn.Module) -> nn.Module:
    """The causal LM inside a PEFT model, with its adapters in it; any other comes back as it is."""
    return lm.get_base_model() if hasattr(lm, "peft_config") and hasattr(lm, "get_base_model") else lm


def is_tensor_parallel(lm: nn.Module | None) -> bool:
    """Whether each of several processes has a part of every layer (`tp_plan`), so that all must run it on the same rows."""
    return lm is not None and (getattr(without_peft(lm), "_tp_size", None) or 1) > 1


def find_decoder(lm: nn.Module) -> Decoder:
    """Finds the decoder of a causal LM, also inside a PEFT model.

    Raises:
        ProbeError: it is none, or its parts are not found; see `find_parts`.
    """
    base = without_peft(lm)
    text_config = base.config.get_text_config(decoder=True)
    parts = find_parts(base, text_config.num_hidden_layers)
    ids = map(vars(base.config).get, _PLACEHOLDERS)
    return Decoder(
        model=parts.model,
        embeddings=parts.embeddings,
        layers=parts.layers,
        norm=parts.norm,
        hidden_size=text_config.hidden_size,
        name_or_path=getattr(base.config, "_name_or_path", None) or None,
        model_type=base.config.model_type,
        origin=parts.origin,
        wrapper=None if parts.model in (base, base.base_model) else base,
        placeholder_ids=tuple(value for value in ids if isinstance(value, int)),
    )


def target_of(lm: nn.Module) -> Any:
    """Return the target for which a loaded LM's heads are looked up: its name and sizes."""
    from ..hub.resolve import Target  # at the top once hub no longer imports heads

    decoder = find_decoder(lm)
    return Target(decoder.name_or_path, decoder.hidden_size, decoder.num_hidden_layers)
