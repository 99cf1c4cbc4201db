"""Choices that depend on the kind of device: few operations on an accelerator, small tensors on a CPU."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


_ACTING_AS: str | None = None


def device_type(device: torch.device) -> str:
    """Return the type of device, such as `"cpu"` or `"cuda"`, that choices are made for."""
    return _ACTING_AS or device.type


@contextmanager
def acting_as(kind: str) -> Generator[None]:
    """Make the choices of another type of device inside the block, in all threads. For counting operations."""
    global _ACTING_AS
    before, _ACTING_AS = _ACTING_AS, torch.device(kind).type
    try:
        yield
    finally:
        _ACTING_AS = before
