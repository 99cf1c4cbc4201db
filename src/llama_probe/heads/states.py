"""Hidden states as heads read them: normalised, and where nothing else is said in fp32."""

from __future__ import annotations

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
