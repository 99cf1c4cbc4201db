"""Hidden states as heads read them: normalised, and where nothing else is said in fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def normalize(x: torch.Tensor, kind: str | None) -> torch.Tensor:
    """Return states of any shape `[..., D]`, normalised over the last dimension: `"layernorm"`, `"rms"` or `"none"`.

    In half precision the result is rounded, and what it is calculated from is not.
    """
    if kind == "layernorm":
        return torch.layer_norm(x, x.shape[-1:], eps=1e-5)
    if kind == "rms":
        return torch.rms_norm(x, x.shape[-1:], eps=1e-6)
    return x


def without_autocast(method: Callable) -> Callable:
    """Switch `torch.autocast`, which is meant for the LM, off in a method of an object with a `device`."""

    @functools.wraps(method)
    def apart(self, *args, **kwargs):
        if not torch.is_autocast_enabled(self.device.type):
            return method(self, *args, **kwargs)
        with torch.autocast(self.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return apart
