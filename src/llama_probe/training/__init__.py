"""Training with the Trainer: recipes, heads side by side, searches."""

from .allocator import keep_freed_memory
from .recipe import Recipe


__all__ = ["Recipe", "keep_freed_memory"]
