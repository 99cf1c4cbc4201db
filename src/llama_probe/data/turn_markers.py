"""Learn from a chat template which tokens open a turn of each role, by rendering chats that differ in one text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile

import numpy as np
import torch

from ..errors import ProbeError
from ..files import JSON
from ..heads.turns import TurnMarker, turn_begins


Chat = list[JSON]

# These texts share neither their first nor their last token, so tokens that all their prompts share come from the template. Common
# words merge with a space before them, other signs do not.
DIFFERENT_TEXTS = ("Alpha beta", "7 + 12 = x", "(why?)", "été\u4f60", "- no.", "How now", "the end", "I am here")
# The white space of these texts merges with the last token that opens a turn, or with the first token that ends it.
_SPACED_TEXTS = ("\n\nGamma\n\n", "    delta   ", "\tepsilon\t", "\r\nzeta \n", " eta ", "\ntheta\n")
_TEXTS = (*DIFFERENT_TEXTS, *_SPACED_TEXTS)
_ASKED = [{"role": "user", "content": "Look at it."}]


def as_tool_result(text: str) -> Chat:
    """Return a chat in which the assistant calls a tool, and the tool returns the text."""
    chat = _called("look", "call12345")
    return [*chat, _turn("tool", text, chat)]


def learn_turn_markers(render: Callable[..., list[int]]) -> dict[str, TurnMarker] | None:
    """Return `ProbeConfig.turn_markers` of a chat template; None if its turns of users and replies have no markers.

    Args:
        render: returns the token ids of a chat, from the chat, a bool for the generation prompt, and `documents=`. Raises
            `ProbeError` for a chat that the template does not take.
    """
    try:
        ends = [_turn_end(render, "assistant"), _turn_end(render, "user")]
        replies = ([*_ASKED, {"role": "assistant", "content": text}] for text in _TEXTS)
        user = _marker([_ids_before(render, before, "user") for before in ([], *replies)], ends)
        assistant = _assistant_marker(render, ends)
    except ProbeError:
        return None
    if not user["ids"] or not assistant["ids"] or _is_start(user["ids"], assistant["ids"]):
        return None
    markers: dict[str, TurnMarker] = {"user": user, "assistant": assistant}
    for role, opening in (("system", _system_opening), ("tool", _tool_opening), ("document", _document_opening)):
        try:
            ids = opening(render, ends, user["ids"])
        except ProbeError:  # many templates have no such turn
            continue
        others = [marker["ids"] for marker in markers.values()]
        if ids and not any(_is_start(ids, other) for other in others):
            markers[role] = {"ids": ids, "skip": 0}
    return markers


def common_start(sequences: Iterable[Sequence[int]]) -> list[int]:
    """Return the longest beginning that sequences share."""
    return [items[0] for items in takewhile(lambda items: len(set(items)) == 1, zip(*sequences, strict=False))]


def common_end(sequences: Iterable[Sequence[int]]) -> list[int]:
    """Return the longest end that sequences share."""
    return common_start([list(sequence)[::-1] for sequence in sequences])[::-1]


def _turn_end(render: Callable, role: str) -> list[int]:
    before = [] if role == "user" else _ASKED
    return common_end(render([*before, {"role": role, "content": text}], False) for text in DIFFERENT_TEXTS)


def _assistant_marker(render: Callable, ends: Sequence[list[int]]) -> TurnMarker:
    starts = []
    for text in _TEXTS:
        asked = [{"role": "user", "content": text}]
        prompt = render(asked, True)
        # The generation prompt may be shorter or longer than the opening of a reply in the history.
        starts.append([common_start([prompt, ids]) for ids in _ids_before(render, asked, "assistant", _ASKED)])
    return _marker(starts, ends)


def _marker(starts: Sequence[Sequence[list[int]]], ends: Sequence[list[int]]) -> TurnMarker:
    """Return the marker of a role from what `_ids_before` returns for several chats, and the ids that end turns."""
    skip = min(len(plain_text) - len(any_text) for any_text, plain_text in starts)
    return {"ids": _without_ends(common_end(any_text for any_text, _ in starts), ends), "skip": skip}


def _system_opening(render: Callable, ends: Sequence[list[int]], user: list[int]) -> list[int]:
    ids = _behind_turns(_ids_before(render, [], "system", _ASKED)[0], ends)
    first = render(_ASKED, False)[0]
    if len(ids) > 1 and ids[0] == first != user[0]:
        ids = ids[1:]
    # The template may write a text of its own behind the marker, such as the date.
    return ids[: len(user)]


def _tool_opening(render: Callable, ends: Sequence[list[int]], user: list[int]) -> list[int]:
    openings = []
    # Some templates write the name of the tool and the id of the call into the opening.
    for chat in (_called("look", "call12345"), _called("find_it", "b7x90k1zq")):
        ids, _ = _ids_before(render, chat, "tool")
        openings.append(ids[len(common_start([ids, render(chat, False)])) :])
    return common_start(openings)


def _document_opening(render: Callable, ends: Sequence[list[int]], user: list[int]) -> list[int]:
    """Return the ids that open a document, before its number, title or text."""
    documents = (dict.fromkeys(("title", "text", "doc_id"), text) for text in _TEXTS)
    start = _shared_start(render(_ASKED, False, documents=[document]) for document in documents)
    return _behind_turns(start, ends)


def _behind_turns(ids: list[int], ends: Sequence[list[int]]) -> list[int]:
    """Return the ids behind the turns with which the template begins each chat."""
    for start in range(len(ids) - 1, -1, -1):
        for end in filter(None, ends):
            if ids[start : start + len(end)] == end and start + len(end) < len(ids):
                return ids[start + len(end) :]
    return ids


def _ids_before(render: Callable, before: Chat, role: str, after: Sequence = ()) -> tuple[list[int], list[int]]:
    """Return the ids before the content of a turn: first before any content, second before contents without white space."""

    def prompts(texts: Iterable[str]) -> list[list[int]]:
        return [render([*before, _turn(role, text, before), *after], False) for text in texts]

    return _shared_start(prompts(_TEXTS)), _shared_start(prompts(DIFFERENT_TEXTS))


def _shared_start(prompts: Iterable[list[int]]) -> list[int]:
    """Return the longest beginning that prompts of different texts share. Raise `ProbeError` if the template leaves out a text."""
    prompts = list(prompts)
    start = common_start(prompts)
    if any(len(start) == len(ids) for ids in prompts):
        raise ProbeError("the chat template leaves out the text")
    return start


def _called(function: str, call_id: str) -> Chat:
    call = {"id": call_id, "type": "function", "function": {"name": function, "arguments": {"at": "it"}}}
    return [*_ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]


def _turn(role: str, text: str, before: Chat) -> JSON:
    turn = {"role": role, "content": text}
    if role == "tool":
        call = before[-1]["tool_calls"][0]
        turn |= {"tool_call_id": call["id"], "name": call["function"]["name"]}
    return turn


def _without_ends(ids: list[int], ends: Sequence[list[int]]) -> list[int]:
    """Return ids without the end of the turn before."""
    for end in sorted(filter(None, ends), key=len, reverse=True):
        if ids[: len(end)] == end and len(ids) > len(end):
            return ids[len(end) :]
    return ids


def _is_start(short: list[int], long: list[int]) -> bool:
    return long[: len(short)] == short


def marker_mask(markers: Mapping[str, TurnMarker], input_ids: torch.Tensor) -> torch.Tensor:
    """Return which tokens belong to a marker, `[batch, tokens]` bool, on the CPU."""
    mask = np.zeros(input_ids.shape, dtype=bool)
    for marker in markers.values():
        width = len(marker["ids"]) + marker["skip"]
        for row, behind in zip(*turn_begins(marker, input_ids.cpu().numpy()).nonzero(), strict=True):
            mask[row, behind - width : behind] = True
    return torch.from_numpy(mask)
