"""The registry of kinds: a head's `probe_type` names a class."""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from ..errors import ProbeError


Kind = TypeVar("Kind", bound=type)

_PROBE_TYPES: dict[str, type[Any]] = {}
_CODE: dict[str, bytes] = {}  # of imported files, by the name of their module
# Kinds of earlier versions, with what is in their place.
_GONE = {"muli": "a baseline of examples/paper"}


def register_probe_type(name: str) -> Callable[[Kind], Kind]:
    """Return a class decorator that makes an `Aggregator` available as `ProbeConfig(probe_type=name)`.

    Raises:
        ValueError: the name already belongs to another class.
    """

    def register(cls: Kind) -> Kind:
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
    """Return the class that is registered under `name`, or raise `ProbeError`."""
    if isinstance(name, str) and name in _GONE and name not in _PROBE_TYPES:
        raise ProbeError(f"probe_type={name!r} is gone: it is {_GONE[name]} now")
    if not isinstance(name, str) or name not in _PROBE_TYPES:
        raise ProbeError(f"probe_type={name!r} is not known; allowed: {', '.join(probe_types())}, your own")
    return _PROBE_TYPES[name]


def import_kinds(path: str | os.PathLike[str]) -> None:
    """Run a Python file that registers kinds of head. It has the rights of this process: run only what you trust."""
    code = Path(path).read_bytes()
    name = f"{Path(path).stem}_{hashlib.sha256(code).hexdigest()[:12]}"
    if name in sys.modules:
        return
    module = sys.modules[name] = ModuleType(name)
    module.__file__, _CODE[name] = str(path), code  # the file may change afterwards
    try:
        SourceFileLoader(name, str(path)).exec_module(module)
    except BaseException:
        del sys.modules[name], _CODE[name]
        raise


def kind_code(probe_type: str) -> bytes | None:
    """Return the source file of a kind from outside the package; None for the package's own and those typed into a session."""
    kind = get_probe_type(probe_type)
    if kind.__module__ in _CODE:
        return _CODE[kind.__module__]
    is_ours = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
    file = None if is_ours or kind.__module__ == "__main__" else inspect.getsourcefile(kind)
    return None if file is None else Path(file).read_bytes()
