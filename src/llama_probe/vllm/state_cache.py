"""A layer that computes nothing and keeps hidden states, or features of them, paged beside the keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed import tensor_model_parallel_all_gather as all_gather
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention.kv_transfer_utils import maybe_transfer_kv_layer
from vllm.model_executor.models.extract_hidden_states import (
    CacheOnlyAttentionBackend,
    CacheOnlyAttentionLayer,
    CacheOnlyAttentionMetadataBuilder,
)
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, KVCacheSpec

from .cache_plan import CachePlan


STATES, FEATURES = "probe_states", "probe_features"  # names of the layers
# States of so many tokens are written in one call. Of more, a stack would cost time, and double what the model holds of them.
_FEW = 64


class _MetadataBuilder(CacheOnlyAttentionMetadataBuilder):
    # Nothing here depends on the batch but the slots, which lie in a buffer that stays: CUDA graphs can hold the write.
    _cudagraph_support = AttentionCGSupport.ALWAYS


class _Backend(CacheOnlyAttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "PROBE_STATES"

    @staticmethod
    def get_builder_cls() -> type[CacheOnlyAttentionMetadataBuilder]:
        return _MetadataBuilder


class StateCache(CacheOnlyAttentionLayer):
    """Keeps the states that heads read, or features of them, for every token that the engine has in its cache.

    To vLLM it is one more attention layer, with a "head" a state and no values. It shares the block table of the others, so
    that a token's states are there, evicted and found again exactly where its keys are. With tensor parallelism each rank
    keeps its share of every state: `width / ranks` of the dimensions, rounded up.

    Args:
        plan: of the heads; the connector finds it here.
        kind: what of the plan is kept: `STATES`, or `FEATURES`, which are one state of another width.
        prefix: the layer's name; must contain the kind, and a number that no other layer's does.
    """

    def __init__(self, vllm_config: VllmConfig, plan: CachePlan, kind: str, prefix: str):
        num_states, self.width = len(plan.layers), vllm_config.model_config.get_hidden_size()
        if kind == FEATURES:
            num_states, self.width = 1, plan.width
        self.ranks = get_tensor_model_parallel_world_size()
        share = -(-self.width // self.ranks)
        super().__init__(num_states, share, vllm_config.cache_config, prefix)
        self.plan, self.kind = plan, kind
        self.attn_backend = _Backend
        self.start = get_tensor_model_parallel_rank() * share

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        # The spec of a common attention layer, of another size: layers like that share one group and its block table, and
        # a block then holds exactly the bytes of all of them.
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_heads,
            head_size=self.head_size,
            head_size_v=0,
            dtype=self.kv_cache_torch_dtype,
        )

    @property
    def kernel_block_size(self) -> int:
        """The number of tokens in a block of the cache. A block of the scheduler's is one of these or several."""
        return self.kv_cache.shape[2]

    def forward(self, states: Sequence[torch.Tensor]) -> None:
        """Write the states of this step's tokens.

        Args:
            states: one tensor `[tokens, width]` a state, ascending; padding may follow the tokens.
        """
        self._write(self.layer_name, states)

    @maybe_transfer_kv_layer  # a connector that stores the other layers' caches stores this one
    def _write(self, layer_name: str, states: Sequence[torch.Tensor]) -> None:
        slots = get_forward_context().slot_mapping.get(layer_name)
        if slots is None or not self.kv_cache.numel():  # a trial run, before there is a cache
            return
        share = slice(self.start, self.start + self.head_size)
        if missing := self.head_size * self.ranks - self.width:
            states = [F.pad(state, (0, missing)) for state in states]
        slots = slots.clamp_min(0)  # padding is written to block 0, which belongs to no request
        blocks, places = slots // self.kernel_block_size, slots % self.kernel_block_size
        if len(slots) <= _FEW:
            values = torch.stack([state[: len(slots), share] for state in states], dim=1)
            self.kv_cache[blocks, :, places] = values.to(self.kv_cache.dtype)
            return
        for number, state in enumerate(states):
            self.kv_cache[:, number][blocks, places] = state[: len(slots), share].to(self.kv_cache.dtype)

    def read(self, block_ids: torch.Tensor) -> torch.Tensor:
        """Return `[states, prompts, blocks * kernel_block_size, width]`: the states of all tokens in blocks `[prompts, blocks]`.

        They are in the model's dtype. With tensor parallelism every rank must call it.
        """
        # [prompts * blocks, S, block_size, share]
        blocks = self.kv_cache.index_select(0, block_ids.flatten())
        share = blocks.transpose(0, 1).reshape(blocks.shape[1], len(block_ids), -1, self.head_size)
        return share if self.ranks == 1 else all_gather(share, dim=-1)[..., : self.width]

    def read_tokens(self, places: torch.Tensor) -> torch.Tensor:
        """Return `[states, tokens, width]` of single tokens: a place `[tokens]` is a block's number times its size, and the rest.

        With tensor parallelism every rank must call it.
        """
        size = self.kernel_block_size
        share = self.kv_cache[places // size, :, places % size].transpose(0, 1)  # [S, tokens, share]
        return share if self.ranks == 1 else all_gather(share.contiguous(), dim=-1)[..., : self.width]


def cache_growth(group: KVCacheGroupSpec) -> float:
    """Return how many times as large a worker's cache is with what heads read."""
    spec = group.kv_cache_spec
    specs = getattr(spec, "kv_cache_specs", None) or dict.fromkeys(group.layer_names, spec)
    whole = sum(spec.page_size_bytes for spec in specs.values())
    plain = sum(spec.page_size_bytes for name, spec in specs.items() if STATES not in name and FEATURES not in name)
    return whole / plain
