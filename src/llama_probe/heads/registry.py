"""The registry of kinds: a head's `probe_type` names a class."""

from __future__ import annotations

from typing import Any

from ..errors import ProbeError


_PROBE_TYPES: dict[str, type[Any]] = {}


def register_probe_type(name: str):
    """Return a class decorator that makes an `Aggregator` available as `ProbeConfig(probe_type=name)`.

    Raises:
        ValueError: the name already belongs to another class.
    """

    def register(cls):
        known = _PROBE_TYPES.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"probe_type {name!r} is taken by {known.__name__}; register under another name")
        _PROBE_TYPES[name] = cls
        return cls

    return register


def probe_types() -> list[str]:
    """Return the names of all registered kinds."""
    return sorted(_PROBE_TYPES)


def get_probe_type(name: str) -> type[Any]:
    """Return the class that is registered under `name`.

    Raises:
        ProbeError: no kind has this name. The message lists those that exist.
    """
    if not isinstance(name, str) or name not in _PROBE_TYPES:
        raise ProbeError(
            f"probe_type={name!r} is not known; allowed: {', '.join(probe_types())}, and your own kinds once imported"
        )
    return _PROBE_TYPES[name]
