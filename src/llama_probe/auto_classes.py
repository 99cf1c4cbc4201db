"""The one change to transformers: heads in the auto classes and pipelines, made when transformers imports these.

`import llama_probe` imports neither torch nor a model class. The first call of a changed class imports the rest.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


# Auto classes whose `from_pretrained` takes heads, by module; the last one has functions alone.
_CLASSES = {
    "transformers.models.auto.modeling_auto": ("AutoModel", "AutoModelForCausalLM"),
    "transformers.models.auto.configuration_auto": ("AutoConfig",),
    "transformers.models.auto.tokenization_auto": ("AutoTokenizer",),
    "transformers.pipelines": (),
}


def install() -> None:
    """Add `probe=` to `AutoModel` and `AutoModelForCausalLM`, heads and `"demo"` to auto classes, and tasks to pipelines.

    Calls without `probe=`, for places that hold a model, reach the original. A second call changes nothing.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    for name in _CLASSES:
        if name in sys.modules:
            _change(sys.modules[name])
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the modules to change, as Python does, and changes them once they are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in _CLASSES else None
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_change(module: ModuleType) -> None:
                load(module)
                _change(module)

            spec.loader.exec_module = load_and_change  # the loader is of this module alone
        return spec


def _change(module: ModuleType) -> None:
    for name in _CLASSES[module.__name__]:
        auto_class = getattr(module, name)
        auto_class.from_pretrained = classmethod(_probed(auto_class, vars(auto_class)["from_pretrained"]))
    if hasattr(module, "PIPELINE_REGISTRY"):
        module.find_adapter_config_file = functools.partial(_find_adapter, module.find_adapter_config_file)
        _serving("pipeline")  # registers its tasks


def _probed(auto_class: type, original: classmethod) -> Callable:
    @functools.wraps(original.__func__)
    def from_pretrained(cls, *args, **kwargs):
        return _serving("auto").from_pretrained(auto_class, original.__get__(None, cls), *args, **kwargs)

    return from_pretrained


def _find_adapter(original: Callable, *args, **kwargs):
    return _serving("auto").find_adapter(original, *args, **kwargs)


def _serving(name: str) -> ModuleType:
    return import_module(f".serving.{name}", __package__)
