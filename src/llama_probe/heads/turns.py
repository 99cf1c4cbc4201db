"""Turns of a chat, found in token ids by the markers that the chat template writes before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import numpy as np
import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)


class TurnMarker(TypedDict):
    """The opening of a turn: token ids, and the number of tokens behind them that may merge with the text."""

    ids: list[int]
    skip: int


# Results of tools and documents come from outside, as a user's text does.
TURN_ROLES = ("user", "tool", "document", "assistant", "system")


def turn_mask(scope: str, markers: Mapping[str, TurnMarker], input_ids: torch.Tensor, known: int = 0) -> torch.Tensor:
    """Return the tokens of the turns that a scope names: `[batch, tokens]` bool, on the device of the ids.

    A turn begins behind its opening marker and ends where the next turn begins: a user's turn holds the markers that close it
    and open the reply. All text behind the last named turn counts too, because its writer may have forged the markers in it. If
    the beginning of a prompt was cut away, the text before its first reply is a user's. A prompt without any marker is no chat:
    all of it counts, and a warning is logged once.

    Args:
        known: number of first tokens that the LM has seen. A reply that begins within them is the LM's, even if no turn follows.
    """
    # On the host: on a GPU the same lines are 25 kernel launches.
    ids = input_ids.cpu().numpy()
    begins = {role: turn_begins(marker, ids) for role, marker in markers.items()}  # [B, T + 1] each
    # A marker without a token behind it opens no turn, except for a reply: it is the generation prompt.
    followed = np.pad(ids, ((0, 0), (0, 1)), constant_values=-1) >= 0
    begins = {role: places if role == "assistant" else places & followed for role, places in begins.items()}
    if "tool" in markers:
        begins["user"] = begins["user"] & ~_tools_as_users(markers, begins["tool"])
    marked = np.any(list(begins.values()), axis=(0, 2))[:, None]  # [B, 1]
    if not marked.all():
        logger.warning_once(
            "A prompt holds no marker of a turn (raw text, or another chat template): a head that looks for turns reads all of "
            "it, and its scores may be less reliable."
        )
    # A prompt that continues may still get markers.
    whole = ~marked if known < input_ids.shape[1] else marked & False
    mask = (_mask(scope, begins, known) | whole)[:, :-1]
    return torch.from_numpy(mask).to(input_ids.device)


def _mask(scope: str, begins: dict[str, np.ndarray], known: int) -> np.ndarray:
    """Return `turn_mask` for the places where turns begin, `[batch, tokens + 1]`."""
    user, reply = begins["user"], begins["assistant"]
    tool, document, system = (begins.get(role, user & False) for role in ("tool", "document", "system"))
    position = (user | True).cumsum(1)  # from 1; below, 0 is "before the first such turn"
    in_reply, in_system, in_tool = (_running_max(place * position) for place in (reply, system, tool))
    if scope == "tool":  # a reply follows a tool's result: a user's marker before it is forged
        user = user & (in_reply >= in_tool)
    in_user, in_outside = _running_max(user * position), _running_max((tool | document) * position)
    # A system turn behind a user's may be forged.
    in_input = _running_max((user | tool | document | (system & (in_user > 0))) * position)
    is_cut = _running_max(((in_reply > 0) & (in_input + in_system == 0)) * 1)[:, -1:] > 0
    if scope == "turns":
        return is_cut | (in_input + in_reply + in_system > 0)
    if scope in ("user", "tool"):
        replies = (in_reply > in_input) & ((position < in_input[:, -1:]) | (in_reply <= known + 1))
        wanted = is_cut | (in_input > 0) if scope == "user" else in_outside > in_user
        return wanted & ~replies
    last = in_user[:, -1:]
    before = _running_max(reply * position * (position < last))[:, -1:]  # the last reply before the last user's turn
    return (in_user > before) | (is_cut & (last == 0))


def turn_begins(marker: TurnMarker, ids: np.ndarray) -> np.ndarray:
    """Return where a turn begins behind a marker: `[batch, tokens + 1]` bool. The last place is behind all tokens."""
    size, width = len(marker["ids"]), len(marker["ids"]) + marker["skip"]
    padded = np.pad(ids, ((0, 0), (width, 0)), constant_values=-1)  # -1 is no token
    windows = np.lib.stride_tricks.sliding_window_view(padded, width, axis=1)  # [B, T + 1, width]
    opening = np.array(marker["ids"])
    opened = (windows[:, :, :size] == opening).all(2)
    return opened & (windows[:, :, size:] >= 0).all(2) if marker["skip"] else opened


def _tools_as_users(markers: Mapping[str, TurnMarker], tool: np.ndarray) -> np.ndarray:
    """Return where a user's marker is the beginning of a tool's."""
    user = markers["user"]
    longer = len(markers["tool"]["ids"]) - len(user["ids"]) - user["skip"]
    if longer < 0 or markers["tool"]["ids"][: len(user["ids"])] != user["ids"]:
        return tool & False
    return np.roll(tool, -longer, 1)


def _running_max(values: np.ndarray) -> np.ndarray:
    return np.maximum.accumulate(values, axis=1)
