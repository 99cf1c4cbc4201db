"""How many prompts go through a backbone: rows of like length together, and what they begin with once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import Cache

from .capture import prefill


# A pass takes as long as so many tokens, beside those that it runs.
_A_PASS = 64
# Tokens that are kept for a row, and not run again, weigh a part of those that are run.
_KEPT = 4


@dataclass(frozen=True)
class Pass:
    """Prompts that a backbone runs over together.

    Attributes:
        rows: their numbers.
        prefix: the cache of what they all begin with, for one row; see `prefill`. `None` where they are run whole.
        skip: number of the tokens that it holds.
    """

    rows: list[int]
    prefix: Cache | None = None
    skip: int = 0


def plan_passes(
    lm: nn.Module, prompts: Sequence[Sequence[int]], unread: Sequence[int], batch_tokens: int
) -> list[Pass]:
    """Passes over all prompts; the backbone runs at once over what many of them begin with and nobody reads.

    Chat templates put the same words before each text: of short ones they are half of the tokens.

    Args:
        lm: the frozen LM.
        prompts: token ids of each row.
        unread: how many of a row's first tokens are not read.
        batch_tokens: tokens of a pass, padding included; a longer row goes alone. Of those that are run once, but kept for
            each row, four times as many.
    """
    # The last token of a row is always run: what is asked for is what the backbone makes of it.
    unread = [min(count, len(ids) - 1) for count, ids in zip(unread, prompts, strict=True)]
    start = shared_start(prompts, unread)
    prefix = prefill(lm, start) if start else None
    skip = 0 if prefix is None else len(start)
    after, whole = [], []
    for row, ids in enumerate(prompts):
        (after if skip and unread[row] >= skip and list(ids[:skip]) == start else whole).append(row)
    passes = [Pass(rows, prefix, skip) for rows in _batches(after, prompts, batch_tokens, skip // _KEPT - skip)]
    return passes + [Pass(rows) for rows in _batches(whole, prompts, batch_tokens)]


def shared_start(prompts: Sequence[Sequence[int]], unread: Sequence[int]) -> list[int]:
    """What to run once in place of once a row, so that the fewest tokens are run; may be empty.

    Some rows may begin otherwise: tokenisers merge the last token of a template with the first characters of some texts.
    """
    rows: Iterable[int] = range(len(prompts))
    path: list[int] = []
    most, best = 0, 0
    while True:
        following = defaultdict(list)
        for row in rows:
            if unread[row] > len(path):
                following[prompts[row][len(path)]].append(row)
        if not following:
            return path[:best]
        token, rows = max(following.items(), key=lambda item: len(item[1]))
        path.append(token)
        saved = (len(rows) - 1) * len(path) - _A_PASS
        if saved > most:
            most, best = saved, len(path)


def length_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Rows of similar length together, longest first, so that the largest batch comes first."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _batches(rows: list[int], prompts: Sequence[Sequence[int]], batch_tokens: int, more: int = 0) -> list[list[int]]:
    batches = length_batches([len(prompts[row]) + more for row in rows], batch_tokens)
    return [[rows[i] for i in batch] for batch in batches]
