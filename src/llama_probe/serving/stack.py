"""Heads of one shape that read the same tokens, side by side, while a language model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..errors import ProbeError
from ..heads import Aggregator, join_slots, normalize, take_slots, without_autocast
from ..heads.decision import ProbeOutput
from ..heads.scope import check_rows, tokens_read
from .cache import ProbeState, WaitingLayers


if TYPE_CHECKING:
    from ..heads.configuration import ProbeConfig
    from ..heads.probe import ProbeModel


# Of more tokens than these it matters which way round their states are multiplied, and in which dtype.
_FEW = 128
# What layers may keep of their tokens while they wait for each other, as a part of all states of these tokens: of many tokens,
# and of few, where it is the number of calls that costs.
_WAITING_SHARE, _FEW_WAITING_SHARE = 0.0125, 0.04
_HALF = (torch.bfloat16, torch.float16)


def is_few(tokens: int) -> bool:
    """Whether heads that read so many tokens at once, of all prompts, are slowed down by the number of their calls."""
    return tokens <= _FEW


def reading_dtype(stage: Aggregator, config: ProbeConfig, hidden: torch.Tensor) -> torch.dtype:
    """In which states `[..., B, n, D]` are normalised and mapped: fp32, or that of the LM where the maps cost most.

    In half precision a processor multiplies several times as fast, and what that rounds off is less than what the LM has
    rounded already. Of few tokens the maps themselves, which would have to be rounded each time, are the larger part.
    """
    half = hidden.dtype in _HALF and stage.rank is not None and hidden.shape[-3] * hidden.shape[-2] > _FEW
    return hidden.dtype if half and config.normalize != "none" else torch.float32


def layers_at_once(heads: Sequence[ProbeModel], itemsize: int, kept: int, share: float = _WAITING_SHARE) -> int:
    """How many layers may wait for each other, of heads of one low rank.

    Args:
        itemsize, kept: bytes of a number as the LM gave it, and of one that waits.
        share: of all states, that may be kept.
    """
    stage, config = heads[0].token_stage, heads[0].config
    numbers = share * len(heads[0].layer_indices) * config.hidden_size * itemsize / kept
    return max(1, int(numbers / (len(heads) * stage.rank)))


class HeadStack:
    """Some heads of one shape; see `llama_probe.serving.head_group.shape_of`.

    They share what does not depend on a head, and where their kind is of low rank, layers wait for each other until they have
    kept `_WAITING_SHARE` of the states, and go through the rest at once. Nothing is kept of the heads' weights, so that these
    may be replaced between two prompts.
    """

    def __init__(self, heads: Sequence[ProbeModel]):
        self.heads = list(heads)
        self.stages = [head.token_stage for head in self.heads]
        first = self.heads[0]
        self.layer_indices, self.config, self.device = first.layer_indices, first.config, first.device
        if self.device.type == "meta":
            raise ProbeError(
                "the weights of a head are elsewhere: the LM was offloaded (accelerate) after the head had been attached. Offload "
                "it first, and attach heads then, which stay where the last state appears"
            )
        self._slots = {layer: slot for slot, layer in enumerate(self.layer_indices)}
        self._rank = self.stages[0].rank

    def init_state(
        self,
        mask: torch.Tensor,
        past: int = 0,
        output_attentions: bool = False,
        running: Any = None,
        keep: bool = False,
    ) -> ProbeState:
        """See `ProbeModel.init_state`; `running` is that of the only head."""
        mask = mask.bool()
        if not keep:
            check_rows(mask)
        mask = tokens_read(self.config, mask)
        columns = mask.any(dim=0).nonzero().flatten().tolist() or [mask.shape[1]]
        start, stop = columns[0], columns[-1] + 1
        if running is None and past > start:
            raise ProbeError(
                f"the cache already holds {past} tokens of the prompt, and this {self.config.probe_type} head must read "
                f"the tokens from {start} on; it has no state of them. Pass probe_state= beside the cache, as the call that "
                "filled it returned it (generate(..., probe_state=True), model(..., use_cache=True)), or the whole prompt "
                "without a cache"
            )
        if running is not None and output_attentions:
            raise ProbeError(
                "output_attentions needs the states of all tokens, and those of the cached ones are gone: pass the whole "
                "prompt without cache and probe_state"
            )
        slots = len(self.layer_indices)
        mask = mask.to(self.device)
        state = ProbeState(
            mask=mask,
            start=start,
            stop=stop,
            full=bool(mask[:, max(start, past) : stop].all()),
            keep=keep or self.config.reads_reply,
            output_attentions=output_attentions,
            seen=[past] * slots,
        )
        if self._rank is None:
            state.summaries = self._empty(slots, len(self.heads), len(mask), self.config.hidden_size)
        if running is not None:
            state.partial = {slot: take_slots(running, slice(slot, slot + 1)) for slot in range(slots)}
            if stop <= past:  # nothing new counts
                stage = self.stages[0]
                if self._rank is None:
                    state.summaries[:, 0] = stage.result(running, slice(None))
                else:
                    state.summaries = stage.pooled(running).unsqueeze(1)
        return state

    @without_autocast
    def step(
        self,
        state: ProbeState,
        layer: int,
        hidden: torch.Tensor,
        shared: dict[tuple[int, int, torch.dtype], torch.Tensor] | None = None,
    ) -> None:
        """See `ProbeModel.step`; to be called without gradients, and to be followed by `settle`.

        Args:
            shared: what stacks that normalise alike have made of these states so far, by the part of `hidden` that they read
                and the dtype.
        """
        slot = self._slots.get(layer)
        if slot is None:
            return
        begin = state.seen[slot]
        end = begin + hidden.shape[1]
        if end > state.mask.shape[1]:
            raise ProbeError(f"layer {layer} got {end} tokens of a prompt of {state.mask.shape[1]}")
        state.seen[slot] = end
        low, high = max(begin, state.start), min(end, state.stop)
        if low >= high:
            return
        part = hidden if high - low == end - begin else hidden[:, low - begin : high - begin]
        dtype = torch.float32 if state.output_attentions else reading_dtype(self.stages[0], self.config, part)
        x = None if shared is None else shared.get((low, high, dtype))
        if x is None:
            if part.dtype != dtype or part.device != self.device:
                part = part.to(device=self.device, dtype=dtype)
            x = normalize(part, self.config.normalize)  # [B, n, D]
            if shared is not None:
                shared[low, high, dtype] = x
        if state.output_attentions:
            self._keep_weights(state, slot, x, (low, high))
        if self._rank is not None:
            self._wait(state, slot, x, (low, high), hidden.itemsize)
            return
        mask = None if state.full else state.mask[:, low:high]
        kind, done = type(self.stages[0]), high == state.stop
        if done and low == state.start and not state.keep:
            kind.whole_reader(self.stages, mask, slot, state.summaries[slot])(x)
            return
        seen = state.partial[slot] = kind.read(self.stages, state.partial.get(slot), x.unsqueeze(0), mask, slot)
        if done:
            # The layer has seen all that counts: its summary replaces what was kept of the tokens, unless more may follow.
            kind.summarize(self.stages, seen, slot, state.summaries[slot])
            if not state.keep:
                del state.partial[slot]

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _keep_weights(self, state: ProbeState, slot: int, x: torch.Tensor, columns: tuple[int, int]) -> None:
        if columns != (state.start, state.stop):
            raise ProbeError("token weights need the prompt in one chunk; leave out prefill_chunk_size")
        mask = None if state.full else state.mask[:, slice(*columns)]
        slots = slice(slot, slot + 1)
        weights = torch.cat([stage.weights(x.unsqueeze(0), mask, slots) for stage in self.stages])  # [H, B, n]
        state.token_weights[slot] = F.pad(weights, (columns[0], state.mask.shape[1] - columns[1]))

    def _wait(self, state: ProbeState, slot: int, x: torch.Tensor, columns: tuple[int, int], itemsize: int) -> None:
        """Keeps the projections of a layer's states `[B, n, D]` until there are enough layers to go on with at once.

        Args:
            itemsize: bytes of a number as the LM gave it.
        """
        waiting = state.waiting
        if waiting is not None and (waiting.columns, waiting.stop, waiting.places.dtype) != (columns, slot, x.dtype):
            self._advance(state)
            waiting = None
        x = x.flatten(0, 1)
        if waiting is None:
            waiting = state.waiting = self._room(slot, columns, len(state.mask), itemsize, x.dtype)
        for stage, place in zip(self.stages, waiting.places[slot - waiting.start].unbind(0), strict=True):
            # A product of matrices is faster if its rows are the longer side.
            if is_few(len(x)):  # and then x is in fp32
                stage.mapper(slot)(x, out=place)
            else:
                torch.mm(stage.map_of(slot).to(x.dtype), x.t(), out=place)
        waiting.stop = slot + 1

    def _room(
        self, slot: int, columns: tuple[int, int], batch: int, itemsize: int, dtype: torch.dtype
    ) -> WaitingLayers:
        """For the projections, in `dtype`, of some layers from `slot` on."""
        items, heads, rank = columns[1] - columns[0], len(self.stages), self._rank
        few = is_few(batch * items)
        # What few tokens become when layers go on is in fp32, which is twice as much beside an LM in half precision.
        share = _FEW_WAITING_SHARE * itemsize / 4 if few else _WAITING_SHARE
        count = layers_at_once(self.heads, itemsize, dtype.itemsize, share)
        count = min(count, len(self.layer_indices) - slot)
        if few:
            places = self._empty(count, heads, batch * items, rank)
            projected = places.unflatten(2, (batch, items))
        else:
            places = self._empty(count, heads, rank, batch * items, dtype=dtype)
            projected = places.unflatten(3, (batch, items)).permute(0, 1, 3, 4, 2)
        return WaitingLayers(columns, slot, slot, projected.flatten(0, 1), places)

    def readers(self, state: ProbeState, itemsize: int) -> dict[int, Callable[[torch.Tensor], None]]:
        """By layer, what takes in its states of whole prompts, `[B, T, D]`, in fp32 and normalised; see `ShortPass`.

        Args:
            itemsize: bytes of a number as the LM gives it.
        """
        if self._rank is None:
            made = [self._summarizer(state, slot) for slot in self._slots.values()]
        else:
            made = self._mappers(state, itemsize)
        if state.stop - state.start < state.mask.shape[1]:
            made = [partial(_read_columns, read, slice(state.start, state.stop)) for read in made]
        return dict(zip(self.layer_indices, made, strict=True))

    def _summarizer(self, state: ProbeState, slot: int) -> Callable[[torch.Tensor], None]:
        mask = None if state.full else state.mask[:, state.start : state.stop]
        summarize = type(self.stages[0]).whole_reader(self.stages, mask, slot, state.summaries[slot])

        def read(x: torch.Tensor) -> None:
            summarize(x)
            state.seen[slot] = state.mask.shape[1]

        return read

    def _mappers(self, state: ProbeState, itemsize: int) -> list[Callable[[torch.Tensor], None]]:
        waiting = self._room(0, (state.start, state.stop), len(state.mask), itemsize, torch.float32)
        places = [place.unbind(0) for place in waiting.places.unbind(0)]
        last = len(self.layer_indices) - 1

        def mapper(slot: int) -> Callable[[torch.Tensor], None]:
            place = slot % len(places)
            maps = list(zip((stage.mapper(slot) for stage in self.stages), places[place], strict=True))
            ends = slot == last or place == len(places) - 1

            def read(x: torch.Tensor) -> None:
                x = x.flatten(0, 1)
                for each, out in maps:
                    each(x, out=out)
                if ends:
                    waiting.start, waiting.stop = slot - place, slot + 1
                    state.seen[waiting.start : waiting.stop] = [state.mask.shape[1]] * (place + 1)
                    state.waiting = waiting
                    self._advance(state)

            return read

        return [mapper(slot) for slot in range(last + 1)]

    def settle(self, state: ProbeState) -> None:
        """To be called after each `step`, when the states that it has read are needed no more."""
        waiting = state.waiting
        if waiting is not None and waiting.stop == waiting.end:
            self._advance(state)

    @without_autocast
    def _advance(self, state: ProbeState) -> None:
        """Goes on with the layers that wait."""
        waiting, state.waiting = state.waiting, None
        if waiting is None:
            return
        low, high = waiting.columns
        stage, count = self.stages[0], len(self.stages)
        slots = range(waiting.start, waiting.stop)
        projected = waiting.projected
        if len(slots) * count < len(projected):
            projected = projected[: len(slots) * count]
        projected = projected.float()  # what follows is of small size, and in fp32
        earlier = [state.partial.get(slot) for slot in slots]
        mask = None if state.full else state.mask[:, low:high]
        seen = stage.absorb(None if earlier[0] is None else join_slots(earlier), projected, mask)
        done = high == state.stop
        if done:
            pooled = stage.pooled(seen).unflatten(0, (len(slots), count))  # [layers, H, B, ...]
            if state.summaries is None:
                state.summaries = self._empty(len(self.layer_indices), *pooled.shape[1:])
            state.summaries[waiting.start : waiting.stop] = pooled
            if not state.keep and not state.partial:
                return
        for place, slot in enumerate(slots):
            if done and not state.keep:
                state.partial.pop(slot, None)
            else:
                state.partial[slot] = take_slots(seen, slice(place * count, (place + 1) * count))

    def check_whole(self, state: ProbeState) -> None:
        """Raises `ProbeError` where a layer has not seen all tokens of the prompt up to the last that counts."""
        tokens = state.mask.shape[1]
        missing = [slot for slot, seen in enumerate(state.seen) if seen < min(state.stop, tokens)]
        if missing:
            raise ProbeError(
                f"layer {self.layer_indices[missing[0]]} has seen {state.seen[missing[0]]} of {tokens} prompt "
                f"tokens ({len(missing)} layers are incomplete); a part of a prompt is not scored"
            )

    @without_autocast
    def finish(self, state: ProbeState) -> list[ProbeOutput]:
        """The scores of each head; see `ProbeModel.finish`."""
        if state.keep:
            check_rows(state.mask)
        self.check_whole(state)
        with torch.no_grad():
            self._advance(state)
        outputs = []
        for head, summaries in zip(self.heads, state.summaries.unbind(1), strict=True):
            if self._rank is not None:
                summaries = head.token_stage.expand(summaries, slice(None))  # [S, B, D]
            outputs.append(head.score_summaries(summaries, output_attentions=state.output_attentions))
        if state.output_attentions:
            weights = torch.stack([state.token_weights[slot] for slot in range(len(self.layer_indices))], dim=2)
            for output, each in zip(outputs, weights, strict=True):
                output.token_weights = each  # [B, S, T]
        return outputs

    def running(self, state: ProbeState, number: int) -> Any:
        """The token-stage state of all layers of one head, once they have seen the prompt; `None` where nothing counts so far."""
        with torch.no_grad():
            self._advance(state)
        if not state.partial:
            return None
        slots = (state.partial[slot] for slot in range(len(self.layer_indices)))
        return join_slots([take_slots(slot, slice(number, number + 1)) for slot in slots])


def _read_columns(read: Callable[[torch.Tensor], None], columns: slice, x: torch.Tensor) -> None:
    read(x[:, columns])
