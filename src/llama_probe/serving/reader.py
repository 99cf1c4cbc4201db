"""Bring hidden states from a running LM to its heads: `StateReader` in any pass, `PromptReader` and `ReplyReader` in a call."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from typing import Any

import torch

from ..backbone.capture import capturing, check_seen
from ..backbone.decoder import Decoder
from ..errors import ProbeError
from ..heads.aggregator import State, repeat_rows
from ..heads.configuration import ProbeConfig
from ..heads.decision import ProbeOutput, fill_unread
from ..heads.probe import ProbeModel
from ..heads.scope import check_rows, token_mask, tokens_read
from ..heads.segments import Segments, find_segments, judges_turns, number_segments, span_of
from ..heads.stream import ProbeState
from .cache import CachedHead, ProbeCache
from .outputs import TokenScores, on_host


_MIB = 1 << 20
# Layers of a group, if not all go together.
_GROUPS = (16, 8, 4, 2)
# Tokens of a reply that are read at once for the next turn.
_CHUNK = 16
_OTHER_PROMPT = (
    "the decoding method does not run the LM over the prompt as it was given (PEFT's prompt tuning? set_active_probes([]) "
    "generates without heads)"
)


def state_budget(device: torch.device) -> int:
    """Return how many bytes of an LM's states, copies included, a reader may hold on a device.

    On an accelerator each operation is a kernel launch, so few large groups are fastest. On a CPU a group must fit the cache.
    """
    return 4 * _MIB if device.type == "cpu" else 128 * _MIB


class StateReader:
    """Feed the hidden states of a running LM to its heads, a group of layers at a time.

    A forward pass over n further tokens is: `begin(token_masks)`, `on_state(layer, hidden)` for each state by a hook, in the
    order of the layers, and `end()`.

    Args:
        states: token-stage states to resume, by head name; see `ProbeState.joined`. Other heads start anew.
        keep: names of the heads whose state is kept after the last token.
        output_attentions: also give token and layer weights.
        differentiable: the results have gradients, to the heads and to the LM.
    """

    def __init__(
        self,
        heads: Mapping[str, ProbeModel],
        states: Mapping[str, State] | None = None,
        keep: Collection[str] = (),
        output_attentions: bool = False,
        differentiable: bool = False,
    ):
        self.heads = dict(heads)
        self.layers = frozenset(layer for head in self.heads.values() for layer in head.layer_indices)
        self.states: dict[str, ProbeState] = {
            name: head.init_state((states or {}).get(name), name in keep, output_attentions)
            for name, head in self.heads.items()
        }
        self._whole, self._differentiable = output_attentions, differentiable
        # Copies of the states in fp32 that exist at once: the states and their stack, or the stack and its normalised copy. Windows
        # overlap, and a head type that projects nothing, and reads fp32, then has each state twice more.
        has_twice = any(head.config.window and not head.token_stage.reads_half for head in self.heads.values())
        self._copies = 4 if has_twice else 2
        self._seen: list[int] = []
        self._held: list[torch.Tensor] = []  # states of the last of these layers
        self.begin({})

    def begin(
        self,
        token_masks: Mapping[str, torch.Tensor],
        last: bool = True,
        repeats: int = 1,
        segments: Mapping[str, torch.Tensor] = {},
    ) -> None:
        """Announce a forward pass over n further tokens.

        Args:
            token_masks: for each head the tokens that count, `[batch, n]` bool. The LM may run over further columns.
                Masks of several tokens are on the CPU: columns that no head reads are left out.
            last: no token that counts follows.
            repeats: rows of the LM for each row of the masks: beams or return sequences, which begin alike.
            segments: `number_segments` of all tokens up to the end of this pass, `[batch, tokens]` on the CPU, for the heads that
                judge several.
        """
        self._seen, self._held, self._last, self._group = [], [], last, 1
        width = next(iter(token_masks.values())).shape[1] if token_masks else 0
        self._rows, self._columns = slice(None, None, repeats), slice(0, width)
        masks = self._trimmed(token_masks) if width > 1 and not self._whole else token_masks
        self._segments = self._found(segments, width)
        self._masks = {name: None if mask is None else self._moved(name, mask) for name, mask in masks.items()}

    def _moved(self, name: str, mask: torch.Tensor) -> torch.Tensor:
        return mask.to(self.heads[name].device, non_blocking=True)

    def _found(self, segments: Mapping[str, torch.Tensor], width: int) -> dict[str, Segments]:
        """Return the segments of the tokens of this pass for each head, those of heads that agree once."""
        found: dict[Any, Segments] = {}
        by_head = {}
        for name, numbers in segments.items():
            head = self.heads[name]
            start = numbers.shape[1] - width
            columns = slice(start + self._columns.start, start + self._columns.stop)
            ends = self._last and not self.states[name].keep
            key = id(numbers), head.config.window, ends, head.device
            if key not in found:
                move = partial(self._moved, name)
                found[key] = find_segments(numbers, head.config.window, columns, start, ends, move)
            by_head[name] = found[key]
        return by_head

    def _trimmed(self, token_masks: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor | None]:
        """Leave out the tokens before the first, and behind the last, that counts for any head."""
        if all(bool(mask.all()) for mask in {id(mask): mask for mask in token_masks.values()}.values()):
            return dict.fromkeys(token_masks)  # heads of one scope share a mask
        counted = torch.stack(list(token_masks.values())).any(dim=1).any(dim=0).nonzero().flatten().tolist()
        # Of a prompt in which nothing counts one column is read, so that each head has a state.
        self._columns = slice(counted[0], counted[-1] + 1) if counted else slice(0, int(self._last))
        cut = {name: mask[:, self._columns] for name, mask in token_masks.items()}
        return {name: None if bool(mask.all()) else mask for name, mask in cut.items()}

    def on_state(self, layer: int, hidden: torch.Tensor) -> None:
        """Take a state `[rows, columns, hidden_size]` of the announced pass. It must not change afterwards."""
        if layer not in self.layers:
            return
        # Keep this short: the LM's weights have just filled the processor's cache, and Python runs ten times as slowly here.
        if self._held and (hidden.device, hidden.dtype) != (self._held[0].device, self._held[0].dtype):
            self._flush()
        if not self._held:
            size = self._copies * 4 * hidden[self._rows, self._columns].numel()
            budget = state_budget(hidden.device)
            self._group = next((group for group in (len(self.layers), *_GROUPS) if group * size <= budget), 1)
        self._held.append(hidden)
        self._seen.append(layer)
        if len(self._held) >= self._group:
            self._flush()

    def end(self) -> None:
        """End the pass: read the states that are still held."""
        check_seen(self.layers, self._seen)
        self._flush()

    def _flush(self) -> None:
        """Read the states that are held. They are on one device."""
        held = self._held
        self._held = []
        if not held or self._columns == slice(0, 0):
            return
        tokens = min(hidden.shape[1] for hidden in held)
        if tokens < self._columns.stop:
            raise ProbeError(f"a state has {tokens} tokens of {self._columns.stop}: no part is scored")
        layers = self._seen[-len(held) :]
        parts = [hidden[self._rows, self._columns] for hidden in held]
        x = parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)  # [S, rows, n, hidden_size]
        del held, parts
        with torch.set_grad_enabled(self._differentiable):
            prepared: dict[Any, torch.Tensor] = {}  # heads with one input format share the result
            formats = {name: head.input_format(x) for name, head in self.heads.items()}
            for name, head in self.heads.items():
                if formats[name] not in prepared:
                    prepared[formats[name]] = head.prepare(x)
            del x
            for name, head in self.heads.items():
                read = prepared[formats[name]], self._masks[name], self._last, self._segments.get(name)
                head.step(self.states[name], layers, *read)

    def results(self) -> dict[str, ProbeOutput]:
        """Score what was read: a `ProbeOutput` of each head."""
        with torch.set_grad_enabled(self._differentiable):
            return {name: head.finish(self.states[name]) for name, head in self.heads.items()}


class PromptReader:
    """Read one batch of prompts with heads while the LM runs over it, in one or more forward passes.

    Args:
        inputs: whole prompts: `input_ids` or `inputs_embeds`, and `attention_mask`.
        probe_mask: true for the tokens that count, in place of the heads' own `token_scope`.
        past: leading prompt tokens that the KV cache holds already.
        earlier: what the heads keep of these tokens.
        return_state: keep the heads' states, for `probe_cache`.
        partial_prompt: the prompts may go on. A head that has nothing to read yet in some row gives no result, unless it reads the
            results of tools.
    """

    def __init__(
        self,
        heads: dict[str, ProbeModel],
        decoder: Decoder,
        inputs: Mapping[str, Any],
        probe_mask: torch.Tensor | None = None,
        *,
        past: int = 0,
        earlier: ProbeCache | None = None,
        return_state: bool = False,
        partial_prompt: bool = False,
        output_attentions: bool = False,
        differentiable: bool = False,
    ):
        ids, embeds, mask = (inputs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
        # The host decides by values of this one copy: which tokens count, where to cut, which rows are empty.
        host: dict[str, Any] = on_host({"input_ids": ids, "attention_mask": mask, "probe_mask": probe_mask})
        host["inputs_embeds"] = embeds
        configs = {name: head.config for name, head in heads.items()}
        self.heads, self.decoder = heads, decoder
        # The tokens of a conversation that continues may join any segment.
        grows = return_state or earlier is not None
        self.masks, self.segments = prompt_masks(
            configs, host, partial_prompt, past, decoder.placeholder_ids, grows=grows
        )
        source: Any = embeds if ids is None else ids
        self.prompts, self.length = source.shape[:2]
        self.input_ids: Any = host["input_ids"]  # on the CPU; None for embeddings
        attended = torch.ones(source.shape[:2], device="cpu") if mask is None else host["attention_mask"]
        self._attended = attended.bool()
        self._expected: Any = ids
        self.seen = past
        self.return_state, self._partial_prompt = return_state, partial_prompt
        states = {}
        if earlier is not None:
            states = earlier.resume(heads, self.masks, self.input_ids, self._attended, past)
        self._read_masks = {name: tokens_read(config, self.masks[name]) for name, config in configs.items()}
        for name, mask in self._read_masks.items():
            if name not in states and past and bool(mask[:, :past].any()):
                hint = "pass probe_state= of the call that filled it, or the whole prompt without a cache"
                raise ProbeError(f"the cache holds {past} tokens, and head {name!r} has not read them: {hint}")
        keep = [name for name, head in heads.items() if return_state or head.config.reads_reply]
        self._reader = StateReader(heads, states, keep, output_attentions, differentiable)
        self._ran: list[torch.Tensor] = []  # ids of the passes so far

    @property
    def complete(self) -> bool:
        """True if the LM has run over the whole prompt."""
        return self.seen >= self.length

    @contextmanager
    def reading(self, inputs: dict[str, Any], whole: bool = True) -> Generator[dict[str, Any]]:
        """Read the states of one forward pass of the LM, which is about to run over `inputs`. Yield its arguments.

        With `whole=False` the pass ends with the last layer that a head reads.
        """
        ids = inputs.get("input_ids")
        rows, columns = (inputs["inputs_embeds"] if ids is None else ids).shape[:2]
        # rows: beams and return sequences repeat each prompt; columns: candidate tokens follow the prompt.
        repeats, rest = divmod(rows, self.prompts)
        stop = min(self.seen + columns, self.length)
        # Embeddings in place of the ids may have virtual tokens before them (PEFT's prompt tuning).
        same = ids is not None or self._expected is None or columns == self.length - self.seen
        if rest or not repeats or not same:
            raise ProbeError(_OTHER_PROMPT)
        if ids is not None and self._expected is not None:
            self._ran.append(ids[::repeats, : stop - self.seen])
        masks, segments = self._read_masks, self.segments
        if (self.seen, stop) != (0, self.length):
            masks = {name: mask[:, self.seen : stop] for name, mask in masks.items()}
            so_far = {id(numbers): numbers[:, :stop] for numbers in segments.values()}  # heads of one scope share them
            segments = {name: so_far[id(numbers)] for name, numbers in segments.items()}
        self._reader.begin(masks, last=stop >= self.length, repeats=repeats, segments=segments)
        with capturing(self.decoder, self._reader.on_state, self._reader.layers, whole):
            yield self.decoder.whole(inputs)
        self._reader.end()
        self.seen = stop
        if self.complete and self._ran:  # one look at the device, however many passes there were
            ran = self._ran[0] if len(self._ran) == 1 else torch.cat(self._ran, dim=1)
            self._ran = []
            if not torch.equal(ran, self._expected[:, -ran.shape[1] :].to(ran.device)):
                raise ProbeError(_OTHER_PROMPT)

    @cached_property
    def results(self) -> dict[str, ProbeOutput]:
        """The `ProbeOutput` of each head. For a partial prompt a head that needs more tokens in some row is left out."""
        if not self.complete:
            raise ProbeError(f"the LM has run over {self.seen} of {self.length} tokens: no part is scored")
        results = {}
        for name, output in self._reader.results().items():
            config = self.heads[name].config
            if config.window and name not in self.segments:  # each row is one window
                output.spans = span_of(self.masks[name], config.num_labels).to(output.logits.device)
            if config.token_scope == "tool":
                results[name] = fill_unread(output, self.masks[name].any(dim=1))
            elif not self._partial_prompt or bool(self.masks[name].any(dim=1).all()):
                results[name] = output
        return results

    def state(self, name: str, repeats: int) -> State:
        """Return a head's token-stage state behind the prompts, each row repeated; `None` if it does not read them."""
        return repeat_rows(self._reader.states[name].joined(), repeats) if name in self.heads else None

    def probe_cache(self, repeats: int = 1) -> ProbeCache:
        """Return the state of the heads behind the prompts, each row repeated. Needs `return_state`, and ids."""
        heads = {
            name: CachedHead.create(head, mask.repeat_interleave(repeats, 0), self.state(name, repeats))
            for (name, head), mask in zip(self.heads.items(), self.masks.values(), strict=True)
        }
        ids, attended = (tensor.repeat_interleave(repeats, 0) for tensor in (self.input_ids, self._attended))
        return ProbeCache(ids, attended, heads)


def prompt_masks(
    configs: Mapping[str, ProbeConfig],
    inputs: Mapping[str, Any],
    partial_prompt: bool = False,
    seen: int = 0,
    placeholder_ids: Sequence[int] = (),
    first_row: int = 0,
    grows: bool = False,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return by head the prompt tokens that count, and `number_segments` where a head judges several: `[prompts, prompt_tokens]`.

    With `grows` the prompts may go on, and a row that has one segment may get several.

    `inputs` has `input_ids` or `inputs_embeds`, and may have `attention_mask` and `probe_mask`. Errors count from `first_row`.

    Heads are trained on texts. Tokens in `placeholder_ids`, which stand for images or the like, count only where
    `probe_mask` says so. What the LM sees in an image reaches heads through the text tokens after it.
    """
    tensors = {name: inputs.get(name) for name in ("input_ids", "attention_mask", "probe_mask")}
    for name, tensor in tensors.items():
        if tensor is not None and (not isinstance(tensor, torch.Tensor) or tensor.dim() != 2):
            given = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            entries = ": pass its entries, with ** before it" if isinstance(tensor, Mapping) else ""
            raise ProbeError(f"{name} must be a tensor [batch, tokens], not {given}{entries}")
    input_ids, attention_mask, probe_mask = tensors.values()
    source = inputs.get("inputs_embeds") if input_ids is None else input_ids
    if source is None or 0 in source.shape[:2]:
        raise ProbeError("there is no prompt for the heads to read: pass input_ids, or set_active_probes([]) first")
    shape = source.shape[:2]
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            hint = "with a cache, pass all input_ids of the conversation"
            raise ProbeError(f"{name} has the shape {tuple(tensor.shape)}, the prompt {tuple(shape)}: {hint}")
    attended = (
        attention_mask.bool() if attention_mask is not None else torch.ones(shape, dtype=torch.bool, device="cpu")
    )
    chosen = None if probe_mask is None else probe_mask.bool() & attended
    masks: dict[str, torch.Tensor] = {}
    segments: dict[str, torch.Tensor] = {}
    by_scope: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}  # each is checked once
    for name, config in configs.items():
        scope = repr((config.token_scope, config.prefix_ids, config.turn_markers, config.window, judges_turns(config)))
        if scope not in by_scope:
            if chosen is not None:
                mask = chosen
                numbers = number_segments(config, mask, grows, is_turn=True)
            else:
                mask = token_mask(config, input_ids, attended, partial_prompt, seen)
                numbers = number_segments(config, mask, grows)
                if placeholder_ids and input_ids is not None:
                    is_placeholder = torch.isin(input_ids, torch.tensor(placeholder_ids, device=input_ids.device))
                    mask = mask & ~is_placeholder
                    numbers = None if numbers is None else numbers.masked_fill(is_placeholder, 0)
            if not partial_prompt:
                check_rows(mask, config, first_row)
            by_scope[scope] = mask, numbers
        masks[name], numbers = by_scope[scope]
        if numbers is not None:
            segments[name] = numbers
    return masks, segments


class ReplyReader:
    """Read the tokens of replies with heads: in each pass of the LM one token a row.

    A pass of the LM reads the token that the pass before it chose, and heads score the text up to that token. No pass reads the
    last token of a reply, which has no score. End-of-sequence tokens and the tokens after them do not count.

    If `prompt` keeps a state, its heads read the replies too, for `probe_cache`. Tokens wait for that until a chunk is full. The
    last one waits in any case, because `generate()` may take it back.

    Args:
        heads: those that score replies, by name. `prompt` has read the prompts with those that read both.
        copies: replies to each prompt.
        pad_token_id: a token that does not count. Needed if a reply may end without an end-of-sequence token, because padding
            alone then shows the end. None if that cannot be: padding is then a token like any other.
    """

    def __init__(
        self,
        heads: dict[str, ProbeModel],
        prompt: PromptReader,
        copies: int,
        eos_token_ids: Sequence[int],
        pad_token_id: int | None,
    ):
        self.heads, self._decoder, self._prompt_length = heads, prompt.decoder, prompt.length
        states = {name: prompt.state(name, copies) for name in heads}
        self._reader = StateReader(heads, states, keep=heads)
        self._reading = False  # true in a pass whose states are wanted
        self._cache: Any = prompt.probe_cache(copies) if prompt.return_state else None  # a ProbeCache
        kept = {} if self._cache is None else self._cache.heads
        recorded = {
            name: head for name, head in prompt.heads.items() if name in kept and not head.config.skips_replies
        }
        self._recorder = StateReader(recorded, {name: kept[name].state for name in recorded}, keep=recorded)
        # Of each token that waits: ids and whether they count, [rows], and states by layer.
        self._waiting: list[tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]] = []
        self._ends, self._pad = torch.tensor(eos_token_ids, dtype=torch.long), pad_token_id
        self._rows = prompt.prompts * copies
        self._live = torch.ones(self._rows, dtype=torch.bool)
        self._counted: list[torch.Tensor] = []  # which tokens count so far, [rows] each
        self._logits: dict[str, list[torch.Tensor]] = {name: [] for name in heads}

    def end(self, rows: Sequence[bool]) -> None:
        """Score no further token of these rows, or of replies to these prompts."""
        ended = torch.tensor(rows).repeat_interleave(self._rows // len(rows))
        self._live = self._live & ~ended.to(self._live.device)

    def capturing(self) -> AbstractContextManager[None]:
        """Take the states of all passes over replies inside a block. New hooks for each pass would cost more than the reading."""

        def on_state(layer: int, hidden: torch.Tensor) -> None:
            if self._reading:
                # A view of the last token would keep the states of all.
                last = hidden if hidden.shape[1] == 1 else hidden[:, -1:].clone()
                self._reader.on_state(layer, last)
                if layer in self._recorder.layers:
                    self._waiting[-1][2][layer] = last

        return capturing(self._decoder, on_state, self._reader.layers | self._recorder.layers)

    @contextmanager
    def reading(self, inputs: dict[str, Any]) -> Generator[None]:
        """Read the states of one forward pass of the LM, which is about to run over `inputs`."""
        ids = inputs.get("input_ids")
        whole = self._prompt_length + len(self._counted) + 1  # without a cache
        if ids is None or len(ids) != self._rows or ids.shape[1] not in (1, whole):
            raise ProbeError("the decoding method does not run the LM over one more token of each reply")
        token_mask = self._count(ids[:, -1])
        self._reader.begin(dict.fromkeys(self.heads, token_mask[:, None]))
        self._reading = True
        try:
            yield
        finally:
            self._reading = False
        self._reader.end()
        self._counted.append(token_mask)

    def scores(self) -> TokenScores:
        """Score the replies up to the token that was read last."""
        outputs, counted = self._reader.results(), self._counted[-1]
        for name, output in outputs.items():
            unread = ~counted.to(output.logits.device)[:, None]
            output.logits = output.logits.masked_fill(unread, float("nan"))
            self._logits[name].append(output.logits)
        return TokenScores(len(self._counted) - 1, outputs, counted)

    def _count(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return which of these tokens, one a row, belong to a reply, `[rows]`, and let them wait for `probe_cache`."""
        live, self._ends = self._live.to(tokens.device), self._ends.to(tokens.device)
        ends = torch.isin(tokens, self._ends)
        self._live = live & ~ends
        # A single reply has no padding: all passes end with it.
        counted = self._live if self._pad is None or len(tokens) == 1 else self._live & (tokens != self._pad)
        if len(self._waiting) > _CHUNK:
            self._record(_CHUNK)
        if self._cache is not None:  # a later prompt has the end-of-sequence token of the reply too
            self._waiting.append((tokens, counted | (live & ends), {}))
        return counted

    def logits(self, new_tokens: int) -> dict[str, torch.Tensor]:
        """Return for each head the logits after each token: `[rows, new_tokens - 1, num_labels]`, NaN where a token does not count."""
        if not self._counted:
            shapes = {name: (self._rows, 0, head.config.num_labels) for name, head in self.heads.items()}
            return {name: torch.zeros(shape, device=self.heads[name].device) for name, shape in shapes.items()}
        return {name: torch.stack(logits, dim=1)[:, : new_tokens - 1] for name, logits in self._logits.items()}

    def _record(self, count: int) -> None:
        """Let the heads of the prompt read the first `count` of the waiting tokens."""
        tokens, masks, states = zip(*self._waiting[:count], strict=True)
        self._waiting = self._waiting[count:]
        host = on_host({"tokens": torch.stack(tokens, dim=1), "token_mask": torch.stack(masks, dim=1)})  # [rows, n]
        self._recorder.begin(
            dict.fromkeys(self._recorder.heads, host["token_mask"]),
            last=False,
            segments=self._numbers(host["token_mask"]),
        )
        for layer in sorted(self._recorder.layers):
            self._recorder.on_state(layer, torch.cat([state[layer] for state in states], dim=1))  # [rows, n, D]
        self._recorder.end()
        kept = {name: state.joined() for name, state in self._recorder.states.items()}
        self._cache = self._cache.extended(**host, states=kept)

    def _numbers(self, token_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `number_segments` of the prompts and replies up to these tokens, for the heads that judge several."""
        numbers = {}
        for name, head in self._recorder.heads.items():
            mask = torch.cat([self._cache.heads[name].mask, token_mask], dim=1)
            numbers[name] = number_segments(head.config, mask, always=True)
        return {name: each for name, each in numbers.items() if each is not None}

    def probe_cache(self, length: int) -> ProbeCache:
        """Return the state of the heads over prompts and replies, for a KV cache of `length` tokens. Needs a state of `prompt`."""
        if (count := min(length - self._cache.get_seq_length(), len(self._waiting))) > 0:
            self._record(count)
        return self._cache
