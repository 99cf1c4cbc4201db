"""The tokens of a prompt that a head reads, and the segments of them that it judges by themselves."""

from __future__ import annotations

import numpy as np
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

    The turns that `"last_user"`, `"user"`, `"turns"` and `"tool"` name are found by `config.turn_markers`; see `turn_mask`. No
    token counts of a chat without such a turn. Without `turn_markers` these scopes are `"content"`, but for `"tool"`.

    With `token_scope="content"` or `"all"` the constant prefix (`config.prefix_ids`) is not counted in a row that begins with it,
    after its left padding. A row that begins otherwise - another system prompt, no template - is read whole. A warning says
    so once.

    Args:
        input_ids (`torch.LongTensor` of shape `[batch, tokens]`, *optional*).
        attention_mask (`torch.Tensor` of shape `[batch, tokens]`, *optional*): 0 for padding, on either side.
        partial_prompt: the prompts may continue. Nothing counts yet in a row that ends within the constant prefix.
        seen: leading tokens that heads have read in an earlier call.
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
    count, width = len(config.prefix_ids), input_ids.shape[1]
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


def number_segments(config: ProbeConfig, mask: torch.Tensor) -> torch.Tensor | None:
    """Return the number of the segment of each token that counts, from 1, and 0 for other tokens: `[batch, tokens]` int64.

    Segments are the parts of a prompt that a head judges by themselves: the turns of a chat. Tokens side by side that count are of
    one segment.

    Args:
        mask (`[batch, tokens]` bool): from `token_mask`.

    Returns:
        The numbers, on the device of the mask; `None` if the head judges no segments, or no row has more than one.
    """
    if not judges_segments(config):
        return None
    counted = mask.cpu().numpy()  # on the host, as in `turn_mask`
    begins = counted & ~np.pad(counted, ((0, 0), (1, 0)))[:, :-1]
    if begins.sum(axis=1).max() <= 1:
        return None
    return torch.from_numpy(begins.cumsum(axis=1) * counted).to(mask.device)


def judges_segments(config: ProbeConfig) -> bool:
    """Return True if a head judges each segment of a prompt by itself, beside all segments together; see `strongest`.

    Pooled with others, a turn that is flagged alone may not be. Heads with `token_scope="user"` or `"tool"` do so, if they flag one of
    two labels or give several labels.
    """
    judges = config.flagged_index is not None or config.problem_type == "multi_label_classification"
    return judges and config.token_scope in ("user", "tool") and get_probe_type(config.probe_type).reads == "all"


def tokens_read(config: ProbeConfig, mask: torch.Tensor) -> torch.Tensor:
    """Return, of the tokens that count, `[batch, tokens]`, those that the head's type looks at: all, or the last of each row."""
    return last_valid(mask) if get_probe_type(config.probe_type).reads == "last" else mask


def check_rows(mask: torch.Tensor, config: ProbeConfig | None = None, first_row: int = 0) -> None:
    """Raise `ProbeError` if no token counts in a row of `mask`, counted from `first_row`. Heads of tools may read none."""
    if (config is not None and config.token_scope == "tool") or bool(mask.any(dim=1).all()):
        return
    empty = ((~mask.any(dim=1)).nonzero().flatten() + first_row).tolist()
    raise ProbeError(f"rows {empty[:8]} hold no token that a head reads: use the chat template or pass probe_mask=")
