"""Probe heads on frozen language models: a label and a text from the same forward pass.

Importing the package gives `transformers.AutoModel.from_pretrained` and `AutoModelForCausalLM.from_pretrained` the argument
`probe=`, and `transformers.pipeline` the task "probed-text-generation"; see `auto_classes`. Names are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .auto_classes import install
from .errors import ProbeError


if TYPE_CHECKING:  # editors, type checkers and the site read these; they are not imported
    from .backbone.families import register_family as register_family
    from .heads.configuration import ProbeConfig as ProbeConfig
    from .heads.decision import ProbeOutput as ProbeOutput
    from .heads.probe import ProbeModel as ProbeModel
    from .serving.auto import AutoModelForProbedGeneration as AutoModelForProbedGeneration
    from .serving.cache import ProbeCache as ProbeCache
    from .serving.halting import HoldBackStreamer as HoldBackStreamer
    from .serving.modeling import LlamaForProbedGeneration as LlamaForProbedGeneration
    from .serving.modeling import ProbedGenerationMixin as ProbedGenerationMixin
    from .serving.outputs import Halt as Halt
    from .serving.outputs import TokenScores as TokenScores
    from .training.arguments import ProbeTrainingArguments as ProbeTrainingArguments
    from .training.trainer import ProbeTrainer as ProbeTrainer


_MODULES = {
    "AutoModelForProbedGeneration": "serving.auto",
    "Halt": "serving.outputs",
    "HoldBackStreamer": "serving.halting",
    "LlamaForProbedGeneration": "serving.modeling",
    "ProbeCache": "serving.cache",
    "ProbeConfig": "heads.configuration",
    "ProbeModel": "heads.probe",
    "ProbeOutput": "heads.decision",
    "ProbeTrainer": "training.trainer",
    "ProbeTrainingArguments": "training.arguments",
    "ProbedGenerationMixin": "serving.modeling",
    "TokenScores": "serving.outputs",
    "register_family": "backbone.families",
}

__all__ = ["ProbeError", "__version__", *_MODULES]


def __getattr__(name: str) -> object:
    if name == "__version__":
        value = import_module(".files", __name__).package_version()
    elif name in _MODULES:
        value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install()
