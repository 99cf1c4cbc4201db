"""Probe heads on frozen language models: a label and a text from the same forward pass.

Importing the package teaches `transformers.AutoModel.from_pretrained` and `AutoModelForCausalLM.from_pretrained` the
argument `probe=`, and `transformers.pipeline` the task "probed-text-generation"; other calls are not changed.
"""

import importlib
import sys
from typing import Any

import llama_probe_command

from .errors import ProbeError


if sys.argv[:1] == ["-m"] and "llama_probe.vllm" in sys.orig_argv:  # Python looks for the module that it is to run
    llama_probe_command.starting = True
# Commands import what they need, because all of this takes seconds: too long for `--help` or a refusal.
if not llama_probe_command.starting:
    from .backbone.families import register_family
    from .files import package_version
    from .heads.configuration import ProbeConfig
    from .heads.decision import ProbeOutput
    from .heads.probe import ProbeModel
    from .serving import auto, pipeline
    from .serving.auto import AutoModelForProbedGeneration
    from .serving.cache import ProbeCache
    from .serving.halting import Reprompt
    from .serving.modeling import LlamaForProbedGeneration, ProbedGenerationMixin
    from .serving.outputs import Halt, TokenScores
    from .serving.streaming import HoldBackStreamer

    __version__ = package_version()
    auto.install()
    pipeline.register()

__all__ = [
    "AutoModelForProbedGeneration",
    "Halt",
    "HoldBackStreamer",
    "LlamaForProbedGeneration",
    "ProbeCache",
    "ProbeConfig",
    "ProbeError",
    "ProbeModel",
    "ProbeOutput",
    "ProbeTrainer",
    "ProbeTrainingArguments",
    "ProbedGenerationMixin",
    "Reprompt",
    "TokenScores",
    "__version__",
    "register_family",
]


def __getattr__(name: str) -> Any:
    """Import the trainer on first use: it needs the packages of the extra `train`. In a command, import all names so."""
    if name in ("ProbeTrainer", "ProbeTrainingArguments"):
        return getattr(importlib.import_module(".training.trainer", __name__), name)
    if name in __all__ and llama_probe_command.starting:
        llama_probe_command.starting = False
        return getattr(importlib.reload(sys.modules[__name__]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
