"""Probe heads: one file a kind. Importing the package registers every kind that ships with it."""

from .aggregator import (
    Aggregator,
    Classifier,
    create_stages,
    join_slots,
    masked_max,
    masked_mean,
    repeat_rows,
    select_rows,
    take_slots,
)
from .attention import AttentionAggregator
from .attentive import AttentivePoolingAggregator
from .gate import GateAggregator
from .last import LastItemAggregator
from .low_rank import LowRankAggregator
from .muli import LogOddsClassifier, MuliAggregator
from .multimax import MultiMaxAggregator
from .pooling import PoolingAggregator
from .registry import get_probe_type, import_kinds, probe_types, register_probe_type
from .states import normalize, without_autocast


__all__ = [
    "Aggregator",
    "AttentionAggregator",
    "AttentivePoolingAggregator",
    "Classifier",
    "GateAggregator",
    "LastItemAggregator",
    "LogOddsClassifier",
    "LowRankAggregator",
    "MuliAggregator",
    "MultiMaxAggregator",
    "PoolingAggregator",
    "create_stages",
    "get_probe_type",
    "import_kinds",
    "join_slots",
    "masked_max",
    "masked_mean",
    "normalize",
    "probe_types",
    "register_probe_type",
    "repeat_rows",
    "select_rows",
    "take_slots",
    "without_autocast",
]
