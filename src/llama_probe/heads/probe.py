"""`ProbeModel`: a head, with a token stage for each layer, a layer stage, and a linear map to the labels."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import CommitInfo
from torch import nn

from ..backbone.capture import collect_hidden_states
from ..backbone.decoder import target_of
from ..errors import ProbeError
from ..files import JSON
from ..hub.folder import CONFIG_NAME, read_results
from ..hub.publish import push_folder
from ..hub.resolve import Target, bundled_alias, default_name, resolve_head, with_subfolder
from ..hub.transport import HubOptions
from .aggregator import State, join_rows, map_state, normalize, select_rows
from .configuration import ProbeConfig, read_config
from .decision import ProbeOutput, flagged_score, probe_loss, strongest, strongest_places, take_items
from .match import check_backbone, describe, match
from .novelty import MeanStates, Novelty
from .registry import get_probe_type
from .saving import read_consistently, read_tensors, save_head
from .scope import check_rows, token_mask
from .segments import Rows, Segments, find_segments, join, join_counted, judges_segments, number_segments, span_of
from .stream import ProbeState, SlotStates, Strongest, as_slice


_HALF = (torch.bfloat16, torch.float16)
# For so few tokens, casting the weights of a head costs more than its products in fp32.
_FEW_TOKENS = 128
# Number of blocks in which `score_replies` reads replies. It holds as many summaries of each reply at once.
_BLOCKS = 32


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switch `torch.autocast`, which is meant for the LM, off inside a block."""
    is_on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()


def _drop(x: torch.Tensor, rate: float, dims: int) -> torch.Tensor:
    """Apply dropout to the last dimension. The first `dims` dimensions draw apart; all others share what they draw."""
    shape = (*x.shape[:dims], *[1] * (x.dim() - dims - 1), x.shape[-1])
    return x * F.dropout(x.new_ones(shape), rate)


class ProbeModel(nn.Module):
    """A probe head over all hidden states of a frozen causal LM (arXiv 2601.13288, section 3).

    A head scores in two ways. `forward` takes whole tensors, for training. `init_state`, `step` and `finish` take groups of
    layers and chunks of tokens while the LM runs. Both ways agree to 1e-5 in fp32.

    Parameters are always fp32, even if the module is cast. Hidden states are cast to fp32 too, with one exception: in `step`,
    for more than 128 tokens in half precision, some head types apply their first linear maps in half precision.

    Args:
        config (`ProbeConfig`): must hold `hidden_size` and `num_hidden_layers`, unless `backbone` is given.
        backbone (`PreTrainedModel`, *optional*): the LM that turns `input_ids` into hidden states in `forward`, without
            gradients. It is kept outside the module tree, so that `state_dict`, optimizers and checkpoints see only the head.
            It is set to eval mode, and none of its parameters is frozen: LoRA weights can still be trained.

    Attributes:
        results: the measurements of the head, as in the `results.json` of its folder; `None` if there are none.
        novelty: measures how unlike the training data a prompt is; `None` if it was not fitted. See `set_novelty`.

    Raises:
        ProbeError: the sizes are missing, or differ from the backbone's.
    """

    # The Trainer then averages the loss over gradient accumulation steps, as for any model with a mean loss.
    accepts_loss_kwargs = False
    backbone: nn.Module | None

    def __init__(self, config: ProbeConfig, backbone: nn.Module | None = None):
        super().__init__()
        if backbone is not None:
            is_recorded = config.fingerprint is not None
            config = match(backbone, config) if is_recorded else describe(backbone, config)
        self.hidden_size, self.num_hidden_layers = config.sizes
        self.config = config
        self.results: JSON | None = None
        self.alias: str | None = None  # of a bundled head, which `check_backbone` attaches to no other model
        self.layer_indices = config.layer_indices
        self._slots = {layer: slot for slot, layer in enumerate(self.layer_indices)}
        head_type = get_probe_type(config.probe_type)
        self.token_stage = head_type(len(config.layer_indices), config)
        self.token_stage.causal = config.causal
        self.layer_stage = head_type.create_layer_stage(config)
        self.classifier = head_type.create_classifier(config)
        self.novelty = None if config.novelty is None else Novelty(config)
        # torch.set_default_dtype is meant for the LM.
        super()._apply(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
        self.set_backbone(backbone)

    def set_backbone(self, backbone: nn.Module | None) -> None:
        """Set the LM that turns `input_ids` into hidden states, or None, and put it into eval mode.

        Copies of the head have no LM. The LM's parameters are not frozen: `forward` runs it without gradients.
        """
        if backbone is not None:
            match(backbone, self.config)
            backbone.eval()
        object.__setattr__(self, "backbone", backbone)

    def set_novelty(self, novelty: Novelty) -> None:
        """Give the head a fitted `Novelty`, and its config the settings. The scores of the head do not change."""
        self.config = self.config.replace(novelty=novelty.settings, weights_sha256=None)
        self.novelty = novelty.to(self.device)

    def __getstate__(self) -> JSON:
        return {**self.__dict__, "backbone": None}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ProbeModel:
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    @property
    def device(self) -> torch.device:
        """Device of the head's parameters."""
        return self.classifier.weight.device

    def num_parameters(self, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters of the head, without the backbone's. A head has no embeddings to exclude."""
        return sum(parameter.numel() for parameter in self.parameters())

    # Files and the Hub

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        backbone: nn.Module | None = None,
        *,
        subfolder: str | None = None,
        **options: Any,
    ) -> ProbeModel:
        """Load a head from a folder, from the Hub, or by its alias (see `resolve_head`), on the CPU and in eval mode.

        Args:
            backbone: the LM that aliases are for, and that turns `input_ids` into states in `forward`.
            subfolder: as in `load_probe`.
            options: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`; see `HubOptions`.

        Raises:
            ProbeError: there is no such head, its config or weights are damaged, or it was made for another backbone.
        """
        target = None if backbone is None else target_of(backbone)
        source = with_subfolder(source, subfolder)
        probe = cls.load_for(source, target, HubOptions(**options))
        if backbone is not None:
            check_backbone(default_name(source), probe.config, backbone, alias=probe.alias)
            probe.set_backbone(backbone)
        return probe

    @classmethod
    def load_for(
        cls,
        source: str | os.PathLike[str],
        target: Target | None = None,
        options: HubOptions = HubOptions(),
    ) -> ProbeModel:
        """Load a head for a backbone that need not be loaded; see `resolve_head`."""
        folder = resolve_head(source, target, options)
        probe = read_consistently(folder, lambda: cls._read(folder))
        probe.alias = bundled_alias(source, folder)
        return probe.eval()

    @classmethod
    def _read(cls, folder: Path) -> ProbeModel:
        config = read_config(folder)
        try:
            with torch.device("meta"):
                shapes = {name: tensor.shape for name, tensor in cls(config).state_dict().items()}
        except (ProbeError, RuntimeError, MemoryError, OverflowError) as error:
            raise ProbeError(f"{folder / CONFIG_NAME} describes a head that cannot be built: {error}") from None
        tensors = read_tensors(folder, config, shapes)
        probe = cls(config)
        probe.load_state_dict(tensors)
        probe.results = read_results(folder)
        return probe

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> Path:
        """Write config, weights, results and a card into a folder, and nothing of the backbone.

        A card that a person wrote or edited is kept. If no card can be made, a warning says why, and the old one is kept.

        Raises:
            ProbeError: the folder cannot be made or written into.
        """
        return save_head(save_directory, self.config, self.state_dict(), self.results)

    def push_to_hub(self, repo_id: str, *, name: str | None = None, **kwargs: Any) -> CommitInfo:
        """Upload the head in one commit: config, weights, results and a card.

        Args:
            repo_id: `user/name`; created if it does not exist.
            name: of the head, for the commit message.
            kwargs: see `push_folder`.

        Raises:
            ProbeError: the Hub refused, with its reason. Nothing is uploaded then.
        """
        with tempfile.TemporaryDirectory() as scratch:
            return push_folder(self.save_pretrained(Path(scratch) / (name or "head")), repo_id, **kwargs)

    # Whole tensors

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        hidden_states: torch.Tensor | Sequence[torch.Tensor] | None = None,
        output_attentions: bool = False,
        probe_mask: torch.Tensor | None = None,
        row_weights: torch.Tensor | None = None,
        reply_mask: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
        request_mask: torch.Tensor | None = None,
    ) -> ProbeOutput:
        """Score prompts from their ids (with a backbone) or from their hidden states.

        Args:
            input_ids (`torch.LongTensor` of shape `[batch, tokens]`, *optional*): prompts; needs `backbone`.
            attention_mask (`torch.Tensor` of shape `[batch, tokens]`, *optional*): 1 for tokens, 0 for padding on
                either side. With `hidden_states`, 1 for the tokens that count; with `input_ids`, the config's
                `token_scope` is applied to it.
            labels (*optional*): class indices `[batch]`; for multi-label heads floats `[batch, num_labels]`; for
                regression floats `[batch, num_labels]` or `[batch]`.
            hidden_states (*optional*): `output_hidden_states` of the LM, L+1 tensors `[batch, tokens, hidden_size]`, or
                one tensor `[batch, L+1, tokens, hidden_size]`, or one of the layers alone that the head reads. Any float
                dtype.
            output_attentions: also returns `token_weights` and `layer_weights`.
            probe_mask (`[batch, tokens]`, *optional*): true for the tokens that count, in place of the config's `token_scope`.
                A head with `token_scope="response"` needs it with `input_ids`.
            row_weights (`[batch, W]`, *optional*): weight of each row in the loss; see `probe_loss`.
            reply_mask (`[batch, tokens]`, *optional*): true for the tokens of replies, which `score_replies` then scores.
            segments (`torch.LongTensor` of shape `[batch, tokens]`, *optional*): number of the turn of each token in the mask; see
                `number_segments`. By default a given mask is one turn.
            request_mask (`torch.BoolTensor` of shape `[batch, tokens]`, *optional*): true for the tokens that give a row its label;
                see `score`.

        Raises:
            ProbeError: both inputs or none are given, sizes are wrong, or no token of a prompt counts.
        """
        if input_ids is not None and hidden_states is None:
            if self.backbone is None:
                raise ProbeError("input_ids need ProbeModel(config, backbone=...); without one, pass hidden_states")
            if probe_mask is None:
                probe_mask = token_mask(self.config, input_ids, attention_mask)
                segments = number_segments(self.config, probe_mask)
            mask = self._checked(probe_mask, input_ids.shape)
            x = torch.stack(collect_hidden_states(self.backbone, self.layer_indices, input_ids, attention_mask))
        elif hidden_states is not None and input_ids is None:
            x = self._stack(hidden_states)  # [S, B, T, D]
            mask = self._checked(attention_mask if probe_mask is None else probe_mask, x.shape[1:3])
        else:
            raise ProbeError("give either input_ids (with a backbone) or hidden_states")
        output = self.score(self.normalize(x), mask, output_attentions, segments, reply_mask, request_mask)
        output.row_weights = row_weights
        if labels is not None:
            output.loss = probe_loss(output.learned_logits, labels, self.config, row_weights=row_weights)
        return output

    def _checked(self, mask: torch.Tensor | None, shape: torch.Size) -> torch.Tensor | None:
        if mask is None:
            return None
        if mask.shape != shape:
            raise ProbeError(f"the mask has the shape {tuple(mask.shape)}, and the prompts have {tuple(shape)}")
        mask = mask.to(self.device).bool()
        check_rows(mask)
        return mask

    def score(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        segments: torch.Tensor | None = None,
        reply_mask: torch.Tensor | None = None,
        request_mask: torch.Tensor | None = None,
    ) -> ProbeOutput:
        """Score normalised states, which several heads can share.

        Args:
            x (`torch.FloatTensor` of shape `[layers_read, batch, tokens, hidden_size]`): states of the layers that the head
                reads, ascending.
            mask (`torch.BoolTensor` of shape `[batch, tokens]`, *optional*): true for the tokens that count. Defaults to all.
            segments (`torch.LongTensor` of shape `[batch, tokens]`, *optional*): as in `forward`. A head that judges no segments
                ignores them.
            reply_mask (`torch.BoolTensor` of shape `[batch, tokens]`, *optional*): as in `forward`.
            request_mask (`torch.BoolTensor` of shape `[batch, tokens]`, *optional*): true for the tokens that give a row its label.
                In training it tells which windows hold them; see `Segments.holding`.
        """
        if reply_mask is not None:
            with without_autocast(self.device):
                return self.score_replies(x, mask, reply_mask)
        state = self.init_state(output_attentions=output_attentions)
        counted = torch.ones(x.shape[1:3], dtype=torch.bool, device="cpu") if mask is None else mask.cpu()
        parts = self._segments_of(counted, segments)
        self.step(state, self.layer_indices, x, mask, segments=parts)
        output = self.finish(state, learning=self.training)
        if self.config.window and parts is None:
            output.spans = span_of(counted, self.config.num_labels).to(self.device)
        if output.segment_logits is not None and parts is not None:
            request = torch.zeros_like(counted) if request_mask is None else request_mask
            output.holds_request, output.touches_request = parts.holding(request.to(self.device).bool())
        return output

    def _segments_of(self, mask: torch.Tensor, numbers: torch.Tensor | None) -> Segments | None:
        """Return the segments of whole prompts, `[batch, tokens]` on the CPU; `None` if no row has several."""
        if not judges_segments(self.config):
            return None
        numbers = mask.long() if numbers is None else numbers.cpu()
        is_short = self.config.window == 0 or int((numbers > 0).sum(dim=1).max()) <= self.config.window
        if is_short and int(numbers.max()) <= 1:
            return None
        move = partial(torch.Tensor.to, device=self.device)
        return find_segments(numbers, self.config.window, slice(0, numbers.shape[1]), move=move)

    def score_replies(self, x: torch.Tensor, mask: torch.Tensor | None, reply_mask: torch.Tensor) -> ProbeOutput:
        """Score replies at about 32 of their tokens, each as the end of the text so far. Differentiable.

        The tokens are read in blocks, and a summary is taken after each block. A short reply has blocks of one token. In training
        the borders of the blocks are drawn anew each time. Memory: what `update` keeps of `x`, and the summaries
        `[layers_read, batch, width]` of each block; for `mha` also the keys and values of the tokens before each block.

        Args:
            reply_mask (`torch.BoolTensor` of shape `[batch, tokens]`): the tokens of the replies.

        Returns:
            An output with `token_logits` and `token_mask`. `strongest` chooses its `logits` from the token logits.
        """
        mask = torch.ones_like(reply_mask, dtype=torch.bool) if mask is None else mask
        reply_mask = reply_mask.bool().to(mask.device) & mask
        columns = reply_mask.any(dim=0).nonzero().flatten().tolist()
        first = columns[0]
        end = columns[-1] + 1
        width = math.ceil((end - first) / _BLOCKS)
        offset = int(torch.randint(1, width + 1, ())) if self.training else width
        stops = [*range(first + offset, end, width), end]
        parts = list(self.summaries_at(stops, x, mask))
        seen = reply_mask.cumsum(dim=1)[:, [stop - 1 for stop in stops]]  # [B, R]: tokens of the reply
        # Some head types have no finite summary before the first token of the reply.
        summaries = torch.stack(parts, dim=2).masked_fill((seen == 0)[None, :, :, None], 0.0)  # [S, B, R, D]
        output = self.score_summaries(summaries, learning=self.training)
        logits = output.logits.unflatten(0, seen.shape)  # [B, R, C]
        members = logits[None] if output.member_logits is None else output.member_logits.unflatten(1, seen.shape)
        counted = seen.diff(dim=1, prepend=torch.zeros_like(seen[:, :1])) > 0
        output = ProbeOutput.from_logits(strongest(logits, self.config, counted), self.config)
        output.token_logits, output.token_mask = members, counted
        return output

    def summaries_at(self, stops: Sequence[int], x: torch.Tensor, mask: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the summary `[layers_read, batch, width]` of all tokens before each stop; see `score`."""
        state = None
        for start, stop in zip([0, *stops], stops, strict=False):
            state = self.token_stage.update(state, x[:, :, start:stop], mask[:, start:stop], slice(None))
            yield self.token_stage.result(state, slice(None))

    def _stack(self, hidden_states: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the states of the layers that the head reads, `[layers_read, batch, tokens, hidden_size]`."""
        layers = self.num_hidden_layers + 1
        read = len(self.layer_indices)
        width = self.hidden_size
        if isinstance(hidden_states, torch.Tensor):
            shape = hidden_states.shape
            if len(shape) != 4 or shape[1] not in (layers, read) or shape[3] != width:
                allowed = f"[batch, {layers} (all) or {read} (the layers it reads), tokens, {width}]"
                raise ProbeError(f"hidden_states has the shape {tuple(shape)}; it must be {allowed}")
            return (hidden_states if shape[1] == read else hidden_states[:, self.layer_indices]).transpose(0, 1)
        if len(hidden_states) != layers or any(state.shape[2:] != (width,) for state in hidden_states):
            actual = f"{len(hidden_states)} tensors {[tuple(state.shape) for state in hidden_states[:2]]}..."
            raise ProbeError(f"hidden_states has {actual}; it must have {layers} tensors [batch, tokens, {width}]")
        return torch.stack([hidden_states[layer].to(self.device) for layer in self.layer_indices])

    # Groups of layers, while the LM runs

    def init_state(self, state: State = None, keep: bool = False, output_attentions: bool = False) -> ProbeState:
        """Start on a batch of prompts.

        Args:
            state: state of earlier tokens, from `ProbeState.joined`.
            keep: keep the state after the last token, to continue from it.
            output_attentions: also keep the token weights. The prompt must then come in one chunk.
        """
        mean_slots = 0 if self.novelty is None else len(self.novelty.slots)
        return ProbeState.create(len(self.layer_indices), mean_slots, state, keep, output_attentions)

    def input_format(self, x: torch.Tensor) -> tuple[str | None, torch.dtype, torch.device]:
        """Return the normalisation, dtype and device of `prepare`. Heads that agree on all three can share its result.

        For many tokens, and a head type that reads it, half precision makes the head's products several times as fast. It rounds
        less than the LM itself does.

        Args:
            x (`[S, batch, n, hidden_size]`): states of an LM.
        """
        reads_half = self.token_stage.reads_half and self.config.normalize != "none"
        has_many_tokens = x.shape[1] * x.shape[2] > _FEW_TOKENS
        dtype = x.dtype if x.dtype in _HALF and reads_half and has_many_tokens else torch.float32
        return self.config.normalize, dtype, self.device

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        """Move, cast and normalise states `[S, batch, n, hidden_size]` of an LM, as `step` takes them."""
        normalized_by, dtype, device = self.input_format(x)
        return normalize(x.to(device, dtype), normalized_by)

    def step(
        self,
        state: ProbeState,
        layers: Sequence[int],
        x: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        last: bool = True,
        segments: Segments | None = None,
    ) -> None:
        """Read the next tokens of some layers.

        Args:
            state: from `init_state`.
            layers: indices of the states, ascending and without a gap, from 0 (embeddings) to L (after the final norm). Layers
                that the head does not read are ignored.
            x (`torch.Tensor` of shape `[len(layers), batch, n, hidden_size]`): their states, from `prepare`.
            token_mask (`torch.BoolTensor` of shape `[batch, n]`, *optional*): the tokens that count. Defaults to all.
            last: no token that counts follows.
            segments: segments of these tokens, for a head that `judges_segments`, if a row has several or may get several.

        Raises:
            ProbeError: token weights are asked for, and the prompt comes in several chunks.
        """
        places = [place for place, layer in enumerate(layers) if layer in self._slots]
        if not places:
            return
        if len(places) < len(layers):
            x = x[as_slice(places)]
        first = self._slots[layers[places[0]]]
        slots = slice(first, first + len(places))
        ends = last and not state.keep
        has_windows = segments is not None and self.config.window > 0
        with without_autocast(self.device):
            earlier = state.tokens.pop(slots)
            if state.output_attentions:
                if earlier is not None or not ends:
                    raise ProbeError("output_attentions needs the prompt in one pass, without cache")
                state.weights.put(slots, self._weights(x, token_mask, slots, segments))
            if self.novelty is not None and state.means is not None:
                self.novelty.update(state.means, slots, x, token_mask)
            projected = self.token_stage.project(x, slots)
            if segments is not None:
                self._step_segments(state, segments, projected, slots)
                if slots.stop == len(self.layer_indices) and not ends:
                    self._end_pass(state, segments)
            if has_windows:
                return
            seen = self.token_stage.absorb(earlier, projected, token_mask, slots)
            if ends:
                state.summaries.put(slots, self.token_stage.result(seen, slots))
            else:
                state.tokens.put(slots, seen)

    def _weights(
        self, x: torch.Tensor, mask: torch.Tensor | None, slots: slice, segments: Segments | None
    ) -> torch.Tensor | None:
        """Return the token weights `[S, batch, tokens]`, of a head with several windows `[S, windows, window]`."""
        if segments is None or not self.config.window:
            return self.token_stage.weights(x, mask, slots)
        (windows,) = segments.groups
        return self.token_stage.weights(x.flatten(1, 2)[:, windows.index], windows.mask, slots)

    def _step_segments(self, state: ProbeState, segments: Segments, projected: torch.Tensor, slots: slice) -> None:
        """Read the next tokens, `[S, batch, n, ...]` from `Aggregator.project`, into the states of their segments."""
        if segments is not state.segments:  # the first layers of a pass
            state.segments = segments
            state.next_open = [SlotStates(len(self.layer_indices)) for _ in segments.open]
        stage = self.token_stage
        tokens = projected.flatten(1, 2)  # [S, batch n, ...]
        parts = []
        if segments.begun is not None:
            begun = join_rows([segment.pop(slots) for segment in state.open[: segments.num_begun]])
            parts.append(stage.absorb(begun, tokens[:, segments.begun.index], segments.begun.mask, slots))
        for group in segments.groups:
            mask = None if stage.is_idempotent else group.mask
            parts.append(stage.absorb(None, tokens[:, group.index], mask, slots))
        if segments.ended_rows.most:
            summaries = join([stage.result(part, slots) for part in parts])  # [S, segments, width]
            state.ended.put(slots, summaries if segments.ended is None else summaries[:, segments.ended])
        for segment, rows in zip(state.next_open, segments.open, strict=True):
            segment.put(slots, select_rows(join_rows(parts), rows))

    def _end_pass(self, state: ProbeState, segments: Segments) -> None:
        """Keep the strongest of the segments that have ended, and the states of the segments that are open."""
        if state.ended.joined() is not None:
            _, strongest_so_far = self._score_segments(state, segments, self._ended_of(state, segments))
            state.strongest = map_state(strongest_so_far, lambda tensor: tensor.unsqueeze(0))
        state.ended = SlotStates(len(self.layer_indices))
        state.open = state.next_open

    def finish(self, state: ProbeState, learning: bool = False) -> ProbeOutput:
        """Score what `step` has read so far: logits `[batch, num_labels]`. For `learning` see `score_summaries`.

        Raises:
            ProbeError: not every layer has been read.
        """
        with without_autocast(self.device):
            summaries = state.summaries.joined()
            if summaries is None:
                seen = state.tokens.joined()
                summaries = None if seen is None else self.token_stage.result(seen, slice(None))
            if state.segments is None:
                self._check_layers(summaries)
                output = self.score_summaries(summaries, state.output_attentions, learning)
                weights = state.weights.joined()
                output.token_weights = None if weights is None else weights.transpose(0, 1)  # [B, S, T]
            else:
                items = [*self._ended_of(state, state.segments), *self._open_of(state, state.segments)]
                if not self.config.window:  # all turns together
                    self._check_layers(summaries)
                    items.insert(0, (summaries.unsqueeze(2), Rows.single(summaries)))
                output, _ = self._score_segments(state, state.segments, items, learning)
            if self.novelty is not None and state.means is not None:
                output.means = MeanStates(self.novelty, *state.means.joined())
        return output

    def _check_layers(self, summaries: torch.Tensor | None) -> None:
        slots = len(self.layer_indices)
        if summaries is None or len(summaries) != slots:
            raise ProbeError(f"not all of {slots} layers have been read")

    def _ended_of(self, state: ProbeState, segments: Segments) -> list[tuple[torch.Tensor, Rows]]:
        """Return the summaries `[S, batch, K, width]` of the segments that ended in this pass, if there are any."""
        ended = state.ended.joined()
        if ended is None:
            return []
        self._check_layers(ended)
        rows = segments.ended_rows
        return [(rows.arrange(ended), rows)]

    def _open_of(self, state: ProbeState, segments: Segments) -> list[tuple[torch.Tensor, Rows]]:
        """Return the summaries `[S, batch, K, width]` of the segments that later tokens may join, if there are any."""
        if not segments.open:
            return []
        read = [self.token_stage.result(segment.joined(), slice(None)) for segment in state.open]
        self._check_layers(read[0])
        return [(torch.stack(read, dim=2), segments.open_rows)]

    def _score_segments(
        self,
        state: ProbeState,
        segments: Segments,
        items: list[tuple[torch.Tensor, Rows]],
        learning: bool = False,
    ) -> tuple[ProbeOutput, Strongest]:
        """Score segments. Return the output and the `Strongest`, without its first dimension, of these and of earlier passes.

        Args:
            items: summaries `[S, batch, K, width]`, and the rows that have them.
        """
        config = self.config
        parts: list[Strongest] = []  # logits `[B, K, C]`, spans `[B, K, C, 2]`, and which count `[B, K]`
        output = ProbeOutput()
        if items:
            summaries = join([part for part, _ in items], dim=2)
            rows = [rows for _, rows in items]
            output = self.score_summaries(summaries, state.output_attentions, learning)
            logits = output.logits.unflatten(0, summaries.shape[1:3])
            spans = join([each.spans for each in rows]).unsqueeze(2).expand(*logits.shape, 2)
            sizes = [each.most for each in rows]
            counted = join_counted(
                [(part, each.counted) for part, each in zip(logits.split(sizes, 1), rows, strict=True)]
            )
            self._reduce(output, logits, counted, learning)
            if state.output_attentions:
                self._choose_weights(output, state.weights.joined(), segments, logits, counted)
            parts.append((logits, spans, counted))
        if state.strongest is not None:
            parts.append(map_state(state.strongest, lambda tensor: tensor.transpose(0, 1)))
        if not parts:  # no token has counted so far
            nothing = torch.zeros(segments.batch, 1, config.num_labels, 2, device=self.device)
            parts.append((nothing[..., 0], nothing.long(), nothing[:, :, 0, 0].bool()))
        logits = join([part for part, _, _ in parts])
        counted = join_counted([(part, mask) for part, _, mask in parts])
        places = strongest_places(logits, config, counted)  # [B, C]
        chosen = take_items(logits, places)
        if output.logits is None:
            output = ProbeOutput.from_logits(chosen, config)
        output.logits = chosen
        if config.window:
            spans = join([part for _, part, _ in parts if part is not None])
            output.spans = spans.gather(1, places[:, None, :, None].expand(-1, -1, -1, 2)).squeeze(1)
        return output, (chosen, output.spans, None if counted is None else counted.any(dim=1))

    def _reduce(self, output: ProbeOutput, logits: torch.Tensor, counted: torch.Tensor | None, learning: bool) -> None:
        """Let each member learn from the segment that it finds strongest.

        Args:
            logits (`[batch, K, num_labels]`): of the segments.
            counted (`[batch, K]` bool): the segments that a row has; `None` for all.
        """
        shape = logits.shape[:2]
        members = logits[None]
        if output.member_logits is not None:
            members = output.member_logits.unflatten(1, shape)  # [M, B, K, C]
            of_each = None if counted is None else counted.expand(members.shape[:-1])
            output.member_logits = strongest(members, self.config, of_each)
        if learning and self.config.window:
            output.segment_logits = members
            output.segment_mask = (
                torch.ones(shape, dtype=torch.bool, device=self.device) if counted is None else counted
            )

    def _choose_weights(
        self,
        output: ProbeOutput,
        weights: torch.Tensor | None,
        segments: Segments,
        logits: torch.Tensor,
        counted: torch.Tensor | None,
    ) -> None:
        """Give an output the weights of the strongest window of each row, or of all turns together."""
        place = torch.zeros(len(logits), dtype=torch.long, device=self.device)
        scores = flagged_score(logits, self.config)
        if self.config.window and scores is not None:
            scores = scores if counted is None else scores.masked_fill(~counted, float("-inf"))
            place = scores.argmax(dim=1)
            weights = None if weights is None else segments.spread(weights, place)
        output.token_weights = None if weights is None else weights.transpose(0, 1)  # [B, S, T]
        if output.layer_weights is not None:
            rows = torch.arange(len(place), device=place.device)
            output.layer_weights = output.layer_weights.unflatten(0, logits.shape[:2])[rows, place]

    # Shared by all

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """Return states as the token stage takes them: fp32, on the head's device, normalised as the config says."""
        return normalize(x.to(device=self.device, dtype=torch.float32), self.config.normalize)

    def score_summaries(
        self, summaries: torch.Tensor, output_attentions: bool = False, learning: bool = False
    ) -> ProbeOutput:
        """Score the layers' summaries from the token stage.

        Args:
            summaries (`[layers_read, batch, width]`): or `[layers_read, batch, tokens, width]`, for logits
                `[batch * tokens, num_labels]`.
            learning: apply dropout, the same to all tokens of a row. It is False while an LM in training mode runs with the head.
        """
        if learning:
            if self.config.layer_dropout:
                keep = torch.rand(summaries.shape[:2], device=summaries.device) >= self.config.layer_dropout
                keep = keep.view(*keep.shape, *[1] * (summaries.dim() - 2))
                summaries = summaries * keep / (1 - self.config.layer_dropout)
            summaries = _drop(summaries, self.config.dropout, 2)
        rows = summaries.shape[1:-1]
        items = summaries.flatten(1, -2).transpose(0, 1).unsqueeze(0)  # [1, B, S, D]
        pooled = self.layer_stage(items)[0]  # [B, D]
        if learning:
            pooled = _drop(pooled.unflatten(0, rows), self.config.dropout, 1).flatten(0, -2)
        output = ProbeOutput.from_logits(self.classifier(pooled), self.config)
        if learning:
            output.member_logits = self.classifier.member_logits(pooled)
        if output_attentions:
            weights = self.layer_stage.weights(items, None, slice(None))
            output.layer_weights = None if weights is None else weights[0]  # [B, S]
        return output
