"""Probe heads: one file a head type. Importing the package registers every type that ships with it."""

from . import attention, gate, last, multimax, pooling  # noqa: F401 - each registers its type
from .aggregator import Aggregator, Classifier, masked_max, masked_mean, repeat_rows, select_rows
from .low_rank import LowRankAggregator
from .registry import get_probe_type, import_head_types, probe_types, register_probe_type


__all__ = [
    "Aggregator",
    "Classifier",
    "LowRankAggregator",
    "get_probe_type",
    "import_head_types",
    "masked_max",
    "masked_mean",
    "probe_types",
    "register_probe_type",
    "repeat_rows",
    "select_rows",
]
