"""The frozen language model: its layers, hidden states, KV cache and fingerprint. Knows no head."""

from .capture import Capture, check_states, collect_hidden_states, prefill
from .decoder import Decoder, find_decoder, is_tensor_parallel, target_of, without_peft
from .families import register_family
from .next_token import NextToken
from .passes import plan_passes


__all__ = [
    "Capture",
    "Decoder",
    "NextToken",
    "check_states",
    "collect_hidden_states",
    "find_decoder",
    "is_tensor_parallel",
    "plan_passes",
    "prefill",
    "register_family",
    "target_of",
    "without_peft",
]
