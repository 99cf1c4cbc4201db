"""Training with the Trainer, sweeps, and convex fits."""

from .allocator import keep_freed_memory
from .recipe import Recipe, complete


__all__ = ["Recipe", "complete", "keep_freed_memory"]
