"""Texts, prompts and hidden states of a data set.

The way of a row, by file:

- `row_files`: rows of csv, JSON and parquet files. `tables`: columns of a file, a folder or a Hub data set.
- `known`: data sets known by name. `row_sources`: rows of one source of a recipe. `memory`: rows of a table in memory.
- `labelled_texts`: texts with labels, divided into parts. `labels`: the meaning of labels. `augmentation`, `disguises`: changed rows.
- `prompts`: token ids of texts. `turn_markers`: the tokens that open turns, learned from a chat template.
- `batches`: padded batches, and their hidden states. `disk_states`: hidden states on disk.
"""

from .known import BENCHMARKS, find_benchmark
from .prompts import PromptFormat


__all__ = ["BENCHMARKS", "PromptFormat", "find_benchmark"]
