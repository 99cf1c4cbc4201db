"""Heads in a worker process: scores of prompts whose tokens are all in the cache, and of the newest tokens of replies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from vllm.utils.torch_utils import async_tensor_h2d

from ..errors import ProbeError
from ..heads.decision import fill_unread
from ..heads.probe import ProbeModel
from ..heads.scope import check_rows, token_mask
from ..heads.segments import find_segments, number_segments, span_of
from ..heads.stream import ProbeState, counted_columns
from .paged_states import PagedStates
from .step_scores import PromptScores


# Number of hidden states in a piece of pages: neither a long prompt nor many prompts lie in memory in fp32 at once.
_TOKENS = 4096
# Smallest length of a prompt in a batch, as a part of the longest: padding is computed for nothing.
_SHORTEST = 0.6


@dataclass
class ScoringRequest:
    """A prompt that is complete after this step, or a reply that heads are to follow from here on.

    Attributes:
        token_ids: ids of the prompt; `None` if the prompt was given as embeddings.
        num_tokens: number of tokens to read. Tokens after the prompt belong to its reply, which heads of prompts do not read.
        block_ids: blocks that hold the tokens, in order.
        heads: names of the heads that score the prompt; `None` if the prompt was scored before.
        slot: where the heads that follow the reply keep their states; `None` if no head does.
        masks: for each head that can read the request, the tokens that count, `[num_tokens]` bool. `Scorer` sets them.
    """

    request_id: str
    token_ids: list[int] | None
    num_prompt_tokens: int
    num_tokens: int
    block_ids: list[int]
    heads: list[str] | None
    slot: int | None = None
    masks: dict[str, torch.Tensor] = field(default_factory=dict)


# By request, the place of the newest token of its reply, and the slot of the reply's states. A place is the number of the token's
# block times the number of tokens in a block, plus the token's number in the block.
ReplyTokens = dict[str, tuple[int, int]]


class Scorer:
    """Run heads on pages of the cache, and never wait for the device.

    With tensor parallelism a read of the cache gathers the shares of all ranks, so each rank must run the heads. `block_size` is
    the number of tokens in a block of the scheduler, which may be several blocks of the cache.
    """

    def __init__(self, cache: PagedStates, block_size: int):
        self.cache = cache
        self.plan = cache.plan
        self.block_size = block_size
        self.kernel_block_size = cache.kernel_block_size
        self.device = cache.kv_cache.device
        self.heads = self.plan.heads
        self.states = self.plan.reply_states
        self.followers = {name: head for name, head in self.heads.items() if head.config.reads_reply}

    @torch.no_grad()
    def score(self, requests: Sequence[ScoringRequest]) -> PromptScores:
        """Return the scores of prompts, or why there are none. Begin the head states of replies."""
        scores: dict[str, dict[str, torch.Tensor | str]] = {
            request.request_id: dict.fromkeys(request.heads, "") for request in requests if request.heads is not None
        }
        for request in requests:
            wanted = request.heads or ()
            followers = () if request.slot is None else self.followers
            for name in dict.fromkeys((*wanted, *followers)):
                try:
                    request.masks[name] = self._mask(self.heads[name], request)
                except ProbeError as error:
                    if name in wanted:  # a head that only follows the reply has nothing to read before it
                        scores[request.request_id][name] = str(error)
        if slots := [request.slot for request in requests if request.slot is not None]:
            self.states.clear(async_tensor_h2d(slots, self.device))
        for batch in _batches(requests, self.kernel_block_size, _TOKENS // self.plan.depth):
            for name, rows in self._score(batch).items():
                for request, row in zip(batch, rows, strict=True):
                    if name in (request.heads or ()):
                        scores[request.request_id][name] = row
        return scores

    @torch.no_grad()
    def follow(self, tokens: ReplyTokens) -> torch.Tensor:
        """Return the logits of replies up to these tokens, `[replies, labels of all heads]`, in a fixed number of operations."""
        places, slots = async_tensor_h2d(list(zip(*tokens.values(), strict=True)), self.device)
        numbers = self.cache.read_tokens(places).unsqueeze(1)  # [replies, 1, width]
        scores = []
        for name, head in self.followers.items():
            state = head.init_state((self.states.get(name, slots), (), None, None), keep=True)
            head.step(state, head.layer_indices, self.plan.inputs(name, numbers))
            self.states.put(name, slots, state.joined())
            scores.append(head.finish(state).logits)
        return torch.cat(scores, dim=1)

    def _score(self, requests: Sequence[ScoringRequest]) -> dict[str, torch.Tensor]:
        """Return the `PromptScores` of a batch of prompts by head, `[prompts, numbers]`."""
        lengths = torch.tensor([request.num_tokens for request in requests])
        width = int(lengths.max())
        masks = {
            name: pad_sequence([request.masks[name] for request in requests], batch_first=True)
            for name in requests[0].masks
        }  # [prompts, width] each
        blocks = pad_sequence([torch.tensor(request.block_ids) for request in requests], batch_first=True)
        # Behind a shorter prompt the cache holds anything, NaN too.
        padding = async_tensor_h2d(torch.arange(width) >= lengths[:, None], self.device)
        splits = self.block_size // self.kernel_block_size
        blocks = (blocks[:, :, None] * splits + torch.arange(splits)).flatten(1)
        numbers = {name: number_segments(self.heads[name].config, mask) for name, mask in masks.items()}
        segments = {name: part for name, part in numbers.items() if part is not None}
        states = self._read(masks, segments, async_tensor_h2d(blocks, self.device), padding)
        if requests[0].slot is not None:
            slots = async_tensor_h2d([request.slot for request in requests], self.device)
            for name in states.keys() & self.followers.keys():
                self.states.put(name, slots, states[name].joined())
        scores = {}
        for name, state in states.items():
            config = self.heads[name].config
            output = fill_unread(self.heads[name].finish(state), masks[name].any(dim=1), async_tensor_h2d)
            scores[name] = output.logits
            if config.window:
                spans = output.spans
                if name not in segments:  # each prompt is one window
                    spans = async_tensor_h2d(span_of(masks[name], config.num_labels), self.device)
                scores[name] = torch.cat([output.logits, spans.flatten(1).to(output.logits.dtype)], dim=1)
        return scores

    def _read(
        self,
        masks: dict[str, torch.Tensor],
        segments: dict[str, torch.Tensor],
        blocks: torch.Tensor,
        padding: torch.Tensor,
    ) -> dict[str, ProbeState]:
        """Return the states of heads that have read prompts in blocks `[prompts, blocks]`.

        Args:
            masks: for each head, the tokens that count, `[prompts, width]` bool on the CPU.
            segments: `number_segments` of the heads that judge several segments, `[prompts, width]` on the CPU.
            padding: the tokens that belong to no prompt, `[prompts, width]` bool.
        """
        states = {name: self.heads[name].init_state(keep=name in self.followers) for name in masks}
        size, width = self.kernel_block_size, next(iter(masks.values())).shape[1]
        move = partial(async_tensor_h2d, device=self.device)
        step = max(_TOKENS // (self.plan.depth * len(blocks) * size), 1) * size
        for start in range(0, width, step):
            tokens = slice(start, min(start + step, width))
            numbers = self.cache.read(blocks[:, start // size : -(-tokens.stop // size)])  # blocks are read whole
            numbers = numbers[:, : tokens.stop - start].masked_fill(padding[:, tokens, None], 0)
            for name, state in states.items():
                head = self.heads[name]
                # The last piece may have no token that counts. Then its first token is read, and masked.
                columns, mask = counted_columns(masks[name][:, tokens], move)
                x = self.plan.inputs(name, numbers[:, columns])
                parts = None
                if name in segments:
                    window, ends = head.config.window, tokens.stop == width
                    at = slice(start + columns.start, start + columns.stop)
                    parts = find_segments(segments[name][:, : tokens.stop], window, at, start, ends, move)
                head.step(state, head.layer_indices, x, mask, tokens.stop == width, parts)
        return states

    def _mask(self, head: ProbeModel, request: ScoringRequest) -> torch.Tensor:
        prompt = torch.zeros(1, request.num_prompt_tokens, dtype=torch.bool)
        if head.config.token_scope != "response":
            ids = None if request.token_ids is None else torch.tensor([request.token_ids])
            prompt = token_mask(head.config, ids, torch.ones_like(prompt, dtype=torch.long))
        mask = F.pad(prompt, (0, request.num_tokens - request.num_prompt_tokens), value=head.config.reads_reply)
        check_rows(mask, head.config)
        return mask[0]


def _batches(requests: Sequence[ScoringRequest], size: int, most: int) -> Iterator[list[ScoringRequest]]:
    """Yield batches of at most `most` tokens in whole blocks of `size`.

    The requests of a batch have the same heads and about the same length, and heads follow the replies to all of them or to none.
    """
    together: dict[tuple[bool | str, ...], list[ScoringRequest]] = {}
    for request in requests:
        if request.masks:
            together.setdefault((request.slot is None, *request.masks), []).append(request)
    for alike in together.values():
        alike.sort(key=lambda request: request.num_tokens, reverse=True)
        batch: list[ScoringRequest] = []
        for request in alike:
            width = batch[0].num_tokens if batch else 0
            read = -(-width // size) * size * (len(batch) + 1)
            if batch and (read > most or request.num_tokens < _SHORTEST * width):
                yield batch
                batch = []
            batch.append(request)
        yield batch
