"""vLLM's model classes with a cache for what heads read: `ProbedLlamaForCausalLM` and others.

A class is made when it is asked for, from the one of the same name without `Probed`. It computes what that computes.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.utils import maybe_prefix

from .cache_plan import CachePlan, Projector
from .compatibility import ARCHITECTURES, PREFIX, check_config, check_version
from .settings import ProbeSettings
from .state_cache import FEATURES, STATES, StateCache


def _with_states(base: type[nn.Module]) -> type[nn.Module]:
    class Probed(base):
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
            settings = ProbeSettings.of(vllm_config)
            check_version(settings.allow_untested_vllm)
            check_config(vllm_config)
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            last = self.config.num_hidden_layers
            self._read = settings.layers
            if below := tuple(layer for layer in settings.layers if layer < last):
                self.set_aux_hidden_state_layers(below)
            heads = settings.read_heads()
            self._plan = CachePlan(heads)
            self.probe_states = self.probe_features = None
            # vLLM orders its caches by the number in their names, and the layers have those below.
            if self._plan.layers:
                name = maybe_prefix(prefix, f"{STATES}.{last}")
                width = vllm_config.model_config.get_hidden_size()
                self.probe_states = StateCache(vllm_config, len(self._plan.layers), width, name)
            if self._plan.readers:
                name = maybe_prefix(prefix, f"{FEATURES}.{last + 1}")
                self.probe_features = StateCache(vllm_config, 1, self._plan.width, name)
                self._projector = Projector(heads, self._plan)

        @functools.wraps(base.forward)  # vLLM reads the signature
        def forward(self, *args, **kwargs) -> torch.Tensor:
            output = super().forward(*args, **kwargs)
            # States between the layers come in order, before the last, which is the one after the final norm.
            final, below = output if isinstance(output, tuple) else (output, [])
            states = dict(zip(self._read, [*below, final], strict=False))
            if self.probe_states is not None:
                self.probe_states([states[layer] for layer in self._plan.layers])
            if self.probe_features is not None:
                self.probe_features([self._projector.project(states)])
            return final

    Probed.__name__ = Probed.__qualname__ = PREFIX + base.__name__
    return Probed


@functools.cache
def _probed(name: str) -> type[nn.Module]:
    return _with_states(ModelRegistry.models[name].load_model_cls())


def __getattr__(name: str) -> type[nn.Module]:
    if name.startswith(PREFIX) and name.removeprefix(PREFIX) in ARCHITECTURES:
        return _probed(name.removeprefix(PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
