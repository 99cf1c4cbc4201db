"""Probe heads: one file a kind. Importing the package registers every kind that ships with it."""

from . import attention, attentive, gate, last, multimax, pooling  # noqa: F401 - each registers its kind
from .aggregator import Aggregator, Classifier, masked_max, masked_mean
from .low_rank import LowRankAggregator
from .registry import get_probe_type, import_kinds, probe_types, register_probe_type
from .stream import repeat_rows, select_rows


__all__ = [
    "Aggregator",
    "Classifier",
    "LowRankAggregator",
    "get_probe_type",
    "import_kinds",
    "masked_max",
    "masked_mean",
    "probe_types",
    "register_probe_type",
    "repeat_rows",
    "select_rows",
]
