"""vLLM's model classes with a cache for what heads read: `ProbedLlamaForCausalLM` and others.

Each class is made on first use. Its base is vLLM's class of the same name without `Probed`, and it computes the same.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors
from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import (
    reserve_aux_intermediate_tensor_slots,
    verify_supports_aux_hidden_states_over_pp,
)

from ..heads.probe import ProbeModel
from .cache_plan import CachePlan
from .compatibility import ARCHITECTURES, PREFIX
from .paged_states import NAME, PagedStates
from .settings import ProbeSettings


@functools.cache
def _probed(name: str) -> type[nn.Module]:
    base = ModelRegistry.models[name].load_model_cls()

    class Probed(base):
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
            settings = ProbeSettings.of(vllm_config)
            settings.check_engine(vllm_config)
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            last = self.config.num_hidden_layers
            self._read = settings.layers
            if below := tuple(layer for layer in settings.layers if layer < last):
                self.set_aux_hidden_state_layers(below)
            if get_pp_group().world_size > 1:
                verify_supports_aux_hidden_states_over_pp(self, "heads")
                reserve_aux_intermediate_tensor_slots(self)
            if not get_pp_group().is_last_rank:
                return
            with torch.device("cpu"):  # vLLM builds a model for another device
                heads = {name: ProbeModel.from_pretrained(folder) for name, folder in settings.heads.items()}
                plan = CachePlan(heads)
            device, dtype = vllm_config.device_config.device, vllm_config.model_config.dtype
            plan.move(device, dtype, vllm_config.scheduler_config.max_num_seqs)
            # vLLM orders caches by the number in their names, and the layers of the model have the numbers below this one.
            self.probe_states = PagedStates(vllm_config, plan, maybe_prefix(prefix, f"{NAME}.{last}"))

        @functools.wraps(base.forward)  # vLLM reads the signature
        def forward(self, *args, **kwargs) -> torch.Tensor:
            output = super().forward(*args, **kwargs)
            if isinstance(output, IntermediateTensors):
                # The next stage gets the states of this stage's layers, and of all layers before.
                for value in (*args, *kwargs.values()):
                    if isinstance(value, IntermediateTensors):
                        output.tensors = value.tensors | output.tensors
                return output
            # The states between the layers come in order, apart from the state after the final norm.
            final, below = output if isinstance(output, tuple) else (output, [])
            self.probe_states(dict(zip(self._read, [*below, final], strict=False)))
            return final

    Probed.__name__ = Probed.__qualname__ = PREFIX + name
    return Probed


def __getattr__(name: str) -> type[nn.Module]:
    if name.startswith(PREFIX) and name.removeprefix(PREFIX) in ARCHITECTURES:
        return _probed(name.removeprefix(PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
