"""Memory of a call, counted in an untimed run."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Return the bytes that a call holds at its peak, above those held at its start.

    On CUDA the allocator counts them. On the CPU all tensors are counted, without a kernel's own scratch memory. Other devices
    give `None`.
    """
    if device.type == "cpu":
        with TensorMemory() as memory:
            call()
        return memory.peak
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - start


class TensorMemory(TorchDispatchMode):
    """Count the bytes of tensors that are made inside the block: alive (`held`), and most at once (`peak`).

    A view shares the memory of its base.
    """

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {id(storage) for storage in _storages((args, kwargs))}
        output = func(*args, **kwargs)
        for storage in _storages(output):
            # An input that is also an output is a view, or was changed in place.
            if id(storage) not in given and id(storage) not in self._alive:
                self._alive.add(id(storage))
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        return output

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.held -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
