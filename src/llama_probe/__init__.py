"""Probe heads on frozen language models: a label and a text from the same forward pass.

Importing the package teaches `transformers.AutoModel.from_pretrained` and `AutoModelForCausalLM.from_pretrained` the
argument `probe=`, and `transformers.pipeline` the task "probed-text-generation"; other calls are not changed.
"""

from . import auto, pipeline
from .auto_class import AutoModelForProbedGeneration
from .configuration import ProbeConfig
from .decision import ProbeOutput
from .errors import ProbeError
from .families import register_family
from .files import package_version
from .halting import Halt, Reprompt
from .modeling import LlamaForProbedGeneration, ProbedGenerationMixin
from .probe import ProbeModel
from .reply import TokenScores
from .state import ProbeCache
from .streaming import HoldBackStreamer


__version__ = package_version()

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
    "ProbedGenerationMixin",
    "Reprompt",
    "TokenScores",
    "__version__",
    "register_family",
]

auto.install()
pipeline.install()
