"""Heads in a worker process: what they say of prompts whose states, or features of them, are all in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from vllm.utils.torch_utils import async_tensor_h2d

from ..errors import ProbeError
from ..heads.decision import fill_unread
from ..heads.probe import ProbeModel
from ..heads.scope import check_rows, token_mask
from ..heads.stream import ProbeState
from .state_cache import FEATURES, STATES, StateCache
from .step_scores import Places


# States are read in pieces of about so many tokens, several layers of a short prompt at once: a long prompt's states never lie in
# memory in fp32 at once, nor those of many prompts.
_TOKENS = 4096
# Prompts go together where none is shorter than this part of the longest: what is added to the others is computed for nothing.
_SHORTEST = 0.6


@dataclass
class ScoringRequest:
    """A prompt that is complete after this step, or a reply that heads are to follow from here on.

    Attributes:
        request_id: of the engine.
        token_ids: of the prompt; `None` where it was given as embeddings.
        num_prompt_tokens: of the prompt.
        num_tokens: to read. Those behind the prompt are of its reply, which heads of prompts do not read.
        block_ids: where the tokens lie, in order.
        heads: names of those whose scores of the prompt are wanted; `None` if the prompt was scored before.
        slot: where heads that follow the reply keep their states; `None` if none do.
        masks: for each head that can read it the tokens that count, `[num_tokens]`. Set by `Scorer`.
    """

    request_id: str
    token_ids: list[int] | None
    num_prompt_tokens: int
    num_tokens: int
    block_ids: list[int]
    heads: list[str] | None
    slot: int | None = None
    masks: dict[str, torch.Tensor] = field(default_factory=dict)


class Scorer:
    """Runs heads on what is cached. It never waits for the device.

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
        heads = self.plan.whole | self.plan.readers
        self.heads = {name: heads[name].to(self.device) for name in self.plan.names}

        self.states = self.plan.reply_states
        self.followers = {name: head for name, head in self.heads.items() if head.config.reads_reply}

    @torch.no_grad()
    def score(self, requests: Sequence[ScoringRequest]) -> tuple[Places, list[torch.Tensor]]:
        """Return the scores of prompts, finite or not, or why there are none, as `StepScores` takes them. Begin states of replies.

        A rank that runs no heads has no scores.
        """
        places: Places = {
            request.request_id: dict.fromkeys(request.heads, "") for request in requests if request.heads is not None
        }
        for request in requests:
            followers = () if request.slot is None else self.followers
            for name in dict.fromkeys((*(request.heads or ()), *followers)):
                try:
                    request.masks[name] = self._mask(self.heads[name], request)
                except ProbeError as error:  # a reply that has not begun has no tokens
                    if name in (request.heads or ()):
                        places[request.request_id][name] = str(error)
        if self.states is not None and (slots := [request.slot for request in requests if request.slot is not None]):
            self.states.clear(async_tensor_h2d(slots, self.device))
        parts: list[torch.Tensor] = []
        for batch in _batches(requests, self.kernel_block_size):
            for name, logits in self._score(batch).items():
                for row, request in enumerate(batch):
                    if name in (request.heads or ()):
                        places[request.request_id][name] = len(parts), row
                parts.append(logits)
        return places, parts

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
        padding = None
        if not (lengths == width).all():
            padding = async_tensor_h2d(torch.arange(width) >= lengths[:, None], self.device)
        splits = self.block_size // self.kernel_block_size
        blocks = (blocks[:, :, None] * splits + torch.arange(splits)).flatten(1)
        states = self._read(masks, async_tensor_h2d(blocks, self.device), padding)
        if self.states is not None and any(request.slot is not None for request in requests):
            slots = [self.states.spare if request.slot is None else request.slot for request in requests]
            slots = async_tensor_h2d(slots, self.device)
            for name in states.keys() & self.followers.keys():
                self.states.put(name, slots, states[name].joined())
        return {
            name: fill_unread(self.heads[name].finish(state), masks[name].any(dim=1)).logits
            for name, state in states.items()
        }

    def _read(
        self, masks: dict[str, torch.Tensor], blocks: torch.Tensor, padding: torch.Tensor | None
    ) -> dict[str, ProbeState]:
        """Return what heads have read of prompts in blocks `[prompts, blocks]`, if this rank runs them.

        Args:
            masks: for each head the tokens that count, `[prompts, width]`, on the CPU.
            padding: the tokens that belong to no prompt, `[prompts, width]`.
        """
        heads = {name: self.heads[name] for name in masks}
        states = {name: head.init_state(keep=name in self.followers) for name, head in heads.items()}
        for tokens, part, last in self._pieces(blocks, next(iter(masks.values())).shape[1]):
            cut = {name: self._cut(mask[:, tokens]) for name, mask in masks.items()}
            for layers, inputs in self._inputs(heads, part, padding, tokens):
                for name, x in inputs.items() if self.runs else ():
                    head, (columns, mask) = heads[name], cut[name]
                    head.step(states[name], layers or head.layer_indices, x[:, :, columns], mask, last=last)
        return states if self.runs else {}

    def _pieces(self, blocks: torch.Tensor, width: int) -> Iterator[tuple[slice, torch.Tensor, bool]]:
        """Yield the tokens of prompts in pieces: which, the blocks `[prompts, blocks]` that hold them, and if they are the last."""
        size = self.kernel_block_size
        step = max(_TOKENS // (len(blocks) * size), 1) * size
        for start in range(0, width, step):
            stop = min(start + step, width)
            part = blocks[:, start // size : -(-stop // size)]  # blocks are read whole
            yield slice(start, stop), part, stop == width

    def _cut(self, mask: torch.Tensor) -> tuple[slice, torch.Tensor | None]:
        """Return the columns of a `[prompts, tokens]` mask in which some token counts, and what is left of it on the device."""
        counted = mask.any(dim=0).nonzero().flatten().tolist()
        columns = slice(counted[0], counted[-1] + 1) if counted else slice(0, 1)
        mask = mask[:, columns]
        return columns, None if bool(mask.all()) else async_tensor_h2d(mask, self.device)

    def _inputs(
        self, heads: Mapping[str, ProbeModel], blocks: torch.Tensor, padding: torch.Tensor | None, tokens: slice
    ) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """Yield layers, of which an empty list is all of a head, and by head what it reads of them, `[S, prompts, tokens, width]`."""
        whole = {name: head for name, head in heads.items() if name in self.plan.whole}
        wanted = {layer for head in whole.values() for layer in head.layer_indices}
        places = [place for place, layer in enumerate(self.plan.layers) if layer in wanted]
        for states in _neighbours(places, _TOKENS // (blocks.numel() * self.kernel_block_size)):
            hidden = self._numbers(STATES, states, blocks, padding, tokens)
            prepared = {
                head.input_format(hidden): head for head in whole.values()
            }  # heads that agree share the result
            prepared = {kind: head.prepare(hidden) for kind, head in prepared.items()}
            yield self.plan.layers[states], {name: prepared[head.input_format(hidden)] for name, head in whole.items()}
        if readers := {name: head for name, head in heads.items() if name not in whole}:
            features = self._numbers(FEATURES, slice(0, 1), blocks, padding, tokens)[0]  # [prompts, tokens, F]
            yield [], {name: self._own(name, head, features) for name, head in readers.items()}

    def _own(self, name: str, head: ProbeModel, features: torch.Tensor) -> torch.Tensor:
        """Return a head's part of features `[prompts, tokens, F]`: `[S, prompts, tokens, rank]`."""
        own = features[..., self.plan.columns[name]].unflatten(-1, (len(head.layer_indices), -1))
        return head.prepare(own.permute(2, 0, 1, 3))

    def _numbers(
        self, kind: str, states: slice, blocks: torch.Tensor, padding: torch.Tensor | None, tokens: slice
    ) -> torch.Tensor:
        """Return what is cached of some tokens, `[S, prompts, tokens, width]`, 0 behind the end of a prompt."""
        found = self.caches[kind].read(states, blocks)[:, :, : tokens.stop - tokens.start]
        return found if padding is None else found.masked_fill(padding[:, tokens, None], 0)

    def _mask(self, head: ProbeModel, request: ScoringRequest) -> torch.Tensor:
        prompt = torch.zeros(1, request.num_prompt_tokens, dtype=torch.bool)
        if head.config.token_scope != "response":
            ids = None if request.token_ids is None else torch.tensor([request.token_ids])
            prompt = token_mask(head.config, ids, torch.ones_like(prompt, dtype=torch.long))
        mask = F.pad(prompt, (0, request.num_tokens - request.num_prompt_tokens), value=head.config.reads_reply)
        check_rows(mask, head.config)
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
