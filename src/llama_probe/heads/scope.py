"""The tokens of a prompt that a head reads."""

from __future__ import annotations

import torch
from transformers.utils import logging

from ..errors import ProbeError
from .aggregator import get_probe_type, last_valid
from .configuration import ProbeConfig
from .rules import TURN_SCOPES
from .turns import turn_mask


logger = logging.get_logger(__name__)


def token_mask(
    config: ProbeConfig,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    partial_prompt: bool = False,
    seen: int = 0,
) -> torch.Tensor:
    """Return which tokens count for a head: `[batch, tokens]` bool.

    For `"last_user"`, `"user"`, `"turns"` and `"tool"`, `config.turn_markers` find the turns; see `turn_mask`. In a chat without
    such a turn no token counts. Without `turn_markers`, `"tool"` raises, and the other three scopes are `"content"`.

    With `"content"` and `"all"` the constant prefix (`config.prefix_ids`) does not count in a row that begins with it. A row that
    begins otherwise (with another system prompt, or without the template) is read whole, and a warning is logged once.

    Args:
        input_ids (`torch.LongTensor` of shape `[batch, tokens]`, *optional*).
        attention_mask (`torch.Tensor` of shape `[batch, tokens]`, *optional*): 0 for padding, on either side.
        partial_prompt: the prompts may continue. In a row that ends within the constant prefix no token counts yet.
        seen: number of leading tokens that heads have read in an earlier call.
    """
    if config.token_scope == "response":
        raise ProbeError("token_scope='response' needs probe_mask=[batch, tokens], true for the tokens of the reply")
    markers = config.turn_markers if config.token_scope in (*TURN_SCOPES, "tool") else None
    if config.token_scope == "tool" and not {"tool", "document"} & set(markers or ()):
        raise ProbeError(
            "token_scope='tool': the chat template marks no tool results; pass probe_mask=[batch, tokens]"
        )
    is_whole = config.token_scope == "prompt" or not (markers or config.prefix_ids)
    if is_whole and attention_mask is not None:
        return attention_mask.bool()
    if input_ids is None:
        raise ProbeError(f"token_scope={config.token_scope!r} needs input_ids, or probe_mask=[batch, tokens]")
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if is_whole:
        return mask
    if markers is not None:
        known = input_ids.shape[1] if partial_prompt else seen
        # Padding may have the id of a marker.
        ids = input_ids if attention_mask is None else input_ids.masked_fill(~mask.to(input_ids.device), -1)
        return mask & turn_mask(config.token_scope, markers, ids, known).to(mask.device)
    prefix = torch.tensor(config.prefix_ids, device=input_ids.device)
    count = len(config.prefix_ids)
    width = input_ids.shape[1]
    first = mask.int().argmax(dim=1, keepdim=True)  # [B, 1]: the first token that is not padding
    positions = first + torch.arange(count, device=input_ids.device)  # [B, prefix]
    same = input_ids.gather(1, positions.clamp_max(width - 1)) == prefix
    begins = torch.where(positions < width, same, partial_prompt).all(dim=1, keepdim=True)  # [B, 1]
    if not bool(begins.all()):
        logger.warning_once(
            "A prompt does not begin with the constant prefix that a probe head was trained to leave out (another chat "
            "template or system prompt, or raw text). The head reads all of its tokens; its scores may be less reliable."
        )
    columns = torch.arange(width, device=input_ids.device)
    return mask & ~(begins & (columns >= first) & (columns < first + count))


def tokens_read(config: ProbeConfig, mask: torch.Tensor) -> torch.Tensor:
    """Return the tokens that the head type reads, `[batch, tokens]`: all tokens that count, or the last one of each row."""
    return last_valid(mask) if get_probe_type(config.probe_type).reads == "last" else mask


def check_rows(mask: torch.Tensor, config: ProbeConfig | None = None, first_row: int = 0) -> None:
    """Raise `ProbeError` if no token counts in a row, unless the head reads tool results, which a prompt may not have.

    Args:
        first_row: number of the first row of `mask` in the message.
    """
    if config is not None and config.token_scope == "tool":
        return
    counts = mask.any(dim=1)
    if bool(counts.all()):
        return
    empty = ((~counts).nonzero().flatten() + first_row).tolist()
    raise ProbeError(f"rows {empty[:8]} hold no token that a head reads: use the chat template or pass probe_mask=")
