"""The entry point by which vLLM finds the model classes with heads, in each of its processes."""

from __future__ import annotations

from .compatibility import ARCHITECTURES, PREFIX


def register() -> None:
    """Register the classes with vLLM, by name: none is imported before it is used, and plain models are not touched."""
    from vllm import ModelRegistry

    for name in ARCHITECTURES:
        ModelRegistry.register_model(PREFIX + name, f"llama_probe.vllm.models:{PREFIX}{name}")
