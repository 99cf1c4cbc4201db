"""A layer that keeps hidden states, or features of them, paged beside the keys and values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
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


NAME = "probe_states"  # of the layer


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
    """Keeps what heads read for every token that the engine has in its cache.

    To vLLM it is one more attention layer, with one "head" and no values. It shares the block table of the others, so that
    a token's numbers are there, evicted and found again exactly where its keys are. With tensor parallelism each rank keeps
    its share of them: `width / ranks`, rounded up.

    Args:
        plan: of the heads; the connector finds it here.
        prefix: the layer's name; must contain `NAME`, and a number that no other layer's does.
    """

    def __init__(self, vllm_config: VllmConfig, plan: CachePlan, prefix: str):
        self.ranks = get_tensor_model_parallel_world_size()
        share = -(-plan.width // self.ranks)
        super().__init__(1, share, vllm_config.cache_config, prefix)
        self.plan = plan
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

    def forward(self, states: Mapping[int, torch.Tensor]) -> None:
        """Write what is kept of this step's tokens.

        Args:
            states: `[tokens, hidden_size]` by layer; padding may follow the tokens.
        """
        self._write(self.layer_name, states)

    @maybe_transfer_kv_layer  # a connector that stores the other layers' caches stores this one
    def _write(self, layer_name: str, states: Mapping[int, torch.Tensor]) -> None:
        slots = get_forward_context().slot_mapping.get(layer_name)
        if slots is None or not self.kv_cache.numel():  # a trial run, before there is a cache
            return
        slots = slots.clamp_min(0)  # padding is written to block 0, which belongs to no request
        blocks, places = slots // self.kernel_block_size, slots % self.kernel_block_size
        for piece, numbers in self.plan.pieces({layer: state[: len(slots)] for layer, state in states.items()}):
            share = numbers[:, self.start : self.start + self.head_size].to(self.kv_cache.dtype)
            # The last ranks' share may be smaller than the cache.
            self.kv_cache[:, 0, :, : share.shape[1]][blocks[piece], places[piece]] = share

    def read(self, block_ids: torch.Tensor) -> torch.Tensor:
        """Return `[prompts, blocks * kernel_block_size, width]`: what is kept of all tokens in blocks `[prompts, blocks]`.

        With tensor parallelism every rank must call it.
        """
        share = self.kv_cache[:, 0].index_select(0, block_ids.flatten())
        return self._whole(share.view(len(block_ids), -1, self.head_size))

    def read_tokens(self, places: torch.Tensor) -> torch.Tensor:
        """Return `[tokens, width]` of single tokens: a place `[tokens]` is a block's number times its size, and the rest.

        With tensor parallelism every rank must call it.
        """
        return self._whole(self.kv_cache[:, 0][places // self.kernel_block_size, places % self.kernel_block_size])

    def _whole(self, share: torch.Tensor) -> torch.Tensor:
        return share if self.ranks == 1 else all_gather(share, dim=-1)[..., : self.plan.width]


def cache_growth(group: KVCacheGroupSpec) -> float:
    """Return how many times as large a worker's cache is with what heads read."""
    spec = group.kv_cache_spec
    specs = getattr(spec, "kv_cache_specs", None) or dict.fromkeys(group.layer_names, spec)
    whole = sum(spec.page_size_bytes for spec in specs.values())
    return whole / sum(spec.page_size_bytes for name, spec in specs.items() if NAME not in name)
