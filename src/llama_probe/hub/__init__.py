"""Heads on the Hub and in folders: text to folder, folder to Hub, JSON to card."""

from .card import CardFacts, write_card
from .folder import is_head_folder, list_heads, read_results
from .publish import pull_head, push_folder
from .resolve import Target, resolve_head
from .transport import HubOptions, HubReference


__all__ = [
    "CardFacts",
    "HubOptions",
    "HubReference",
    "Target",
    "is_head_folder",
    "list_heads",
    "pull_head",
    "push_folder",
    "read_results",
    "resolve_head",
    "write_card",
]
