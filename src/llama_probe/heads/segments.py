"""Segments: the parts of a prompt that a head judges by themselves. They are turns of a chat, and windows of a long text.

The strongest segment counts; see `strongest`. Windows overlap by half: each begins half a window behind the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from .aggregator import get_probe_type
from .configuration import ProbeConfig


Move = Callable[[torch.Tensor], torch.Tensor]


def judges_turns(config: ProbeConfig) -> bool:
    """Return True if a head judges each turn of a chat by itself.

    The head may miss a harmful turn if it judges only all turns together. Heads with `token_scope="user"` or `"tool"` judge
    turns if they flag one of two labels, or are multi-label.
    """
    judges = config.flagged_index is not None or config.problem_type == "multi_label_classification"
    return judges and config.token_scope in ("user", "tool") and get_probe_type(config.probe_type).reads == "all"


def judges_segments(config: ProbeConfig) -> bool:
    """Return True if a head judges turns or windows by themselves."""
    return config.window > 0 or judges_turns(config)


def number_segments(
    config: ProbeConfig, mask: torch.Tensor, always: bool = False, is_turn: bool = False
) -> torch.Tensor | None:
    """Return the number of each token's turn, from 1, and 0 for tokens that do not count: `[batch, tokens]` int64.

    Neighbouring tokens that count are in one turn. For a head that does not judge turns, all tokens are in one. `find_segments`
    cuts turns into windows.

    Args:
        mask (`[batch, tokens]` bool): the tokens that count.
        always: return the numbers also if no row has several segments. Later tokens may then join them.
        is_turn: all tokens of a row are one turn, because the user chose them (`probe_mask`).

    Returns:
        The numbers, on the device of the mask; `None` if the head judges no segments, or no row has several segments.
    """
    if not judges_segments(config) or (is_turn and config.window == 0):
        return None
    counted = mask.cpu().numpy()  # on the host, as in `turn_mask`
    if judges_turns(config) and not is_turn:
        begins = counted & ~np.pad(counted, ((0, 0), (1, 0)))[:, :-1]
    else:
        begins = counted & (counted.cumsum(axis=1) == 1)
    is_short = config.window == 0 or counted.sum(axis=1).max() <= config.window
    if not always and is_short and begins.sum(axis=1).max() <= 1:
        return None
    return torch.from_numpy(begins.cumsum(axis=1) * counted).to(mask.device)


@dataclass
class Group:
    """Tokens of several segments, side by side.

    Attributes:
        index (`[segments, width]` int64): place of each token among the tokens that are read, `row * n + column`. Filling has the
            place of a token of the segment, if it has one.
        mask (`[segments, width]` bool): false for filling; `None` if there is none.
    """

    index: torch.Tensor
    mask: torch.Tensor | None


@dataclass
class Rows:
    """Segments by row, K of a row at most.

    Attributes:
        places (`[batch, K]` int64): of each segment in a list of segments; `None` if the list has K segments of each row in turn.
        counted (`[batch, K]` bool): false for filling; `None` if there is none.
        spans (`[batch, K, 2]` int64): first column of each segment, and one past its last; 0 for filling.
    """

    places: torch.Tensor | None
    counted: torch.Tensor | None
    spans: torch.Tensor

    @classmethod
    def single(cls, summaries: torch.Tensor) -> Rows:
        """Return rows of one segment each, all turns together, for summaries `[S, batch, width]`. They have no span."""
        batch, device = summaries.shape[1], summaries.device
        return cls(None, None, torch.zeros(batch, 1, 2, dtype=torch.long, device=device))

    @property
    def most(self) -> int:
        """K, the number of segments of the row that has most."""
        return self.spans.shape[1]

    def arrange(self, items: torch.Tensor) -> torch.Tensor:
        """Return items of the list of segments, `[S, segments, ...]`, by row: `[S, batch, K, ...]`."""
        if self.places is None:
            return items.unflatten(1, self.spans.shape[:2])
        return items[:, self.places]


@dataclass
class Segments:
    """The segments to which the tokens of one pass belong.

    Segments have numbers: first those that an earlier pass has begun (the first of each row, then the second of each row), then
    those of `groups`, in order.

    Attributes:
        num_begun: number of segments of a row that an earlier pass has begun, in the row with most.
        begun: the tokens that join these.
        groups: the tokens of segments that begin in this pass.
        ended (`[segments]` int64): numbers of the segments that no later token joins; `None` if these are all, in order.
        ended_rows: `ended` by row.
        open: numbers of the segments that later tokens may join: `[batch]` int64 for the first of each row, and for the second.
        open_rows: `open` by row; those that count if the prompt ends here.
        batch, width: number of rows, and of columns that are read.
    """

    batch: int
    width: int
    num_begun: int
    begun: Group | None
    groups: list[Group]
    ended: torch.Tensor | None
    ended_rows: Rows
    open: list[torch.Tensor]
    open_rows: Rows

    def holding(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which segments hold some tokens: at least half of these, or these as at least half of their own; and which touch them.

        A segment touches tokens if it has one of them.

        Args:
            tokens (`[batch, n]` bool): of the tokens that are read, which must be whole prompts.

        Returns:
            `[batch, K]` bool each, false for filling.
        """
        flat = tokens.flatten()
        masks = [group.index >= 0 if group.mask is None else group.mask for group in self.groups]
        counts = [(flat[group.index] & mask).sum(dim=1) for group, mask in zip(self.groups, masks, strict=True)]
        both = torch.stack([torch.cat(counts), torch.cat([mask.sum(dim=1) for mask in masks])])
        count, size = self.ended_rows.arrange(both if self.ended is None else both[:, self.ended])  # [batch, K]
        touches = count > 0
        if self.ended_rows.counted is not None:
            touches = touches & self.ended_rows.counted
        return touches & ((2 * count >= tokens.sum(dim=1, keepdim=True)) | (2 * count >= size)), touches

    def spread(self, weights: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Return the token weights of one segment of each row in the columns of its tokens: `[S, batch, width]`, 0 elsewhere.

        Args:
            weights (`[S, segments, length]`): of a pass with one group, whose segments have all ended.
            place (`[batch]` int64): which segment of each row.
        """
        (group,) = self.groups
        rows = torch.arange(self.batch, device=place.device)
        columns = (
            self.ended_rows.arrange(group.index[None])[0, rows, place] - rows[:, None] * self.width
        )  # [batch, length]
        chosen = self.ended_rows.arrange(weights)[:, rows, place]
        spread = weights.new_zeros(len(weights), self.batch, self.width)
        # Filling has the weight 0 and may have the column of a token.
        return spread.scatter_add_(2, columns.clamp_min(0).expand_as(chosen), chosen)


def join_counted(parts: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> torch.Tensor | None:
    """Join which segments count, `[batch, K]` of each part with logits `[batch, K, num_labels]`; `None` if all count."""
    if all(counted is None for _, counted in parts):
        return None
    masks = [torch.ones_like(logits[..., 0], dtype=torch.bool) if mask is None else mask for logits, mask in parts]
    return join(masks)


def join(parts: Sequence[torch.Tensor], dim: int = 1) -> torch.Tensor:
    """Return `torch.cat(parts, dim)`, without a copy of a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def span_of(mask: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Return the first column that counts and one past the last, for each label: `[batch, num_labels, 2]` int64.

    Args:
        mask (`[batch, tokens]` bool): the tokens that count.
    """
    first = mask.int().argmax(dim=1)
    last = mask.shape[1] - mask.flip(1).int().argmax(dim=1)
    span = torch.stack([first, torch.where(mask.any(dim=1), last, first)], dim=-1)
    return span.unsqueeze(1).expand(-1, num_labels, -1)


# A segment. `first`, `read` and `stop` are places in the list of all tokens that count, of all rows: the segment's first token, its
# first token that is read in this pass, and the end of its tokens so far.
_FIELDS = {"row": int, "first": int, "read": int, "stop": int, "is_begun": bool, "is_open": bool, "counts": bool}
_SEGMENT = np.dtype(list(_FIELDS.items()))


def find_segments(
    numbers: torch.Tensor,
    window: int,
    columns: slice,
    start: int = 0,
    ends: bool = True,
    move: Move = torch.Tensor.clone,
) -> Segments:
    """Return the segments of the tokens that one pass reads.

    Windows are counted from the first token of a turn that counts. A window that adds no token to the window before it does not
    count.

    Args:
        numbers (`[batch, tokens]` int64, on the CPU): from `number_segments`, of all tokens up to the end of this pass.
        window: as in `ProbeConfig`; 0 for whole turns.
        columns: the columns that are read. They hold all tokens of the pass that count.
        start: first column of the pass. Earlier passes have read the tokens before it.
        ends: no token that counts follows.
        move: copies a tensor to the device of the head.
    """
    turns = numbers.numpy()
    batch = len(turns)
    width = columns.stop - columns.start
    rows, places = np.nonzero(turns)
    bounds = np.searchsorted(rows, np.arange(batch + 1))
    found = []
    for row, (low, high) in enumerate(pairwise(bounds)):
        seen = low + np.count_nonzero(turns[row, :start])
        found += _segments_of_row(row, turns[row, places[low:high]], low, seen, window, ends)
    segments = np.concatenate(found) if found else np.zeros(0, _SEGMENT)
    begun = segments[segments["is_begun"]]
    new = segments[~segments["is_begun"]]
    num_begun = _ranks(begun["row"]).max(initial=-1) + 1
    filled = np.zeros(num_begun * batch, _SEGMENT)
    filled[_ranks(begun["row"]) * batch + begun["row"]] = begun
    # Windows are of one length. Turns are not: the first turn of each row goes into one group, the second into the next.
    ranks = _ranks(new["row"]) if window == 0 else np.zeros(len(new), int)
    parts = [new[ranks == rank] for rank in range(ranks.max(initial=-1) + 1)]
    listed = np.concatenate([filled, *parts])
    is_partial = len(begun) > 0 or bool(listed["is_open"].any())
    index = rows * width + places - columns.start
    ended = _in_rows(listed, listed["counts"] & ~listed["is_open"])
    is_open = _in_rows(listed, listed["is_open"])
    return Segments(
        batch=batch,
        width=width,
        num_begun=num_begun,
        begun=_group(filled, index, True, move) if num_begun else None,
        groups=[_group(part, index, is_partial, move) for part in parts],
        ended=None if np.array_equal(ended, np.arange(len(listed))) else move(torch.from_numpy(ended)),
        ended_rows=_rows(listed[ended], batch, places, move),
        open=[move(torch.from_numpy(is_open[which])) for which in _by_row(listed["row"][is_open], batch).T],
        open_rows=_rows(listed[is_open], batch, places, move),
    )


def _segments_of_row(row: int, turns: np.ndarray, low: int, seen: int, window: int, ends: bool) -> list[np.ndarray]:
    """Return the segments of a row to which tokens from `seen` on belong, or which end there, for each turn.

    Args:
        turns (`[tokens]`): the turn of each token of the row that counts.
        low: place of the first of these tokens.
        seen: place of the first token of this pass.
    """
    parts = []
    high = low + len(turns)
    borders = low + np.flatnonzero(np.diff(turns, prepend=0, append=0))
    for begin, end in pairwise(borders.tolist()):
        if end < seen:  # the turn had ended before this pass
            continue
        if window:
            first = np.arange(begin, end, window // 2)
            limit = first + window
            counts = (first == begin) | (end > first + window // 2)
        else:
            first = np.array([begin])
            limit = np.array([high + 1])  # any turn may grow
            counts = np.array([True])
        is_open = (limit > end) & (end == high) & (not ends)
        is_begun = (first < seen) & (limit > seen)
        part = np.zeros(len(first), _SEGMENT)
        part["row"] = row
        part["first"] = first
        part["read"] = np.maximum(first, seen)
        part["stop"] = np.minimum(limit, end)
        part["is_begun"] = is_begun
        part["is_open"] = is_open
        part["counts"] = counts
        parts.append(part[is_begun | ((first >= seen) & (counts | is_open))])
    return parts


def _ranks(rows: np.ndarray) -> np.ndarray:
    """Return for each entry of a list of ascending numbers how many entries before it are equal."""
    return np.arange(len(rows)) - np.searchsorted(rows, rows)


def _in_rows(segments: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return the numbers of the chosen segments, row by row."""
    numbers = np.flatnonzero(chosen)
    return numbers[np.argsort(segments["row"][numbers], kind="stable")]


def _by_row(rows: np.ndarray, batch: int) -> np.ndarray:
    """Return the places of each row in a list of ascending row numbers, `[batch, K]`. Filling is 0."""
    ranks = _ranks(rows)
    places = np.zeros((batch, ranks.max(initial=-1) + 1), int)
    places[rows, ranks] = np.arange(len(rows))
    return places


def _group(segments: np.ndarray, index: np.ndarray, masked: bool, move: Move) -> Group:
    """Return the tokens of segments that are read in this pass. `index` gives the place of each token that counts."""
    length = max((segments["stop"] - segments["read"]).max(), 1)
    tokens = segments["read"][:, None] + np.arange(length)  # [segments, length]
    mask = tokens < segments["stop"][:, None]
    has_tokens = segments["stop"] > segments["read"]
    places = np.zeros(tokens.shape, int)
    places[has_tokens] = index[np.minimum(tokens, segments["stop"][:, None] - 1)[has_tokens]]
    is_masked = masked or not mask.all()
    return Group(move(torch.from_numpy(places)), move(torch.from_numpy(mask)) if is_masked else None)


def _rows(segments: np.ndarray, batch: int, columns: np.ndarray, move: Move) -> Rows:
    """Arrange segments, which are in the order of their rows. `columns` gives the column of each token that counts."""
    places = _by_row(segments["row"], batch)
    at = segments["row"], _ranks(segments["row"])
    counted = np.zeros(places.shape, bool)
    counted[at] = segments["counts"]
    spans = np.zeros((*places.shape, 2), int)
    spans[at] = np.stack([columns[segments["first"]], columns[segments["stop"] - 1] + 1], axis=-1)
    return Rows(
        places=None if places.size == len(segments) else move(torch.from_numpy(places)),
        counted=None if counted.all() else move(torch.from_numpy(counted)),
        spans=move(torch.from_numpy(spans)),
    )
