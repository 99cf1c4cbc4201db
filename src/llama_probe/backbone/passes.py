"""Plans forward passes: prompts of similar length together, a common start only once, and a long prompt in pieces."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import transformers
from torch import nn

from .decoder import Decoder, find_decoder


T = TypeVar("T")

# Tokens of a batch, padding included. They bound the memory: the hidden states of a batch are there for all layers that are read.
BATCH_TOKENS = 4096
# Tokens of each row in one pass. A longer prompt runs in pieces, which bounds the memory beside the KV cache.
PASS_TOKENS = 2048
# Fixed cost of a forward pass, in tokens.
_PASS_COST = 64
# Tokens in the KV cache of a row that count as one token in a batch.
_CACHED_TOKENS = 4
# Arguments of a pass that can be cut into pieces, [B, n, ...]. The attention mask, [B, past + n], grows with the pieces.
_CUT_BY_TOKENS = ("input_ids", "inputs_embeds", "position_ids")
_IN_PIECES = {*_CUT_BY_TOKENS, "attention_mask", "cache", "use_cache"}


@dataclass(frozen=True)
class Pass:
    """The `rows` that a backbone runs over together, after `skip` tokens of a common start in the KV cache `prefix`."""

    rows: list[int]
    prefix: transformers.Cache | None = None
    skip: int = 0


class Work(NamedTuple):
    """The work of passes: tokens, padding included, and pairs of a token and a token that it may attend to."""

    tokens: int
    pairs: int


def work_of(passes: Iterable[Pass], lengths: Sequence[int]) -> Work:
    """Return the work of passes over rows of these numbers of tokens."""
    all_tokens = 0
    all_pairs = 0
    for run in passes:
        width = max(lengths[row] for row in run.rows)
        tokens = len(run.rows) * (width - run.skip)
        all_tokens += tokens
        all_pairs += tokens * width
    return Work(all_tokens, all_pairs)


class Pace:
    """The seconds that passes took, and what they say of passes to come.

    A row of L tokens takes a time in proportion to L + L^2 / c, because each token attends to those before it. The seconds of a token
    and of a pair of tokens are fitted to the passes so far by least squares, then scaled to the time that these passes took.
    """

    def __init__(self):
        self._squares = np.zeros((2, 2))
        self._products = np.zeros(2)
        self._done = np.zeros(2)
        self._seconds = 0.0

    def note(self, work: Work, seconds: float) -> None:
        """Note a pass that has run."""
        numbers = np.array(work, dtype=float)
        self._squares += np.outer(numbers, numbers)
        self._products += numbers * seconds
        self._done += numbers
        self._seconds += seconds

    def seconds_of(self, work: Work) -> float:
        """Return the seconds that passes with this work will take together, after one pass at least."""
        rates = self._rates()
        return self._seconds * float(np.array(work) @ rates) / float(self._done @ rates)

    def _rates(self) -> np.ndarray:
        """Return what a token takes and what a pair takes, in some unit."""
        (tokens, both), (_, pairs) = self._squares
        determinant = tokens * pairs - both**2
        if determinant < 1e-9 * tokens * pairs:  # passes of one length
            return np.array([1.0, 0.0])
        rates = np.linalg.solve(self._squares, self._products)
        if rates.min() >= 0 and rates.any():
            return rates
        return np.array([1.0, 0.0] if rates[1] <= 0 else [0.0, 1.0])


def fair_order(items: Sequence[T]) -> list[T]:
    """Return items, sorted by size, in an order in which each beginning is a sample of all: the first, the middle, the quarters, ...

    The time of the first tenth then tells the time of the rest. A batch that is too large for the memory fails at once.
    """
    bits = max(len(items) - 1, 1).bit_length()
    return [items[i] for i in sorted(range(len(items)), key=lambda i: f"{i:0{bits}b}"[::-1])]


def plan_passes(lm: nn.Module, prompts: Sequence[Sequence[int]], unread: Sequence[int]) -> list[Pass]:
    """Plan forward passes over all prompts, and run the backbone once over a start that many of them share.

    Chat templates put the same tokens before each text: half of the tokens of short prompts.

    Args:
        unread: number of first tokens of each row that are not read.
    """
    # The last token of a row always runs, because its output is wanted.
    unread = [min(count, len(ids) - 1) for count, ids in zip(unread, prompts, strict=True)]
    start = shared_start(prompts, unread)
    prefix = prefill(lm, start) if start else None
    skip = 0 if prefix is None else len(start)
    after: list[int] = []
    whole: list[int] = []
    for row, ids in enumerate(prompts):
        (after if skip and unread[row] >= skip and list(ids[:skip]) == start else whole).append(row)
    passes = [Pass(rows, prefix, skip) for rows in _batches(after, prompts, skip // _CACHED_TOKENS - skip)]
    return passes + [Pass(rows) for rows in _batches(whole, prompts)]


def prefill(lm: nn.Module, ids: Sequence[int]) -> transformers.Cache | None:
    """Run the backbone over the first tokens of many prompts, and return its KV cache for one row.

    Returns:
        The cache, or None if it holds states of linear attention, which transformers cannot repeat for several rows.
    """
    decoder = find_decoder(lm)
    output: Any = None
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor([list(ids)], device=decoder.input_device), "use_cache": True}
        for arguments in split_pass(decoder, inputs):
            output = decoder.run(**arguments)
    cache = output[decoder.cache_name]
    return None if any(hasattr(layer, "recurrent_states") for layer in cache.layers) else cache


def shared_start(prompts: Sequence[Sequence[int]], unread: Sequence[int]) -> list[int]:
    """Return the start to run once instead of once a row, so that the fewest tokens run; it may be empty.

    Some rows may have another start: tokenizers merge the last token of a template with the first characters of some texts.
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
        saved = (len(rows) - 1) * len(path) - _PASS_COST
        if saved > most:
            most, best = saved, len(path)


def length_batches(lengths: Sequence[int], batch_tokens: int | None = None) -> list[list[int]]:
    """Group rows of similar length, the largest batch first. A row that is longer than a batch is one of its own."""
    batch_tokens = BATCH_TOKENS if batch_tokens is None else batch_tokens
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _batches(rows: list[int], prompts: Sequence[Sequence[int]], more: int = 0) -> list[list[int]]:
    batches = length_batches([len(prompts[row]) + more for row in rows])
    return [[rows[i] for i in batch] for batch in batches]


def split_pass(decoder: Decoder, inputs: Mapping[str, Any], past: int = 0) -> list[dict[str, Any]]:
    """Return the arguments of the passes over some prompts: of one pass, or for long prompts of several over one KV cache.

    A model with linear attention, and a prompt with images, run in one pass.

    Args:
        inputs: arguments of the decoder, for one pass over n further tokens: `input_ids` `[B, n]` or `inputs_embeds`, an
            `attention_mask` `[B, past + n]`, and the `cache` of the tokens before, which is filled.
        past: number of tokens in the cache.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    width = given["input_ids" if "input_ids" in given else "inputs_embeds"].shape[1]
    count = math.ceil(width / PASS_TOKENS)
    positions = given.get("position_ids")
    can_be_cut = given.keys() <= _IN_PIECES and (positions is None or positions.dim() == 2)
    if count == 1 or not can_be_cut:
        return [given]
    cache = given.get("cache")
    cache = transformers.DynamicCache(config=decoder.model.config) if cache is None else cache
    if any(hasattr(layer, "recurrent_states") for layer in cache.layers):
        return [given]
    size = math.ceil(width / count)
    pieces = []
    for start in range(0, width, size):
        stop = min(start + size, width)
        piece = {name: given[name][:, start:stop] for name in _CUT_BY_TOKENS if name in given}
        if "attention_mask" in given:
            piece["attention_mask"] = given["attention_mask"][:, : past + stop]
        pieces.append(piece | {"cache": cache, "use_cache": True})
    return pieces
