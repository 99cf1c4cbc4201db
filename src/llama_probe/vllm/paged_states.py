"""A layer that stores what heads read of each token, in pages beside the keys and values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed import tensor_model_parallel_all_gather as all_gather
from vllm.forward_context import get_forward_context
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
    # A write needs only the slots of the batch. Their buffer stays in place, so CUDA graphs can hold the write.
    _cudagraph_support = AttentionCGSupport.ALWAYS


class _Backend(CacheOnlyAttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "PROBE_STATES"

    @staticmethod
    def get_builder_cls() -> type[CacheOnlyAttentionMetadataBuilder]:
        return _MetadataBuilder


class PagedStates(CacheOnlyAttentionLayer):
    """Store what heads read of every token in the engine's cache.

    For vLLM this layer is one more attention layer, with one "head" and no values. It shares the block table of the attention
    layers: a token's numbers are stored, evicted and found again together with its keys. With tensor parallelism each rank
    stores a share of the numbers: `width / ranks`, rounded up.

    Args:
        plan: which numbers are stored. The connector takes the heads from it.
        prefix: the layer's name. It must contain `NAME`, and a number that no other layer has in its name.
    """

    def __init__(self, vllm_config: VllmConfig, plan: CachePlan, prefix: str):
        self.ranks = get_tensor_model_parallel_world_size()
        share = -(-plan.width // self.ranks)
        super().__init__(1, share, vllm_config.cache_config, prefix)
        self.plan = plan
        self.attn_backend = _Backend
        self.start = get_tensor_model_parallel_rank() * share

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        # This spec is one of a common attention layer with another size. So vLLM puts this layer into the group of the
        # attention layers, which has one block table, and a block holds exactly the bytes of all layers.
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_heads,
            head_size=self.head_size,
            head_size_v=0,
            dtype=self.kv_cache_torch_dtype,
        )

    @property
    def kernel_block_size(self) -> int:
        """Number of tokens in a block of the cache. A block of the scheduler is one or several blocks of the cache."""
        return self.kv_cache.shape[2]

    def forward(self, states: Mapping[int, torch.Tensor]) -> None:
        """Write what the heads read of this step's tokens. States are `[tokens, hidden_size]` by layer, maybe with padding."""
        slots = get_forward_context().slot_mapping.get(self.layer_name)
        if slots is None or not self.kv_cache.numel():  # a trial run, before there is a cache
            return
        slots = slots.clamp_min(0)  # padding is written to block 0, which belongs to no request
        blocks, places = slots // self.kernel_block_size, slots % self.kernel_block_size
        for piece, numbers in self.plan.pieces({layer: state[: len(slots)] for layer, state in states.items()}):
            share = numbers[:, self.start : self.start + self.head_size].to(self.kv_cache.dtype)
            # The last rank's share may be narrower than its cache.
            self.kv_cache[:, 0, :, : share.shape[1]][blocks[piece], places[piece]] = share

    def read(self, block_ids: torch.Tensor) -> torch.Tensor:
        """Return the stored numbers of blocks `[prompts, blocks]`: `[prompts, blocks * kernel_block_size, width]`.

        With tensor parallelism every rank must call this method.
        """
        share = self.kv_cache[:, 0].index_select(0, block_ids.flatten())
        return self._whole(share.view(len(block_ids), -1, self.head_size))

    def read_tokens(self, places: torch.Tensor) -> torch.Tensor:
        """Return the stored numbers of single tokens, `[tokens, width]`; see `scoring.ReplyTokens` for places `[tokens]`.

        With tensor parallelism every rank must call this method.
        """
        return self._whole(self.kv_cache[:, 0][places // self.kernel_block_size, places % self.kernel_block_size])

    def _whole(self, share: torch.Tensor) -> torch.Tensor:
        return share if self.ranks == 1 else all_gather(share, dim=-1)[..., : self.plan.width]


def cache_growth(group: KVCacheGroupSpec) -> float:
    """Return the size of a worker's cache, divided by its size without `PagedStates`."""
    spec = group.kv_cache_spec
    specs = getattr(spec, "kv_cache_specs", None) or dict.fromkeys(group.layer_names, spec)
    whole = sum(spec.page_size_bytes for spec in specs.values())
    return whole / sum(spec.page_size_bytes for name, spec in specs.items() if NAME not in name)
