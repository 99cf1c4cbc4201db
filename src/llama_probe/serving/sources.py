"""Load the heads of a `probe=` argument."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ProbeError
from ..heads.probe import ProbeModel
from ..hub.resolve import Target, check_name, check_place, default_name, is_alias, resolve_head
from ..hub.transport import HubOptions


ProbeSource = str | os.PathLike | ProbeModel
ProbeSpec = ProbeSource | Sequence[ProbeSource] | Mapping[str, ProbeSource]


def named_sources(spec: ProbeSpec | None) -> dict[str, ProbeSource]:
    """Return the sources of a `probe=` argument by head name: the key of a dict, else see `default_name`.

    Raises:
        ProbeError: a source has another type, or a name is not allowed or occurs twice.
    """
    pairs = list(spec.items()) if isinstance(spec, Mapping) else [(None, source) for source in _as_list(spec)]
    sources: dict[str, ProbeSource] = {}
    for name, source in pairs:
        if not isinstance(source, ProbeModel):
            check_place(source)
            name = name if name is not None else default_name(source)
        if check_name(name) in sources:
            raise ProbeError(f"two heads are called {name!r}; pass a dict name -> head")
        sources[name] = source
    return sources


def read_heads(
    spec: ProbeSpec | None,
    target: Target | None = None,
    options: HubOptions = HubOptions(),  # noqa: B008 - frozen
    namespace: str | None = None,
) -> dict[str, ProbeModel]:
    """Load all heads of a `probe=` argument, before any model is changed.

    Args:
        spec: a source of `resolve_head` or a `ProbeModel`, a list of these, or a dict name -> one of these.
        target, options, namespace: see `resolve_head`.

    Returns:
        Heads by name; see `named_sources`.

    Raises:
        ProbeError: a source is not found or damaged, or a name is not allowed or occurs twice.
    """
    return {
        name: source
        if isinstance(source, ProbeModel)
        else ProbeModel.from_pretrained(
            resolve_head(source, target, options, namespace), trust_remote_code=options.trust_remote_code
        )
        for name, source in named_sources(spec).items()
    }


def load_heads_for(
    backbone: str | os.PathLike,
    spec: ProbeSpec | None,
    kwargs: Mapping[str, Any],
    revision: str | None = None,
    namespace: str | None = None,
) -> dict[str, ProbeModel]:
    """Load heads for a backbone that is not loaded yet; see `read_heads`.

    Args:
        backbone: folder or Hub id.
        spec: heads.
        kwargs: keyword arguments of the backbone's `from_pretrained`. Its token, cache and offline settings apply.
        revision, namespace: of the heads.
    """
    options = HubOptions.beside(kwargs, revision)
    sources = named_sources(spec)
    target = Target.read(backbone, kwargs, options) if any(map(is_alias, sources.values())) else None
    return read_heads(sources, target, options, namespace)


def _as_list(spec: Any) -> list[Any]:
    if spec is None:
        return []
    if isinstance(spec, (str, os.PathLike, ProbeModel)):
        return [spec]
    if isinstance(spec, Sequence):
        return list(spec)
    raise ProbeError(f"probe= takes a folder, a Hub id, an alias, a list or a dict, not {type(spec).__name__}")
