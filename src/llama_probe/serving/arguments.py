"""The arguments of one call of `generate()`, and the settings that they give with its config and the model's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..errors import ProbeError


# Arguments of `generate()` that transformers does not have.
HEAD_ARGUMENTS = ("probes", "probe_mask", "halt_on", "halt_reply", "on_probe_token", "probe_state", "abstain_at")


class GenerateCall:
    """One call of the plain `generate()`, with its arguments.

    Raises:
        ProbeError: a config has an argument of heads. It takes any name, and nothing would be halted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: torch.Tensor | None,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
    ):
        self.model, self.inputs, self.generation_config, self.kwargs = model, inputs, generation_config, kwargs
        for config in (generation_config, model.generation_config):
            if found := [name for name in HEAD_ARGUMENTS if getattr(config, name, None) is not None]:
                raise ProbeError(f"{found[0]} in a generation_config: pass it to generate() itself, {found[0]}=...")

    @property
    def input_ids(self) -> torch.Tensor | None:
        """Token ids of the prompts; `None` if there are embeddings alone."""
        is_ids = self.inputs is not None and self.inputs.dim() == 2
        return self.inputs if is_ids else self.kwargs.get("input_ids")

    def setting(self, name: str) -> Any:
        """Return the value of a setting from the arguments, their config or the model's config, else `None`."""
        if name in self.kwargs:
            return self.kwargs[name]
        sources = (getattr(self.generation_config, name, None), getattr(self.model.generation_config, name, None))
        return next((value for value in sources if value is not None), None)

    def change(self, name: str, value: Any) -> None:
        """Change a setting: in a copy of the config if there is one, because transformers deprecates settings beside it."""
        if self.generation_config is None or name in self.kwargs:
            self.kwargs[name] = value
        else:
            self.generation_config = copy.deepcopy(self.generation_config)
            setattr(self.generation_config, name, value)


def token_ids(value: Any) -> list[int]:
    """Return the token ids in a setting such as `eos_token_id`: none, one or several."""
    if isinstance(value, torch.Tensor):
        value = value.flatten().tolist()
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def on_host(tensors: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return tensors on the CPU. Those of one device and one kind of number come in one copy: each waits for the device.

    Values that are no tensors stay.
    """
    copies = dict(tensors)
    groups: dict[tuple, list] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "cpu":
            kind = tensor.dtype if tensor.is_floating_point() else torch.long
            groups.setdefault((tensor.device, kind), []).append(name)
    for (_, kind), names in groups.items():
        flat = torch.cat([tensors[name].detach().to(kind).flatten() for name in names]).cpu()
        for name, part in zip(names, flat.split([tensors[name].numel() for name in names]), strict=True):
            copies[name] = part.view(tensors[name].shape).to(tensors[name].dtype)
    return copies
