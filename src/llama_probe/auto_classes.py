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


_PIPELINES = "transformers.pipelines"
# Auto classes whose `from_pretrained` takes heads, by module.
_CLASSES = {
    "transformers.models.auto.modeling_auto": ("AutoModel", "AutoModelForCausalLM"),
    "transformers.models.auto.configuration_auto": ("AutoConfig",),
    "transformers.models.auto.tokenization_auto": ("AutoTokenizer",),
}


def install() -> None:
    """Add `probe=` to `AutoModel` and `AutoModelForCausalLM`, heads and `"demo"` to auto classes, and tasks to pipelines.

    Calls without `probe=`, for places that hold a model, reach the original. A second call changes nothing.
    """
    for name in (*_CLASSES, _PIPELINES):
        if name in sys.modules:
            _change(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the modules to change, as Python does, and changes them once they are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (*_CLASSES, _PIPELINES):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_change(module: ModuleType) -> None:
                load(module)
                _change(module)

            spec.loader.exec_module = load_and_change  # the loader is of this module alone
        return spec


def _change(module: ModuleType) -> None:
    if module.__name__ == _PIPELINES:
        if not hasattr(original := module.find_adapter_config_file, "__without_probe__"):
            module.find_adapter_config_file = _adapted(original)
            _serving("pipeline")  # registers its tasks
        return
    for name in _CLASSES[module.__name__]:
        auto_class = getattr(module, name)
        original = vars(auto_class)["from_pretrained"]
        if not hasattr(original.__func__, "__without_probe__"):
            auto_class.from_pretrained = classmethod(_probed(auto_class, original))


def _probed(auto_class: type, original: classmethod) -> Callable:
    @functools.wraps(original.__func__)
    def from_pretrained(cls, *args, **kwargs):
        return _serving("auto").from_pretrained(auto_class, original.__get__(None, cls), *args, **kwargs)

    from_pretrained.__without_probe__ = original
    return from_pretrained


def _adapted(original: Callable) -> Callable:
    @functools.wraps(original)
    def find_adapter_config_file(*args, **kwargs):
        return _serving("auto").find_adapter(original, *args, **kwargs)

    find_adapter_config_file.__without_probe__ = original
    return find_adapter_config_file


def _serving(name: str) -> ModuleType:
    return import_module(f".serving.{name}", __package__)
