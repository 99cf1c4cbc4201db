"""Peak memory of a call."""

import weakref
from collections.abc import Callable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Return the bytes that a call holds at its peak, above those held at its start.

    On CUDA the allocator counts them. Elsewhere all tensors are counted, without a kernel's own scratch memory.
    """
    if device.type != "cuda":
        with MemoryMeter() as meter:
            call()
        return meter.peak
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - start


class MemoryMeter(TorchDispatchMode):
    """Count the bytes of the tensors that are made inside the block: those alive now, and most at once."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if getattr(function, "is_view", False):  # its storage is an input's
            return output
        changed_in_place = {id(storage) for storage in _storages((args, kwargs or {}))}
        for storage in _storages(output):
            key = id(storage)
            if key not in changed_in_place and key not in self._alive:
                self._alive.add(key)
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._free, key, storage.nbytes())
        return output

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.held -= size


def _storages(value: object) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of the tensors in what an operation takes or gives. The trees of torch are slow."""
    if isinstance(value, torch.Tensor):
        yield value.untyped_storage()
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _storages(item)
    elif isinstance(value, dict):
        yield from _storages(list(value.values()))
