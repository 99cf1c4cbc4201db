"""Heads in a worker process: what they say of prompts whose states, or features of them, are all in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from ..errors import ProbeError
from ..heads.probe import ProbeModel
from ..heads.scope import check_rows, token_mask
from ..serving.reader import StateReader
from .state_cache import FEATURES, STATES, StateCache


# States are read in pieces of about so many tokens, several layers of a short prompt at once: a long prompt's states never lie in
# memory in fp32 at once, nor those of many prompts.
_TOKENS = 4096
# Prompts go together where none is shorter than this part of the longest: what is added to the others is computed for nothing.
_SHORTEST = 0.6


@dataclass
class ScoringRequest:
    """A prompt that is complete after this step.

    Attributes:
        request_id: of the engine.
        token_ids: of the prompt; `None` where it was given as embeddings.
        num_tokens: of the prompt.
        block_ids: where its tokens lie, in order.
        heads: names of those to run.
        masks: for each head that can read it the tokens that count, `[num_tokens]`. Set by `Scorer`.
    """

    request_id: str
    token_ids: list[int] | None
    num_tokens: int
    block_ids: list[int]
    heads: list[str]
    masks: dict[str, torch.Tensor] = field(default_factory=dict)


class Scorer:
    """Runs heads on what is cached.

    Args:
        caches: of states and of features, if there are any. With tensor parallelism all ranks have the plan of heads, to read
            the same of the cache, and rank 0 runs them.
        block_size: tokens a block of the scheduler's; the cache may split them.
        runs: whether this rank runs the heads.
    """

    def __init__(self, caches: Mapping[str, StateCache], block_size: int, runs: bool):
        self.caches, self.block_size, self.runs = caches, block_size, runs
        cache = next(iter(caches.values()))
        self.plan, self.device, self.kernel_block_size = cache.plan, cache.kv_cache.device, cache.kernel_block_size
        self.heads = {name: head.to(self.device) for name, head in (self.plan.whole | self.plan.readers).items()}

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoringRequest]) -> dict[str, dict[str, list[float] | str]]:
        """Return by request and head the logits, finite or not, or why there are none. Ranks that run no heads have no logits."""
        found: dict[str, dict[str, list[float] | str]] = {request.request_id: {} for request in requests}
        for request in requests:
            for name in request.heads:
                try:
                    request.masks[name] = self._mask(self.heads[name], request)
                except ProbeError as error:
                    found[request.request_id][name] = str(error)
        for batch in _batches(requests, self.kernel_block_size):
            logits = self._score(batch)
            for row, request in enumerate(batch):
                found[request.request_id] |= {name: rows[row].tolist() for name, rows in logits.items()}
        for request in requests:
            said = found[request.request_id]
            found[request.request_id] = {name: said[name] for name in request.heads if name in said}
        return found

    def _score(self, requests: Sequence[ScoringRequest]) -> dict[str, torch.Tensor]:
        """Return logits `[prompts, num_labels]` by head, of prompts that the same heads can read."""
        lengths = torch.tensor([request.num_tokens for request in requests])
        width = int(lengths.max())
        masks = {
            name: pad_sequence([request.masks[name] for request in requests], batch_first=True)  # [prompts, width]
            for name in requests[0].masks
        }
        blocks = pad_sequence([torch.tensor(request.block_ids) for request in requests], batch_first=True)
        # What lies behind a shorter prompt may be anything, and anything may be no number.
        padding = None if (lengths == width).all() else (torch.arange(width) >= lengths[:, None]).to(self.device)
        splits = self.block_size // self.kernel_block_size
        blocks = (blocks[:, :, None] * splits + torch.arange(splits)).flatten(1).to(self.device)
        found: dict[str, torch.Tensor] = {}
        for read, heads in ((self._read_states, self.plan.whole), (self._read_features, self.plan.readers)):
            if own := {name: mask for name, mask in masks.items() if name in heads}:
                found |= read(own, blocks, padding)
        return found

    def _pieces(
        self, blocks: torch.Tensor, masks: dict[str, torch.Tensor]
    ) -> Iterator[tuple[slice, torch.Tensor, bool]]:
        """Yield the tokens of prompts in pieces: which, the blocks `[prompts, blocks]` that hold them, and if they are the last."""
        size, width = self.kernel_block_size, next(iter(masks.values())).shape[1]
        step = max(_TOKENS // (len(blocks) * size), 1) * size
        for start in range(0, width, step):
            stop = min(start + step, width)
            part = blocks[:, start // size : -(-stop // size)]  # blocks are read whole
            yield slice(start, stop), part, stop == width

    def _read_states(
        self, masks: dict[str, torch.Tensor], blocks: torch.Tensor, padding: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Return logits by head, of prompts `[prompts, blocks]`, for the tokens that count and those that are none `[prompts, width]`."""
        heads = {name: self.heads[name] for name in masks}
        reader = StateReader(heads) if self.runs else None
        wanted = {layer for head in heads.values() for layer in head.layer_indices}
        places = [place for place, layer in enumerate(self.plan.layers) if layer in wanted]
        for tokens, part, last in self._pieces(blocks, masks):
            if reader is not None:
                reader.begin({name: mask[:, tokens] for name, mask in masks.items()}, last)
            for states in _neighbours(places, _TOKENS // (part.numel() * self.kernel_block_size)):
                hidden = self._numbers(STATES, states, part, padding, tokens)  # [S, prompts, tokens, D]
                if reader is not None:
                    for layer, each in zip(self.plan.layers[states], hidden, strict=True):
                        reader.on_state(layer, each)
            if reader is not None:
                reader.end()
        return {} if reader is None else {name: output.logits for name, output in reader.results().items()}

    def _read_features(
        self, masks: dict[str, torch.Tensor], blocks: torch.Tensor, padding: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Return logits by head, of the same prompts, for heads that read features."""
        states = {name: self.heads[name].init_state() for name in masks}
        for tokens, part, last in self._pieces(blocks, masks):
            features = self._numbers(FEATURES, slice(0, 1), part, padding, tokens)[0]  # [prompts, tokens, F]
            for name, state in states.items() if self.runs else ():
                head, mask = self.heads[name], masks[name][:, tokens]
                counted = mask.any(dim=0).nonzero().flatten().tolist()
                if not counted:
                    continue
                columns = slice(counted[0], counted[-1] + 1)
                own = features[:, columns, self.plan.columns[name]].unflatten(-1, (len(head.layer_indices), -1))
                own = head.prepare(own.permute(2, 0, 1, 3))  # [S, prompts, tokens, rank]
                mask = None if bool(mask[:, columns].all()) else mask[:, columns].to(self.device)
                head.step(state, head.layer_indices, own, mask, last=last)
        return {name: self.heads[name].finish(state).logits for name, state in states.items()} if self.runs else {}

    def _numbers(
        self, kind: str, states: slice, blocks: torch.Tensor, padding: torch.Tensor | None, tokens: slice
    ) -> torch.Tensor:
        """Return what is cached of some tokens, `[S, prompts, tokens, width]`, 0 behind the end of a prompt."""
        found = self.caches[kind].read(states, blocks)[:, :, : tokens.stop - tokens.start]
        return found if padding is None else found.masked_fill(padding[:, tokens, None], 0)

    def _mask(self, head: ProbeModel, request: ScoringRequest) -> torch.Tensor:
        ids = None if request.token_ids is None else torch.tensor([request.token_ids])
        mask = token_mask(head.config, ids, torch.ones(1, request.num_tokens, dtype=torch.long))
        check_rows(mask)
        return mask[0]


def _neighbours(places: Sequence[int], most: int) -> Iterator[slice]:
    """Yield ascending places as ranges of at most `most` places."""
    first = 0
    for i in range(1, len(places) + 1):
        if i == len(places) or places[i] != places[i - 1] + 1 or i - first >= most:
            yield slice(places[first], places[i - 1] + 1)
            first = i


def _batches(requests: Sequence[ScoringRequest], size: int) -> Iterator[list[ScoringRequest]]:
    """Yield prompts that go through the heads together: of the same heads, and of about one length.

    Args:
        size: tokens a block of the cache; blocks are read as a whole.
    """
    together: dict[tuple[str, ...], list[ScoringRequest]] = {}
    for request in requests:
        if request.masks:
            together.setdefault(tuple(request.masks), []).append(request)
    for alike in together.values():
        alike.sort(key=lambda request: request.num_tokens, reverse=True)
        batch: list[ScoringRequest] = []
        for request in alike:
            width = batch[0].num_tokens if batch else 0
            read = -(-width // size) * size * (len(batch) + 1)
            if batch and (read > _TOKENS or request.num_tokens < _SHORTEST * width):
                yield batch
                batch = []
            batch.append(request)
        yield batch
