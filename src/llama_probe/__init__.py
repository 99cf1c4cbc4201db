"""Probe heads on frozen language models: a label and a text from the same forward pass.

Importing the package teaches `transformers.AutoModel.from_pretrained` and `AutoModelForCausalLM.from_pretrained` the
argument `probe=`, and `transformers.pipeline` the task "probed-text-generation"; other calls are not changed.
"""

from .backbone.families import register_family
from .errors import ProbeError
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
pipeline.register()
