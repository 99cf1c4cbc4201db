"""Arguments of one call of `generate()`, and the settings that they give with its config and the model's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..errors import ProbeError


# Arguments of `generate()` that transformers does not have.
HEAD_ARGUMENTS = ("probes", "probe_mask", "halt_on", "halt_reply", "on_probe_token", "probe_state", "abstain_at")


def refuse_in_config(generation_config: GenerationConfig | None) -> None:
    """Raise `ProbeError` if a config has an argument of heads: it takes any name, and nothing would be halted."""
    found = [name for name in HEAD_ARGUMENTS if getattr(generation_config, name, None) is not None]
    if found:
        raise ProbeError(f"{', '.join(found)} in a generation_config: pass it to generate() itself, {found[0]}=...")


def with_setting(
    generation_config: GenerationConfig | None, kwargs: dict[str, Any], name: str, value: Any
) -> GenerationConfig | None:
    """Set a setting of a call of `generate()`: in a copy of its config if it has one, else in `kwargs`. Return the config.

    transformers deprecates settings beside a config.
    """
    if generation_config is None or name in kwargs:
        kwargs[name] = value
        return generation_config
    generation_config = copy.deepcopy(generation_config)
    setattr(generation_config, name, value)
    return generation_config


def generation_setting(model: PreTrainedModel, generation_config: GenerationConfig | None, kwargs: Mapping, name: str):
    """Return the value of a setting from the arguments, their config or the model's config, else `None`."""
    if name in kwargs:
        return kwargs[name]
    sources = (getattr(generation_config, name, None), getattr(model.generation_config, name, None))
    return next((value for value in sources if value is not None), None)


def token_ids(value) -> list[int]:
    """Return the token ids in a setting such as `eos_token_id`: none, one or several."""
    if isinstance(value, torch.Tensor):
        value = value.flatten().tolist()
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
