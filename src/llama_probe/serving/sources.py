"""Load the heads of a `probe=` argument."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backbone.loading import DEMO, check_within_reach, read_target, resolve_backbone
from ..errors import ProbeError
from ..heads.configuration import ProbeConfig, read_config
from ..heads.probe import ProbeModel
from ..hub.folder import is_head_folder
from ..hub.resolve import Target, check_name, check_place, default_name, is_alias, resolve_head, with_subfolder
from ..hub.transport import HubOptions


PROBES_FOLDER = "probes"  # in the folder of a model
SAVED_HEADS = "probe_heads"  # names of the heads there, in the model's config
ProbeSource = str | os.PathLike | ProbeModel
ProbeSpec = ProbeSource | Sequence[ProbeSource] | Mapping[str, ProbeSource]


def named_sources(spec: ProbeSpec | None) -> dict[str, ProbeSource]:
    """Return the sources of a `probe=` argument by head name: the key of a dict, else see `default_name`.

    A `ProbeModel` without a name is called "probe".
    """
    if spec is None:
        spec = []
    elif isinstance(spec, (str, os.PathLike, ProbeModel)):
        spec = [spec]
    elif not isinstance(spec, (Sequence, Mapping)):
        raise ProbeError(f"probe= takes a folder, a Hub id, an alias, a list or a dict, not {type(spec).__name__}")
    sources: dict[str, ProbeSource] = {}
    for name, source in spec.items() if isinstance(spec, Mapping) else [(None, source) for source in spec]:
        if not isinstance(source, ProbeModel):
            check_place(source)
        if name is None:
            name = "probe" if isinstance(source, ProbeModel) else default_name(source)
        if check_name(name) in sources:
            raise ProbeError(f"two heads are called {name!r}; pass a dict name -> head")
        sources[name] = source
    return sources


def read_heads(
    spec: ProbeSpec | None,
    target: Target | None = None,
    options: HubOptions = HubOptions(),  # noqa: B008 - frozen
) -> dict[str, ProbeModel]:
    """Load all heads of a `probe=` argument, by name (see `named_sources`); `resolve_head` explains the others.

    Raises:
        ProbeError: a source is not found or damaged, or a name is not allowed or occurs twice.
    """
    heads: dict[str, ProbeModel] = {}
    for name, source in named_sources(spec).items():
        if not isinstance(source, ProbeModel):
            source = ProbeModel.load_for(source, target, options)
        heads[name] = source
    return heads


@dataclass(frozen=True)
class HeadPlace:
    """A head whose id stands for a model. `source` is its folder, Hub id or alias, with its subfolder."""

    name: str
    source: str | os.PathLike
    revision: str | None
    config: ProbeConfig

    @property
    def backbone(self) -> str:
        """Folder or Hub id of the backbone, which the head must record."""
        if self.config.base_model_name_or_path is None:
            raise ProbeError(f"the head {str(self.source)!r} does not record its backbone: load that, with probe=")
        return self.config.base_model_name_or_path

    def backbone_kwargs(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` for the backbone, from those for the head."""
        others = {key: value for key, value in kwargs.items() if key not in ("subfolder", "revision", "config")}
        commit = self.config.base_model_revision
        return others if commit is None or Path(self.backbone).exists() else {**others, "revision": commit}


def find_head(place: Any, kwargs: Mapping[str, Any]) -> HeadPlace | None:
    """Return the head that a place names, with its `revision` and `subfolder` in `kwargs`; None if it names none."""
    options = HubOptions.beside(kwargs, kwargs.get("revision"))
    try:
        source = with_subfolder(place, kwargs.get("subfolder") or None)
        config = read_config(resolve_head(source, options=options, only_config=True), options.trust_remote_code)
        return HeadPlace(default_name(source), source, kwargs.get("revision"), config)
    except ProbeError:
        return None


def saved_heads(place: str | os.PathLike, config: Any, kwargs: Mapping[str, Any]) -> dict[str, ProbeModel]:
    """Load the heads that `save_pretrained` has kept beside a model, in `probes/NAME`, and that its config lists."""
    names = getattr(config, SAVED_HEADS, None) or []
    inside = "/".join(filter(None, [kwargs.get("subfolder"), PROBES_FOLDER]))
    local = Path(place).is_dir()
    heads = {check_name(name): Path(place, inside, name) if local else f"{place}:{inside}/{name}" for name in names}
    return read_heads(heads, options=HubOptions.beside(kwargs, kwargs.get("revision")))


def place_of_model(place: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return the place with the demo backbone's folder for its names; see `is_demo`. A head in a folder `./demo` stays."""
    return place if place == DEMO and is_head_folder(DEMO) else resolve_backbone(place, kwargs)


def load_or_find_head(load: Callable[[], Any], place: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return what `load` gives, or the `HeadPlace` if the place is that of a head. If it is neither, raise what `load` raises.

    The Hub is not asked for a model with the name of a bundled head.
    """
    is_folder = isinstance(place, (str, os.PathLike)) and os.path.isdir(place)
    is_head = is_head_folder(place) and not Path(place, "config.json").exists() if is_folder else is_alias(place)
    if is_head and (head := find_head(place, kwargs)) is not None:
        return head
    try:
        return load()
    except (OSError, ValueError):
        if (head := find_head(place, kwargs)) is None:
            raise
        return head


def load_with_heads(
    load: Callable[..., Any],
    place: Any,
    args: tuple,
    kwargs: Mapping[str, Any],
    probe: ProbeSpec | None = None,
    revision: str | None = None,
) -> tuple[Any, dict[str, ProbeModel]]:
    """Return what `load(place, *args, **kwargs)` gives, and the heads for it, which are loaded first.

    `token`, `cache_dir` and the offline settings among `kwargs` apply to the heads too. Without `probe`, heads that are saved
    beside the model are loaded. The place of a head stands for its backbone with this head.
    """
    place = place_of_model(place, kwargs)
    check_within_reach(place, kwargs)
    if probe is not None:
        options, sources = HubOptions.beside(kwargs, revision), named_sources(probe)
        target = read_target(place, kwargs, options) if any(map(is_alias, sources.values())) else None
        heads = read_heads(sources, target, options)
        return load(place, *args, **kwargs), heads
    loaded = load_or_find_head(lambda: load(place, *args, **kwargs), place, kwargs)
    if not isinstance(head := loaded, HeadPlace):
        return loaded, saved_heads(place, model_of(loaded).config, kwargs)
    probe, kwargs = {head.name: head.source}, head.backbone_kwargs(kwargs)
    return load_with_heads(load, head.backbone, args, kwargs, probe, head.revision)


def model_of(loaded: Any) -> Any:
    """Return the model that `from_pretrained` gave, be it beside the info of `output_loading_info=True`."""
    return loaded[0] if isinstance(loaded, tuple) else loaded
