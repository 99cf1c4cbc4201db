"""Load heads, and a backbone with its heads: those of `probe=`, those saved beside it, or the head whose place is given."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..backbone.decoder import target_of
from ..backbone.dtype import settle_dtype
from ..backbone.loading import choose_device, model_of, read_target, resolve_backbone
from ..errors import ProbeError
from ..heads.configuration import read_config
from ..heads.probe import ProbeModel
from ..hub.folder import PROBES_FOLDER
from ..hub.resolve import Target, check_name, check_place, default_name, is_alias, resolve_head, with_subfolder
from ..hub.transport import HubOptions, HubReference


SAVED_HEADS = "probe_heads"  # field of a saved model's config: the names of the heads beside it
ProbeSource = str | os.PathLike | ProbeModel
ProbeSpec = ProbeSource | Sequence[ProbeSource] | Mapping[str, ProbeSource]


def load_with_heads(
    load: Callable[..., Any],
    place: Any,
    args: tuple,
    kwargs: Mapping[str, Any],
    probe: ProbeSpec | None = None,
) -> tuple[Any, dict[str, ProbeModel]]:
    """Return what `load(place, *args, **kwargs)` gives, and the heads to attach to it.

    Without `probe` these are the heads that were saved beside the model. If `place` is a head, its backbone is loaded with
    this head. `token`, `cache_dir` and the offline settings among `kwargs` are used for heads as well.

    Raises:
        ProbeError: a head cannot be read. The backbone is then not loaded.
    """
    options = HubOptions.beside(kwargs)
    place = resolve_backbone(place, options)
    if probe is not None:
        return _load_with_named_heads(load, place, args, kwargs, named_sources(probe))
    # The Hub is not asked for a model that has the name of a bundled head.
    head = _head_at(place, kwargs) if is_alias(place) and not os.path.isdir(place) else None
    if head is None:
        try:
            loaded = _load(load, place, args, kwargs)
        except (OSError, ValueError):
            head = _head_at(place, kwargs)
            if head is None:
                raise
        else:
            return loaded, _saved_heads(place, model_of(loaded).config, kwargs)
    backbone, kwargs, sources = head
    return load_with_heads(load, backbone, args, kwargs, sources)


def _load(load: Callable[..., Any], place: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    loaded = load(place, *args, **kwargs)
    # Without a device map the caller may move the model to an accelerator, if there is one.
    if "device_map" in kwargs or choose_device().type == "cpu":
        settle_dtype(model_of(loaded), kwargs.get("dtype", kwargs.get("torch_dtype")))
    return loaded


def _load_with_named_heads(
    load: Callable[..., Any], place: Any, args: tuple, kwargs: Mapping[str, Any], sources: dict[str, ProbeSource]
) -> tuple[Any, dict[str, ProbeModel]]:
    options = HubOptions.beside(kwargs)
    target = None
    if any(map(is_alias, sources.values())):
        target = read_target(place, kwargs, options)
        if target is None:  # `gguf_file` and remote code tell nothing before the model is loaded
            loaded = _load(load, place, args, kwargs)
            return loaded, read_heads(sources, target_of(model_of(loaded)), options)
    heads = read_heads(sources, target, options)
    return _load(load, place, args, kwargs), heads


def _head_at(place: Any, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, ProbeSource]] | None:
    """Return the backbone, its `kwargs` and the `probe` of the head at a place; None if there is no head."""
    options = HubOptions.beside(kwargs, kwargs.get("revision"))
    try:
        source = with_subfolder(place, kwargs.get("subfolder"))
        config = read_config(resolve_head(source, options=options, only_config=True))
    except ProbeError:
        return None
    backbone = config.base_model_name_or_path
    if backbone is None:
        raise ProbeError(f"the head {str(source)!r} does not record its backbone: load that, with probe=")
    # These of `kwargs` are the head's. The backbone has a revision of its own.
    others = {key: value for key, value in kwargs.items() if key not in ("subfolder", "revision", "config")}
    if config.base_model_revision is not None and not Path(backbone).exists():
        others["revision"] = config.base_model_revision
    reference = HubReference.unless_path(source)
    if reference is not None and reference.revision is None:
        source = str(replace(reference, revision=options.revision))
    return backbone, others, {default_name(source): source}


def _saved_heads(place: str | os.PathLike, config: Any, kwargs: Mapping[str, Any]) -> dict[str, ProbeModel]:
    """Load the heads that `save_pretrained` has kept beside a model, in `probes/NAME`, and that its config lists."""
    names = getattr(config, SAVED_HEADS, None) or []
    inside = PurePosixPath(kwargs.get("subfolder") or "", PROBES_FOLDER)  # "lm/" is "lm", as in transformers
    place = getattr(config, "_name_or_path", None) or place  # of an adapter, its backbone
    heads = {check_name(name): with_subfolder(place, f"{inside}/{name}") for name in names}
    return read_heads(heads, options=HubOptions.beside(kwargs, kwargs.get("revision")))


def named_sources(spec: ProbeSpec) -> dict[str, ProbeSource]:
    """Return the sources of a `probe=` argument by head name: the key of a dict, else see `default_name`.

    A `ProbeModel` without a name is called "probe".
    """
    if isinstance(spec, (str, os.PathLike, ProbeModel)):
        spec = [spec]
    pairs = spec.items() if isinstance(spec, Mapping) else [(None, source) for source in spec]
    sources: dict[str, ProbeSource] = {}
    for name, source in pairs:
        if not isinstance(source, ProbeModel):
            check_place(source)
        if name is None:
            name = "probe" if isinstance(source, ProbeModel) else default_name(source)
        if check_name(name) in sources:
            raise ProbeError(f"two heads are called {name!r}; pass a dict name -> head")
        sources[name] = source
    return sources


def read_heads(
    spec: ProbeSpec,
    target: Target | None = None,
    options: HubOptions = HubOptions(),
) -> dict[str, ProbeModel]:
    """Load all heads of a `probe=` argument by name; see `named_sources`, and `resolve_head` for `target`."""
    heads: dict[str, ProbeModel] = {}
    for name, source in named_sources(spec).items():
        is_loaded = isinstance(source, ProbeModel)
        heads[name] = source if is_loaded else ProbeModel.load_for(source, target, options)
    return heads
