"""The way of hidden states from the LM to heads: `StateReader` in any pass, `PromptReader` in the passes over prompts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..backbone.capture import capturing, check_seen
from ..backbone.decoder import Decoder
from ..errors import ProbeError
from ..heads import repeat_rows
from ..heads.configuration import ProbeConfig
from ..heads.decision import ProbeOutput, fill_unread
from ..heads.device import device_type
from ..heads.probe import ProbeModel
from ..heads.scope import check_rows, token_mask, tokens_read
from ..heads.stream import ProbeState
from .cache import CachedHead, HeadReference, ProbeCache
from .outputs import on_host


_MIB = 1 << 20
# Layers of a group, if not all go together.
_GROUPS = (16, 8, 4, 2)
_OTHER_PROMPT = (
    "the decoding method does not run the LM over the prompt as it was given (PEFT's prompt tuning? set_active_probes([]) "
    "generates without heads)"
)


def state_budget(device: torch.device) -> int:
    """Return the bytes that a reader may hold of an LM's states on a device, copies included.

    On an accelerator each operation is a kernel launch: few large groups are fastest. On a CPU a group must fit the cache.
    """
    return 4 * _MIB if device_type(device) == "cpu" else 128 * _MIB


class StateReader:
    """Feed the hidden states of a running LM to its heads, a group of layers at a time.

    A forward pass over n further tokens is: `begin(token_masks)`, `on_state(layer, hidden)` for each state by a hook, in the
    order of the layers, and `end()`.

    Args:
        heads: the heads, by name.
        states: token-stage states to resume, by head name; see `ProbeState.joined`. Other heads start anew.
        keep: names of the heads whose state is kept after the last token.
        output_attentions: also give token and layer weights.
        differentiable: the results have gradients, to the heads and to the LM.

    Attributes:
        layers: indices of the states that are read.
    """

    def __init__(
        self,
        heads: Mapping[str, ProbeModel],
        states: Mapping[str, Any] | None = None,
        keep: Collection[str] = (),
        output_attentions: bool = False,
        differentiable: bool = False,
    ):
        self.heads = dict(heads)
        self.layers = frozenset(layer for head in self.heads.values() for layer in head.layer_indices)
        for name, head in self.heads.items():
            if head.device.type == "meta":
                raise ProbeError(f"head {name!r} has no weights: offload the LM (accelerate) before heads come")
        self.states: dict[str, ProbeState] = {
            name: head.init_state((states or {}).get(name), name in keep, output_attentions, differentiable)
            for name, head in self.heads.items()
        }
        self._whole, self._differentiable = output_attentions, differentiable
        self._masks: dict[str, torch.Tensor | None] = {}
        self._rows, self._columns = slice(None), slice(None)
        self._last = True
        self._seen: set[int] = set()
        self._held: list[tuple[int, torch.Tensor]] = []
        self._group = 1

    def begin(self, token_masks: Mapping[str, torch.Tensor], last: bool = True, repeats: int = 1) -> None:
        """Announce a forward pass over n further tokens.

        Args:
            token_masks: for each head the tokens that count, `[batch, n]` bool. The LM may run over further columns. Masks on the
                CPU are looked at: columns that no head reads are left out.
            last: no token that counts follows.
            repeats: rows of the LM for each row of the masks: beams or return sequences, which begin alike.
        """
        self._seen, self._held, self._last = set(), [], last
        width = next(iter(token_masks.values())).shape[1] if token_masks else 0
        self._rows, self._columns = slice(None, None, repeats), slice(0, width)
        masks = self._trimmed(token_masks) if width > 1 and not self._whole else token_masks
        self._masks = {
            name: None if mask is None else mask.to(self.heads[name].device, non_blocking=True)
            for name, mask in masks.items()
        }

    def _trimmed(self, token_masks: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor | None]:
        """Leave out the tokens before the first, and behind the last, that counts for any head."""
        distinct = {id(mask): mask for mask in token_masks.values()}  # heads of one scope share a tensor
        if all(bool(mask.all()) for mask in distinct.values()):
            return dict.fromkeys(token_masks)
        counted = [column for mask in distinct.values() for column in mask.any(dim=0).nonzero().flatten().tolist()]
        self._columns = slice(min(counted), max(counted) + 1) if counted else slice(0, 0)
        cut = {key: mask[:, self._columns] for key, mask in distinct.items()}
        whole = {key: bool(mask.all()) for key, mask in cut.items()}
        return {name: None if whole[id(mask)] else cut[id(mask)] for name, mask in token_masks.items()}

    def on_state(self, layer: int, hidden: torch.Tensor) -> None:
        """Take a state `[rows, columns, hidden_size]` of the announced pass. It must not change afterwards."""
        if layer not in self.layers:
            return
        # The LM's weights have just gone through the cache: here each further operation of Python takes 10 times as long.
        if not self._held:
            # At most two of these are there at once, in fp32: the states and their stack, or the stack and its normalised copy.
            size, budget = 2 * 4 * hidden[self._rows, self._columns].numel(), state_budget(hidden.device)
            self._group = next((group for group in (len(self.layers), *_GROUPS) if group * size <= budget), 1)
        self._held.append((layer, hidden))
        if len(self._held) >= self._group:
            self._flush()

    def end(self) -> None:
        """Read what is held at the end of a pass."""
        check_seen(self.layers, self._seen.union(layer for layer, _ in self._held))
        self._flush()

    def _flush(self) -> None:
        while self._held:
            layers, x = self._stack()
            if not x.shape[2]:
                continue
            with torch.set_grad_enabled(self._differentiable):
                prepared: dict[Any, torch.Tensor] = {}  # heads that normalise alike share the result
                inputs = {}
                for name, head in self.heads.items():
                    key = head.input_format(x)
                    if key not in prepared:
                        prepared[key] = head.prepare(x)
                    inputs[name] = prepared[key]
                del x
                for name, head in self.heads.items():
                    head.step(self.states[name], layers, inputs[name], self._masks[name], self._last)

    def _stack(self) -> tuple[tuple[int, ...], torch.Tensor]:
        """Return the first layers that are held on one device, and their states `[S, rows, n, hidden_size]`. Hold the others."""
        kinds = [(hidden.device, hidden.dtype) for _, hidden in self._held]
        count = next((place for place, kind in enumerate(kinds) if kind != kinds[0]), len(kinds))
        group, self._held = self._held[:count], self._held[count:]
        if short := [hidden.shape[1] for _, hidden in group if hidden.shape[1] < self._columns.stop]:
            raise ProbeError(f"a state has {short[0]} tokens of {self._columns.stop}: no part is scored")
        layers, states = zip(*((layer, hidden[self._rows, self._columns]) for layer, hidden in group), strict=True)
        self._seen.update(layers)
        return layers, states[0].unsqueeze(0) if len(states) == 1 else torch.stack(states)

    def results(self, names: Collection[str] | None = None) -> dict[str, ProbeOutput]:
        """Score what was read: a `ProbeOutput` of each head, or of those in `names`."""
        names = self.heads if names is None else names
        return {name: head.finish(self.states[name]) for name, head in self.heads.items() if name in names}


class PromptReader:
    """Read one batch of prompts with heads while the LM runs over it, in one or more forward passes.

    Args:
        heads: the heads that read along, by name.
        decoder: the LM's decoder.
        inputs: whole prompts: `input_ids` or `inputs_embeds`, and `attention_mask`.
        probe_mask: true for the tokens that count, in place of the heads' own `token_scope`.
        past: leading prompt tokens that the KV cache holds already.
        earlier: what the heads keep of these tokens.
        return_state: keep the heads' states, for `probe_cache`.
        partial_prompt: the prompts may go on. Heads that have nothing to read yet, in some row, give no result.
        output_attentions: also give token and layer weights.
        differentiable: the results have gradients, to the heads and to the LM.

    Raises:
        ProbeError: a prompt cannot be scored.
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
        ids: Any = inputs.get("input_ids")
        embeds: Any = inputs.get("inputs_embeds")
        attention_mask: Any = inputs.get("attention_mask")
        # All that values decide - which tokens count, where to cut, empty rows - comes from this one copy.
        host = on_host({"ids": ids, "mask": attention_mask, "probe_mask": probe_mask})
        configs = {name: head.config for name, head in heads.items()}
        prompt = (host["ids"], embeds, host["mask"], host["probe_mask"], partial_prompt)
        self.heads, self.decoder = heads, decoder
        self.masks = prompt_masks(configs, *prompt, decoder.placeholder_ids, past)
        self.prompts, self.length = (embeds if ids is None else ids).shape[:2]
        self.input_ids: torch.Tensor | None = host["ids"]
        self.attention_mask: torch.Tensor | None = host["mask"]
        self._expected: Any = ids
        self.seen = past
        self.return_state, self._partial_prompt = return_state, partial_prompt
        states = {}
        if earlier is not None:
            states = earlier.resume(heads, self.masks, self.ids, self._attended(), past)
        if not partial_prompt:
            for mask, config in {id(mask): (mask, configs[name]) for name, mask in self.masks.items()}.values():
                check_rows(mask, config)
        self._read_masks = read_masks(configs, self.masks)
        for name, mask in self._read_masks.items():
            if name not in states and past and bool(mask[:, :past].any()):
                hint = "pass probe_state= of the call that filled it, or the whole prompt without a cache"
                raise ProbeError(f"the cache holds {past} tokens, and head {name!r} has not read them: {hint}")
        keep = [name for name, head in heads.items() if return_state or head.config.reads_reply]
        self._reader = StateReader(heads, states, keep, output_attentions, differentiable)
        self._results: dict[str, ProbeOutput] | None = None
        self._ran: list[torch.Tensor] = []  # ids of the passes so far

    @property
    def ids(self) -> torch.Tensor:
        """Token ids of the prompts on the CPU, `[prompts, tokens]`. Only where they were not given as embeddings."""
        if self.input_ids is None:
            raise ProbeError("the prompts are embeddings, and this needs their input_ids")
        return self.input_ids

    @property
    def complete(self) -> bool:
        """True if the LM has run over the whole prompt."""
        return self.seen >= self.length

    @contextmanager
    def reading(self, inputs: dict[str, Any], whole: bool = True):
        """Read the states of one forward pass of the LM, which is about to run over `inputs`. Yield its arguments.

        With `whole=False` the pass ends with the last layer that a head reads.

        Raises:
            ProbeError: the pass is not over the next tokens of the prompts, or some layer did not run over all of them.
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
        cut = {id(mask): mask[:, self.seen : stop] for mask in self._read_masks.values()}
        masks = {name: cut[id(mask)] for name, mask in self._read_masks.items()}
        self._reader.begin(masks, last=stop >= self.length, repeats=repeats)
        with capturing(self.decoder, self._reader.on_state, self._reader.layers, whole):
            yield self.decoder.whole(inputs)
        self._reader.end()
        self.seen = stop
        if self.complete and self._ran:  # looked at once, however many passes there were
            ran, self._ran = self._ran[0] if len(self._ran) == 1 else torch.cat(self._ran, dim=1), []
            if not torch.equal(ran, self._expected[:, -ran.shape[1] :].to(ran.device)):
                raise ProbeError(_OTHER_PROMPT)

    def results(self) -> dict[str, ProbeOutput]:
        """Return the `ProbeOutput` of each head; of a partial prompt, of those that have read something in each row."""
        if self._results is None:
            if not self.complete:
                raise ProbeError(f"the LM has run over {self.seen} of {self.length} tokens: no part is scored")
            names = list(self.heads)
            if self._partial_prompt:
                names = [name for name, mask in self.masks.items() if bool(mask.any(dim=1).all())]
            of_tools = [name for name in names if self.heads[name].config.token_scope == "tool"]
            read = {name: self.masks[name].any(dim=1) for name in of_tools}  # [prompts] each
            unread = [name for name, rows in read.items() if not bool(rows.any())]
            results = self._reader.results([name for name in names if name not in unread])
            results |= {name: _nothing(self.heads[name], self.prompts) for name in unread}
            for name, rows in read.items():
                fill_unread(results[name], rows)
            self._results = {name: results[name] for name in names}
        return self._results

    def state(self, name: str, repeats: int = 1) -> Any:
        """Return a head's token-stage state behind the prompts, each row repeated; `None` if it does not read them."""
        return repeat_rows(self._reader.states[name].joined(), repeats) if name in self.heads else None

    def probe_cache(
        self,
        states: dict[str, Any] | None = None,
        tokens: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
    ) -> ProbeCache:
        """Return what the heads keep of the prompts, and of replies to them. Needs `return_state`, and ids.

        Args:
            states: token-stage states behind the replies, by name. Defaults to no reply.
            tokens, token_mask (`[rows, reply_tokens]`): ids of the replies, and which of them count, on the CPU.
        """
        if states is None or tokens is None or token_mask is None:
            states = {name: self.state(name) for name in self.heads}
            tokens = self.ids[:, :0]
            token_mask = tokens.bool()

        def behind(prompts: torch.Tensor, replies: torch.Tensor) -> torch.Tensor:
            rows = prompts.repeat_interleave(len(replies) // self.prompts, 0)
            return torch.cat([rows, replies], 1)

        heads = {}
        for name, head in self.heads.items():
            replies = torch.zeros_like(token_mask) if head.config.skips_replies else token_mask
            heads[name] = CachedHead(HeadReference(head), behind(self.masks[name], replies), states[name])
        return ProbeCache(behind(self.ids, tokens), behind(self._attended(), token_mask), heads)

    def _attended(self) -> torch.Tensor:
        if self.attention_mask is None:
            return torch.ones_like(self.ids, dtype=torch.bool)
        return self.attention_mask.bool()


def _nothing(head: ProbeModel, prompts: int) -> ProbeOutput:
    """Return the output of a head for prompts of which it reads no token."""
    x = torch.zeros(len(head.layer_indices), prompts, 1, head.hidden_size, device=head.device)
    with torch.no_grad():
        return head.score(x, x[0, :, :, 0].bool())


def prompt_masks(
    configs: Mapping[str, ProbeConfig],
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    probe_mask: torch.Tensor | None,
    partial_prompt: bool = False,
    placeholder_ids: Sequence[int] = (),
    seen: int = 0,
) -> dict[str, torch.Tensor]:
    """Return for each head, by name, the prompt tokens that count: `[prompts, prompt_tokens]`. Heads of one scope share a tensor.

    Heads are trained on texts. Tokens in `placeholder_ids`, which stand for images or the like, count only where
    `probe_mask` says so. What the LM sees in an image reaches heads through the text tokens after it.

    Args:
        partial_prompt, seen: see `token_mask`.

    Raises:
        ProbeError: there is no prompt, or mask and prompt have different shapes.
    """
    tensors = {"input_ids": input_ids, "attention_mask": attention_mask, "probe_mask": probe_mask}
    for name, tensor in tensors.items():
        if tensor is not None and (not isinstance(tensor, torch.Tensor) or tensor.dim() != 2):
            kind = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            entries = ": pass its entries, with ** before it" if isinstance(tensor, Mapping) else ""
            raise ProbeError(f"{name} must be a tensor [batch, tokens], not {kind}{entries}")
    source = input_ids if input_ids is not None else inputs_embeds
    if source is None or 0 in source.shape[:2]:
        raise ProbeError("there is no prompt for the heads to read: pass input_ids, or set_active_probes([]) first")
    shape = source.shape[:2]
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            hint = "with a cache, pass all input_ids of the conversation"
            raise ProbeError(f"{name} has the shape {tuple(tensor.shape)}, the prompt {tuple(shape)}: {hint}")
    if attention_mask is None:
        attention_mask = torch.ones(shape, dtype=torch.bool, device=source.device)
    if probe_mask is not None:
        chosen = probe_mask.to(attention_mask.device).bool() & attention_mask.bool()
        return dict.fromkeys(configs, chosen)
    text = None
    if placeholder_ids and input_ids is not None:
        text = ~torch.isin(input_ids, torch.tensor(placeholder_ids, device=input_ids.device))
    masks_by_scope: list[tuple[Any, torch.Tensor]] = []
    masks: dict[str, torch.Tensor] = {}
    for name, config in configs.items():
        scope = config.token_scope, config.prefix_ids, config.turn_markers
        mask = next((mask for other, mask in masks_by_scope if other == scope), None)
        if mask is None:
            mask = token_mask(config, input_ids, attention_mask, partial_prompt, seen)
            mask = mask if text is None else mask & text.to(mask.device)
            masks_by_scope.append((scope, mask))
        masks[name] = mask
    return masks


def read_masks(configs: Mapping[str, ProbeConfig], masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Apply `tokens_read` to the mask of each head. Heads that share a tensor, and read all tokens, share the result."""
    return {name: tokens_read(config, masks[name]) for name, config in configs.items()}
