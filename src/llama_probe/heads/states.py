"""Hidden states as heads read them: normalised."""

from __future__ import annotations

import torch


_EPS = {"layernorm": 1e-5, "rms": 1e-6}


def normalize(x: torch.Tensor, kind: str | None) -> torch.Tensor:
    """States of any shape `[..., D]` in fp32, normalised over the last dimension: `"layernorm"`, `"rms"` or `"none"`."""
    if kind == "layernorm":
        return torch.layer_norm(x, x.shape[-1:], eps=_EPS[kind])
    if kind == "rms":
        return torch.rms_norm(x, x.shape[-1:], eps=_EPS[kind])
    return x
