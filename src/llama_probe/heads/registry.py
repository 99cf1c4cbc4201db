"""The registry of kinds: a head's `probe_type` names a class."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType
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


def import_kinds(path: str | os.PathLike) -> ModuleType:
    """Run a Python file that registers kinds of head. It has the rights of this process: run only what you trust.

    Raises:
        ProbeError: there is no such file, or it registers no kind.
    """
    path, before = Path(path), set(_PROBE_TYPES.values())
    if not path.is_file():
        raise ProbeError(f"{path} is not a file; give a Python file that registers a kind with register_probe_type")
    name = f"{path.stem}_{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    _lend_package()
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    if set(_PROBE_TYPES.values()) == before:
        raise ProbeError(f"{path} registers no kind of head: decorate its class with register_probe_type")
    return module


def kind_code(probe_type: str) -> bytes | None:
    """Return the source file of a kind from outside the package; None for the package's own and those typed into a session."""
    kind = get_probe_type(probe_type)
    own = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
    file = None if own or kind.__module__ == "__main__" else inspect.getsourcefile(kind)
    return None if file is None else Path(file).read_bytes()


def _lend_package() -> None:
    """Let `from llama_probe.heads import ...` find this code if it runs out of a Hub repository, without the package."""
    if "llama_probe" in sys.modules or importlib.util.find_spec("llama_probe") is not None:
        return
    for name in ("llama_probe", "llama_probe.heads"):
        sys.modules[name] = sys.modules[get_probe_type("gate").__module__]
