"""An LM's KV cache: count its tokens, copy it, repeat it for a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import Cache
from transformers.utils import ModelOutput


class _DetachedCopies(TorchFunctionMode):
    """Let `copy.deepcopy` copy tensors that require gradients, which it refuses, as detached tensors."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


def cached_tokens(kwargs: Mapping[str, Any]) -> int:
    """Return the number of tokens in the KV cache among a forward pass's arguments, or in an output of the LM; 0 without one."""
    cache = kwargs.get("cache")
    if cache is None and not isinstance(kwargs, ModelOutput):  # an output warns about the older name
        cache = kwargs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def copy_cache(cache: Cache) -> Cache:
    """Return a copy of a KV cache, without gradients."""
    with _DetachedCopies():
        return copy.deepcopy(cache)


def repeat_cache(prefix: Cache, rows: int) -> Cache:
    """Return a copy of a KV cache of one row for a batch."""
    cache = copy_cache(prefix)
    cache.batch_repeat_interleave(rows)
    return cache
