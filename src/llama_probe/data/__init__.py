"""Texts, prompts and hidden states of a data set."""

from .known import BENCHMARKS, find_benchmark
from .prompts import PromptFormat


__all__ = ["BENCHMARKS", "PromptFormat", "find_benchmark"]
