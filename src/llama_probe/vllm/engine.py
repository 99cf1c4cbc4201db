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
    allow_untested_vllm: bool = False,
    import_files: Sequence[str | os.PathLike] = (),
    for_server: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Return arguments of `vllm.LLM`, `EngineArgs` or `AsyncEngineArgs` for a model with heads: `LLM(**engine_kwargs(model, probe=...))`.

    Every request is scored by all heads, or by those that it asks for, in the pass over its prompt, and if they follow
    replies after each token; see `llama_probe.vllm`. The backbone that each head records is compared with `model`; see `check_heads`.

    Args:
        model: folder or Hub id of the backbone; `"demo"` for the demo backbone.
        probe: heads: folders, Hub ids or aliases, one, a list, or a dict of names. They are fetched now; the engine's
            processes read the folders.
        halt_on: requests that get no reply, or part of one: a head's name, several, or a dict of names with `label`,
            `threshold` and for heads that follow replies `patience` and `window`; see `Halter`. They end before their first
            token, or the first that is flagged, is delivered, with the finish reason `"stop"` and the head's name as the stop
            reason. A prompt that such a head cannot score gets no reply either.
        monitor: the same for heads that flag, and halt nothing.
        hold_back: tokens of a reply that are held back until later ones are clear, beside the one without a score.
        probe_strict: raise instead of warn if a head was trained on another backbone, or if the weights cannot be compared.
            Defaults to True with `halt_on`: a guard that means nothing here must not serve.
        compare_fingerprints: compare more than sizes, which reads the weights once.
        allow_untested_vllm: go on with a version of vLLM that was not tested.
        import_files: Python files that register head types of one's own, for the engine's processes. A package registers them by an
            entry point instead; see `import_head_types`.
        for_server: fields of `ProbeSettings` that the server of `python -m llama_probe.vllm` alone heeds.
        kwargs: further arguments of `vllm.LLM`, such as `max_model_len`. Request ids of the form `NUMBER_ID` are those of several
            replies to one prompt.

    Raises:
        ProbeError: vLLM is missing or of another version, an argument, the model's class or a head does not go with the
            others, or with `probe_strict` a head was, or may have been, trained on another backbone.
    """
    check_version(allow_untested_vllm)
    check_arguments(kwargs)
    if callable(halt_on) or callable(monitor):
        raise ProbeError(NO_FUNCTIONS)
    if callable(kwargs.get("hf_overrides")):
        raise ProbeError("hf_overrides is a function; the model class with heads goes into it, so it must be a dict")
    if not isinstance(hold_back, int) or hold_back < 0:
        raise ProbeError(f"hold_back={hold_back!r} must be a number of tokens from 0")
    overrides, additional = kwargs.pop("hf_overrides", None) or {}, kwargs.pop("additional_config", None) or {}
    model = resolve_backbone(os.fspath(model))
    for path in import_files:
        import_head_types(path)
    target = read_target(model, kwargs, HubOptions())
    if target is None or target.hidden_size is None:
        raise ProbeError(f"the config of {model!r} cannot be read, or names no sizes: heads cannot be matched to it")
    hf_config = AutoConfig.from_pretrained(model, revision=target.revision)
    architecture = probed_architecture(hf_config.architectures)
    heads, aliases = {}, {}
    for name, source in named_sources(probe).items():
        if isinstance(source, ProbeModel):
            raise ProbeError(f"probe={name!r} is in memory, and the engine's processes read folders: save it first")
        folder = resolve_head(source, target).resolve()
        aliases[name] = bundled_alias(source, folder)
        _check_head(name, ProbeModel.from_pretrained(folder), target)
        heads[name] = str(folder)
    options = (None if spec is None else options_by_head(spec) for spec in (halt_on, monitor))
    imports = [str(Path(path).resolve()) for path in import_files]
    settings = ProbeSettings(heads, *options, hold_back, import_files=imports, **(for_server or {}))
    settings.check(kwargs.get("speculative_config") is not None)
    probe_strict = halt_on is not None if probe_strict is None else probe_strict
    if compare_fingerprints:
        check_heads(settings.configs, model, target.revision, probe_strict, kwargs.get("download_dir"), aliases)
    # On a GPU vLLM would choose its second model runner, with which heads were not tested.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    from vllm.config import KVTransferConfig

    return {
        "model": model,
        **kwargs,
        "hf_overrides": {**overrides, "architectures": [architecture]},
        # Mistral's repositories have a tokenizer that vLLM prefers, without the chat template that heads were trained on.
        "tokenizer_mode": "hf",
        "scheduler_cls": SCHEDULER,
        "kv_transfer_config": KVTransferConfig(**TRANSFER),
        # With the layers: vLLM tells compiled models apart by what their configs say, and not by what lies in folders.
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
