"""Training with the Trainer, and sweeps."""

from .allocator import keep_freed_memory
from .recipe import Recipe, complete


__all__ = ["Recipe", "complete", "keep_freed_memory"]
