"""The registry of head types: a head's `probe_type` names a class."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from functools import cache
from importlib.machinery import SourceFileLoader
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from ..errors import ProbeError, first_line


HeadType = TypeVar("HeadType", bound=type)

ENTRY_POINTS = "llama_probe.heads"  # the group in which a package names the modules that register its head types
_PROBE_TYPES: dict[str, type[Any]] = {}
# Head types of earlier versions, and what to use instead.
_GONE = {
    "attentive": "train a head of the type multimax in its place",
    "muli": "it is a baseline of examples/paper now",
}


def register_probe_type(name: str) -> Callable[[HeadType], HeadType]:
    """Return a class decorator that makes an `Aggregator` available as `ProbeConfig(probe_type=name)`.

    Raises:
        ValueError: the name already belongs to another class.
    """

    def register(cls: HeadType) -> HeadType:
        known = _PROBE_TYPES.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"probe_type {name!r} is taken by {known.__name__}; register under another name")
        _PROBE_TYPES[name] = cls
        return cls

    return register


def probe_types() -> list[str]:
    """Return the names of all registered head types."""
    return sorted(_PROBE_TYPES)


def get_probe_type(name: str) -> type[Any]:
    """Return the class that is registered under `name`. For the first unknown name, import the modules of other packages.

    Raises:
        ProbeError: no such type is registered, or a module of the entry point group `llama_probe.heads` cannot be loaded.
    """
    if isinstance(name, str):
        if name not in _PROBE_TYPES:
            _load_entry_points()
        if name in _PROBE_TYPES:
            return _PROBE_TYPES[name]
        if name in _GONE:
            raise ProbeError(f"probe_type={name!r} is gone: {_GONE[name]}")
    own = "import the module that registers your own (--import FILE.py), or install its package"
    raise ProbeError(f"probe_type={name!r} is not known; allowed: {', '.join(probe_types())}; {own}")


def is_own_type(name: str) -> bool:
    """Return True if a head type was registered from outside this package."""
    return get_probe_type(name).__module__.partition(".")[0] != __name__.partition(".")[0]


@cache
def _load_entry_points() -> None:
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            raise ProbeError(
                f"{entry.value}, which registers head types (entry point {entry.name!r} of {ENTRY_POINTS}), "
                f"cannot be loaded: {first_line(error)}"
            ) from error


def import_head_types(path: str | os.PathLike[str]) -> None:
    """Run a Python file that registers head types, once. It has the rights of this process: run only files that you trust.

    Raises:
        ProbeError: the file cannot be read, or it raises an error.
    """
    try:
        _run_once(Path(path))
    except Exception as error:
        raise ProbeError(f"{path} cannot be imported: {type(error).__name__}: {first_line(error)}") from error


def _run_once(path: Path) -> None:
    code = path.read_bytes()
    name = f"{path.stem}_{hashlib.sha256(code).hexdigest()[:12]}"
    if name in sys.modules:
        return
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    try:
        SourceFileLoader(name, str(path)).exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
