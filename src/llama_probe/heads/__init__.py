"""Probe heads: one file a kind. Importing the package registers every kind that ships with it."""

from .aggregator import Aggregator, create_aggregator, get_probe_type, probe_types, register_probe_type
from .attention import AttentionAggregator
from .gate import GateAggregator
from .pooling import PoolingAggregator


__all__ = [
    "Aggregator",
    "AttentionAggregator",
    "GateAggregator",
    "PoolingAggregator",
    "create_aggregator",
    "get_probe_type",
    "probe_types",
    "register_probe_type",
]
