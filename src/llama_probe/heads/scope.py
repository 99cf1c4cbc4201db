"""Token masks: the tokens of a prompt that a head reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
    """Return which tokens count for a head, `[batch, tokens]` bool.

    The turns that `"last_user"`, `"user"` and `"turns"` name are found by `config.turn_markers`; see `turn_mask`. No token
    counts of a chat without such a turn. Without `turn_markers` these scopes are `"content"`.

    With `token_scope="content"` or `"all"` the constant prefix (`config.prefix_ids`) is not counted in a row that begins with it,
    after its left padding. A row that begins otherwise - another system prompt, no template - is read whole. A warning says
    so once.

    Args:
        input_ids (`torch.LongTensor` of shape `[batch, tokens]`, *optional*).
        attention_mask (`torch.Tensor` of shape `[batch, tokens]`, *optional*): 0 for padding, on either side.
        partial_prompt: the prompts may continue. Nothing counts yet in a row that ends within the constant prefix.
        seen: leading tokens that heads have read in an earlier call.

    Raises:
        ProbeError: the scope needs ids and there are none, or is `"response"`: ids do not show where a reply begins.
    """
    if config.token_scope == "response":
        raise ProbeError("token_scope='response' needs probe_mask=[batch, tokens], true for the tokens of the reply")
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    finds_turns = config.token_scope in TURN_SCOPES and config.turn_markers is not None
    if config.token_scope == "prompt" or not (finds_turns or config.prefix_ids):
        return mask
    if input_ids is None:
        raise ProbeError(f"token_scope={config.token_scope!r} needs input_ids, or probe_mask=[batch, tokens]")
    if finds_turns:
        known = input_ids.shape[1] if partial_prompt else seen
        # Padding may have the id of a marker.
        ids = input_ids if attention_mask is None else input_ids.masked_fill(~mask.to(input_ids.device), -1)
        return mask & turn_mask(config.token_scope, config.turn_markers, ids, known).to(mask.device)
    prefix = torch.tensor(config.prefix_ids, device=input_ids.device)
    count, width = len(config.prefix_ids), input_ids.shape[1]
    first = mask.int().argmax(dim=1, keepdim=True)  # [B, 1]: the first token that is not padding
    positions = first + torch.arange(count, device=input_ids.device)  # [B, prefix]
    same = input_ids.gather(1, positions.clamp_max(width - 1)) == prefix
    if partial_prompt:
        same |= positions >= width
    begins = same.all(dim=1, keepdim=True)
    begins &= partial_prompt | (first + count <= width)  # [B, 1]
    if not torch.compiler.is_dynamo_compiling() and not bool(begins.all()):
        logger.warning_once(
            "A prompt does not begin with the constant prefix that a probe head was trained to leave out (another chat "
            "template or system prompt, or raw text). The head reads all of its tokens; its scores may be less reliable."
        )
    columns = torch.arange(width, device=input_ids.device)
    return mask & ~(begins & (columns >= first) & (columns < first + count))


def prompt_masks(
    configs: Mapping[str, ProbeConfig],
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    probe_mask: torch.Tensor | None,
    partial_prompt: bool = False,
    placeholder_ids: Sequence[int] = (),
    seen: int = 0,
) -> dict[str, torch.Tensor]:
    """Return for each head, by name, the prompt tokens that count: `[prompts, prompt_tokens]`. Heads of one scope share a tensor.

    Heads are trained on texts. Tokens in `placeholder_ids`, which stand for images or the like, count only where
    `probe_mask` says so. What the LM sees in an image reaches heads through the text tokens after it.

    Args:
        partial_prompt, seen: see `token_mask`.

    Raises:
        ProbeError: there is no prompt, or mask and prompt have different shapes.
    """
    given = {"input_ids": input_ids, "attention_mask": attention_mask, "probe_mask": probe_mask}
    for name, tensor in given.items():
        if tensor is not None and (not isinstance(tensor, torch.Tensor) or tensor.dim() != 2):
            found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            entries = ": pass its entries, with ** before it" if isinstance(tensor, Mapping) else ""
            raise ProbeError(f"{name} must be a tensor [batch, tokens], not {found}{entries}")
    source = input_ids if input_ids is not None else inputs_embeds
    if source is None or 0 in source.shape[:2]:
        raise ProbeError("there is no prompt for the heads to read: pass input_ids, or set_active_probes([]) first")
    shape = source.shape[:2]
    for name, tensor in given.items():
        if tensor is not None and tensor.shape != shape:
            hint = "with a cache, pass all input_ids of the conversation"
            raise ProbeError(f"{name} has the shape {tuple(tensor.shape)}, the prompt {tuple(shape)}: {hint}")
    if attention_mask is None:
        attention_mask = torch.ones(shape, dtype=torch.bool, device=source.device)
    if probe_mask is not None:
        chosen = probe_mask.to(attention_mask.device).bool() & attention_mask.bool()
        return dict.fromkeys(configs, chosen)
    text = None
    if placeholder_ids and input_ids is not None:
        text = ~torch.isin(input_ids, torch.tensor(placeholder_ids, device=input_ids.device))
    found: list[tuple[Any, torch.Tensor]] = []  # scopes and their masks
    masks: dict[str, torch.Tensor] = {}
    for name, config in configs.items():
        scope = config.token_scope, config.prefix_ids, config.turn_markers
        mask = next((mask for other, mask in found if other == scope), None)
        if mask is None:
            mask = token_mask(config, input_ids, attention_mask, partial_prompt, seen)
            mask = mask if text is None else mask & text.to(mask.device)
            found.append((scope, mask))
        masks[name] = mask
    return masks


def tokens_read(config: ProbeConfig, mask: torch.Tensor) -> torch.Tensor:
    """Return, of the tokens that count, `[batch, tokens]`, those that the head's kind looks at: all, or the last of each row."""
    return last_valid(mask) if get_probe_type(config.probe_type).reads == "last" else mask


def read_masks(configs: Mapping[str, ProbeConfig], masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Apply `tokens_read` to the mask of each head. Heads that share a tensor, and read all tokens, share the result."""
    return {name: tokens_read(config, masks[name]) for name, config in configs.items()}


def check_rows(mask: torch.Tensor | None) -> None:
    """Raise `ProbeError` if a row of a `[batch, tokens]` mask has no token that counts."""
    if mask is None or bool(mask.any(dim=1).all()):
        return
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    raise ProbeError(f"rows {empty[:8]} hold no token that a head reads: use the chat template or pass probe_mask=")
