"""A language model's cache of keys and values: copies of it, and how much it will grow."""

from __future__ import annotations

import copy

import torch
from torch.overrides import TorchFunctionMode
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


# Layers of a cache that put what they hold and what is new into a new tensor.
_GROW_BY_COPY = (DynamicLayer, DynamicSlidingWindowLayer)


class _ValuesAlone(TorchFunctionMode):
    """Lets `copy.deepcopy` copy tensors that gradients flow through, which it refuses: as plain numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


class CacheGrowth:
    """By how much an LM's cache still grows in a pass.

    Layers that hold nothing so far will hold as much as the first does, where they are of its kind.
    """

    def __init__(self, cache: Cache | None):
        layers = getattr(cache, "layers", None) or []
        known = layers and type(layers[0]) in _GROW_BY_COPY and not cache.offloading
        kind = type(layers[0]) if known else None
        self._first = layers[0] if known else None
        self._empty = [layer for layer in layers if type(layer) is kind and not layer.is_initialized]

    def bytes_to_come(self) -> int:
        """After the next layer of the LM; 0 where it is not known, as in a later pass."""
        if self._first is None or not self._first.is_initialized:
            return 0
        while self._empty and self._empty[0].is_initialized:  # they are filled in their order
            del self._empty[0]
        return max(0, len(self._empty) - 1) * (size_in_bytes(self._first.keys) + size_in_bytes(self._first.values))


def size_in_bytes(tensor: torch.Tensor) -> int:
    """What a tensor's numbers take; `nbytes` cannot be asked while `torch.compile` traces prompts of any length."""
    return tensor.numel() * tensor.itemsize


def copy_cache(cache: Cache) -> Cache:
    """A copy of an LM's cache, without what gradients would need, which it has where it was not made under `torch.no_grad()`."""
    with _ValuesAlone():
        return copy.deepcopy(cache)


def repeat_cache(prefix: Cache, rows: int) -> Cache:
    """A copy, for a batch of rows, of the cache that `prefill` gives for one.

    The rows share their memory, in copies of it as well, until the LM adds to them.
    """
    cache = copy_cache(prefix)
    for layer in cache.layers:
        if type(layer) in _GROW_BY_COPY and layer.is_initialized:
            layer.keys, layer.values = (part.expand(rows, *part.shape[1:]) for part in (layer.keys, layer.values))
        else:
            layer.batch_repeat_interleave(rows)
    return cache
