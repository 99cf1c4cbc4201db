"""The one change to transformers: `probe=` in two auto classes and a pipeline task, made when transformers imports them.

`import llama_probe` imports neither torch nor a model class. The first call with `probe=` imports the rest.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def install() -> None:
    """Add `probe=` to `AutoModel` and `AutoModelForCausalLM`, and "probed-text-generation" to `pipeline`.

    Calls without `probe=` are those of transformers. A second call of this function changes nothing.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    for name, change in _CHANGES.items():
        if name in sys.modules:
            change(sys.modules[name])
    sys.meta_path.insert(0, _Finder())


def _add_probe(module: ModuleType) -> None:
    for auto_class in (module.AutoModel, module.AutoModelForCausalLM):
        auto_class.from_pretrained = classmethod(_with_probe(vars(auto_class)["from_pretrained"]))


def _with_probe(original: classmethod) -> Callable[..., Any]:
    @functools.wraps(original.__func__)
    def from_pretrained(cls, *args, probe=None, probe_strict=False, **kwargs):
        if probe is None:
            return original.__get__(None, cls)(*args, **kwargs)
        auto = import_module(".serving.auto", __package__)
        options = {"probe": probe, "probe_strict": probe_strict}
        return auto.AutoModelForProbedGeneration.from_pretrained(*args, **options, **kwargs)

    return from_pretrained


def _register_task(module: ModuleType) -> None:
    import_module(".serving.pipeline", __package__)  # registers it


_CHANGES = {
    "transformers.models.auto.modeling_auto": _add_probe,
    "transformers.pipelines": _register_task,
}


class _Finder(MetaPathFinder):
    """Finds the modules to change, as Python does, and changes them once they are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        change = _CHANGES.get(fullname)
        spec = None if change is None else PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            change(module)

        spec.loader.exec_module = load_and_change  # the loader is of this module alone
        return spec
