"""The arguments that make a vLLM engine with heads."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..backbone.loading import read_target, resolve_backbone
from ..errors import ProbeError
from ..heads import import_head_types
from ..heads.probe import ProbeModel
from ..hub.resolve import Target, bundled_alias, resolve_head
from ..hub.transport import HubOptions
from ..serving.halting import HaltSpec, options_by_head
from ..serving.loading import ProbeSpec, named_sources
from .backbone_check import check_heads
from .cache_plan import grows
from .compatibility import KEY, SCHEDULER, TRANSFER, check_arguments, check_version, probed_architecture
from .patches import choose_model_runner
from .settings import NO_FUNCTIONS, ProbeSettings


def engine_kwargs(
    model: str | os.PathLike,
    probe: ProbeSpec,
    *,
    halt_on: HaltSpec | None = None,
    monitor: HaltSpec | None = None,
    hold_back: int = 0,
    probe_strict: bool | None = None,
    compare_fingerprints: bool = True,
    strict_versions: bool = False,
    import_files: Sequence[str | os.PathLike] = (),
    for_server: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM`, `EngineArgs` or `AsyncEngineArgs` for a model with heads.

        llm = LLM(**engine_kwargs("demo", probe="safety"))

    The heads score each request while the engine reads its prompt. Heads that follow replies also score each token of the reply.
    A request may name the heads that score it. `check_heads` compares the backbone that each head records with `model`.

    Args:
        model: folder or Hub id of the backbone; `"demo"` for the demo backbone.
        probe: one head, a list of heads, or a dict of names and heads. A head is a folder, a Hub id or an alias. This function
            fetches the heads, and the engine's processes read their folders.
        halt_on: the heads that block prompts and end replies: a name, a list of names, or a dict of names with `label`,
            `threshold`, and for heads that follow replies `patience` and `window`; see `Halter`. A blocked prompt gets no token,
            and a reply ends before its first flagged token is delivered. The finish reason is `"stop"`, and the stop reason is the
            head's name. A prompt that such a head cannot score is blocked too.
        monitor: heads that flag by the same rules, and halt nothing.
        hold_back: number of tokens of a reply that are held back until later tokens are clear, besides the newest one, which
            has no score yet.
        probe_strict: raise an error, not a warning, if a head was trained on another backbone, or if the weights cannot be
            compared. Defaults to True with `halt_on`: a guard must not serve where its scores mean nothing.
        compare_fingerprints: compare fingerprints as well as sizes, which reads the weights once.
        strict_versions: refuse releases of vLLM and transformers that are newer than the tested ones, instead of a warning.
        import_files: Python files that register head types, for all processes of the engine. A package registers its types by an
            entry point; see `import_head_types`.
        for_server: fields of `ProbeSettings` that only the server of `python -m llama_probe.vllm` uses.
        kwargs: further arguments of `vllm.LLM`, such as `max_model_len`. vLLM gives several replies to one prompt the request ids
            `NUMBER_ID`, so a request id of your own must not have this form.

    Returns:
        A dict of keyword arguments.

    Raises:
        ProbeError: vLLM is missing or has another version; an argument, the model's class or a head does not go with the
            others; with `probe_strict`, a head was, or may have been, trained on another backbone.
    """
    check_version(strict_versions)
    check_arguments(kwargs)
    if callable(halt_on) or callable(monitor):
        raise ProbeError(NO_FUNCTIONS)
    if callable(kwargs.get("hf_overrides")):
        raise ProbeError("hf_overrides is a function; the model class with heads goes into it, so it must be a dict")
    if not isinstance(hold_back, int) or hold_back < 0:
        raise ProbeError(f"hold_back={hold_back!r} must be a number of tokens from 0")
    overrides = kwargs.pop("hf_overrides", None) or {}
    additional = kwargs.pop("additional_config", None) or {}
    model = resolve_backbone(os.fspath(model))
    for path in import_files:
        import_head_types(path)
    target = read_target(model, kwargs, HubOptions())
    if target is None or target.hidden_size is None:
        raise ProbeError(f"the config of {model!r} cannot be read, or names no sizes: heads cannot be matched to it")
    hf_config = AutoConfig.from_pretrained(model, revision=target.revision)
    architecture = probed_architecture(hf_config.architectures)
    heads: dict[str, str] = {}
    aliases: dict[str, str | None] = {}
    for name, source in named_sources(probe).items():
        if isinstance(source, ProbeModel):
            raise ProbeError(f"probe={name!r} is in memory, and the engine's processes read folders: save it first")
        folder = resolve_head(source, target).resolve()
        aliases[name] = bundled_alias(source, folder)
        _check_head(name, ProbeModel.from_pretrained(folder), target)
        heads[name] = str(folder)
    settings = ProbeSettings(
        heads,
        halt_on=None if halt_on is None else options_by_head(halt_on),
        monitor=None if monitor is None else options_by_head(monitor),
        hold_back=hold_back,
        import_files=[str(Path(path).resolve()) for path in import_files],
        **(for_server or {}),
    )
    settings.check(kwargs.get("speculative_config") is not None)
    if probe_strict is None:
        probe_strict = halt_on is not None
    if compare_fingerprints:
        check_heads(settings.configs, model, target.revision, probe_strict, kwargs.get("download_dir"), aliases)
    from vllm.config import KVTransferConfig

    choose_model_runner()

    return {
        "model": model,
        **kwargs,
        "hf_overrides": {**overrides, "architectures": [architecture]},
        # In Mistral's repositories vLLM prefers a tokenizer without the chat template that heads were trained on.
        "tokenizer_mode": "hf",
        "scheduler_cls": SCHEDULER,
        "kv_transfer_config": KVTransferConfig(**TRANSFER),
        # vLLM tells compiled models apart by their configs and reads no head folder, so the config names the layers.
        "additional_config": {**additional, KEY: asdict(settings), f"{KEY}_layers": settings.layers},
    }


def _check_head(name: str, head: ProbeModel, target: Target) -> None:
    config = head.config
    if not target.fits(config.hidden_size, config.num_hidden_layers):
        sizes = f"hidden_size={config.hidden_size}, num_hidden_layers={config.num_hidden_layers}"
        raise ProbeError(f"head {name!r} has {sizes}; the model has {target.hidden_size}, {target.num_hidden_layers}")
    if config.reads_reply and grows(head):
        served = "gate, multimax, last, pooling"
        raise ProbeError(f"head {name!r} follows replies as {config.probe_type!r}; vLLM serves {served}")
