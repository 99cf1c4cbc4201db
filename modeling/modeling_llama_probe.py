"""Causal LMs with probe heads: a label and a text from the same forward pass. Part of the runtime of an exported repository.

    model = AutoModelForCausalLM.from_pretrained(repository, probe="toxic", trust_remote_code=True)
    out = model.generate(**inputs, halt_on="toxic")
    print(out.probe_labels, out.probe_probabilities)

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load
from torch import nn
from transformers import LogitsProcessorList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import cached_file

from .configuration_llama_probe import ProbeConfig, ProbeError, get_probe_type, needs_package
from .heads_llama_probe import (
    Rows,
    Segments,
    check_rows,
    find_segments,
    join_counted,
    join_rows,
    join_slots,
    normalize,
    number_segments,
    select_rows,
    take_slots,
    token_mask,
    tokens_read,
)


# Arguments of generate() that only the package has, and settings under which the LM does not run over the prompt as it is.
_PACKAGE_ONLY = ("halt_reply", "on_probe_token", "probe_state", "abstain_at", "probe_mask")
_ASSISTED = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp")
_OTHER_PASSES = ("inputs_embeds", "cache", "past_key_values", *_ASSISTED, "token_healing", "custom_generate")
_METHODS = (
    "load_probe", "add_probe", "save_probe", "push_probe_to_hub", "set_active_probes", "disable_probes", "delete_probe"
)  # fmt: skip
_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
_MOST_HELD = 2**24  # numbers in the hidden states that are held at once
_INSIDE = threading.local()  # `generate` is true while it runs: forward() is then the plain one


class Halt(NamedTuple):
    """The reason why a prompt got no reply."""

    head: str
    label: str
    score: float
    threshold: float | None


class ProbeHead(nn.Module):
    """A head: a summary of the tokens of each layer, a summary of the layers, and a linear map to the labels. Always in fp32."""

    def __init__(self, config: ProbeConfig):
        super().__init__()
        head_type = get_probe_type(config.probe_type)
        self.config = config
        self.token_stage = head_type(len(config.layer_indices), config)
        self.token_stage.causal = config.causal
        self.layer_stage = head_type.create_layer_stage(config)
        self.classifier = head_type.create_classifier(config)
        self.float().eval().requires_grad_(False)

    @classmethod
    def load(cls, repository: str, name: str, **hub: Any) -> ProbeHead:
        """Read a head from its folder in a repository: JSON and safetensors alone.

        Raises:
            ProbeError: there is no such head, or its files do not belong together.
        """
        if not re.fullmatch(r"[\w-]+", name):
            raise needs_package(f"probe={name!r}, which is no head of this repository,")
        try:
            files = (f"{name}/probe_config.json", f"{name}/probe_model.safetensors")
            config, weights = (Path(cached_file(repository, file, **hub)).read_bytes() for file in files)
        except OSError as error:
            raise ProbeError(f"{repository} has no head {name!r}: {str(error).splitlines()[0]}") from None
        head = cls(ProbeConfig.from_json(config.decode()))
        if head.config.weights_sha256 not in (None, hashlib.sha256(weights).hexdigest()):
            raise ProbeError(f"{name}/probe_model.safetensors does not belong to its config: fetch both again")
        tensors = {key: tensor for key, tensor in load(weights).items() if not key.startswith("novelty.")}
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ProbeError(f"{name}/probe_model.safetensors holds NaN or infinity")
        head.load_state_dict(tensors)
        return head

    def states(self) -> HeadStates:
        """Return the states of a head that has read nothing."""
        return HeadStates([None] * len(self.config.layer_indices), [[] for _ in self.config.layer_indices], [], [])

    def read(
        self, states: HeadStates, slots: slice, x: torch.Tensor, mask: torch.Tensor, segments: Segments | None
    ) -> None:
        """Read further tokens `[S, B, n, D]` of some layers into `states`."""
        if self.classifier.weight.device != x.device:
            self.to(x.device)
        x = self.token_stage.project(normalize(x.float(), self.config.normalize), slots)
        if segments is not None:
            self._read_segments(states, slots, x, segments)
            if self.config.window:
                return
        earlier = None if states.tokens[slots.start] is None else join_slots(states.tokens[slots])
        mask = None if bool(mask.all()) else mask.to(x.device)
        state = self.token_stage.absorb(earlier, x, mask, slots)
        states.tokens[slots] = [take_slots(state, slice(place, place + 1)) for place in range(len(x))]

    def _read_segments(self, states: HeadStates, slots: slice, x: torch.Tensor, segments: Segments) -> None:
        tokens = x.flatten(1, 2)  # [S, B n, ...]
        parts = []
        if segments.begun is not None:
            begun = [join_slots(each) for each in zip(*states.open[slots], strict=True)][: segments.num_begun]
            group = segments.begun
            parts.append(self.token_stage.absorb(join_rows(begun), tokens[:, group.index], group.mask, slots))
        parts += [
            self.token_stage.absorb(None, tokens[:, group.index], group.mask, slots) for group in segments.groups
        ]
        if slots.start == 0:  # the first layers of a pass
            states.ended.append([])
            states.rows.append(segments.ended_rows)
        if segments.ended_rows.most:
            summaries = torch.cat([self.token_stage.result(part, slots) for part in parts], dim=1)
            states.ended[-1].append(summaries if segments.ended is None else summaries[:, segments.ended])
        open_states = [select_rows(join_rows(parts), rows) for rows in segments.open]
        for place, slot in enumerate(range(slots.start, slots.stop)):
            states.open[slot] = [take_slots(each, slice(place, place + 1)) for each in open_states]

    def score(self, states: HeadStates) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return logits `[B, num_labels]`, and spans `[B, num_labels, 2]` of a head with several windows."""
        items, rows = [], []
        if states.tokens[0] is not None:
            summaries = self.token_stage.result(join_slots(states.tokens), slice(None))  # [S, B, D]
            items.append(summaries.unsqueeze(2))
            rows.append(Rows.single(summaries))
        for ended, of_pass in zip(states.ended, states.rows, strict=True):
            if of_pass.most:
                items.append(of_pass.arrange(torch.cat(ended)))
                rows.append(of_pass)
        summaries = torch.cat(items, dim=2)  # [S, B, K, D]
        pooled = self.layer_stage(summaries.flatten(1, 2).transpose(0, 1).unsqueeze(0))[0]
        logits = self.classifier(pooled).unflatten(0, summaries.shape[1:3])  # [B, K, C]
        if not states.ended:
            return logits[:, 0], None
        parts = logits.split([each.most for each in rows], dim=1)
        counted = join_counted([(part, each.counted) for part, each in zip(parts, rows, strict=True)])
        scores = logits
        if (flagged := self.config.flagged_index) is not None:
            scores = (logits[..., flagged] - logits[..., 1 - flagged]).unsqueeze(-1)
        if counted is not None:
            scores = scores.masked_fill(~counted[..., None], float("-inf"))
        places = scores.argmax(dim=1).expand_as(logits[:, 0])[:, None]  # [B, 1, C]
        spans = torch.cat([each.spans for each in rows], dim=1).unsqueeze(2).expand(*logits.shape, 2)
        spans = spans.take_along_dim(places[..., None], dim=1).squeeze(1) if self.config.window else None
        return logits.take_along_dim(places, dim=1).squeeze(1), spans


@dataclass
class HeadStates:
    """What a head keeps of the tokens that it has read.

    Attributes:
        tokens: of each layer the state of all tokens, None before the first.
        open: of each layer the states of the segments that further tokens may join.
        ended: of each pass, and of each group of its layers, the summaries of the segments that ended in it.
        rows: of each pass the rows of these segments.
    """

    tokens: list[Any]
    open: list[list[Any]]
    ended: list[list[torch.Tensor]]
    rows: list[Rows]


@dataclass
class HeadOutput:
    """The result of a head for some prompts: `logits` and `probabilities` `[B, num_labels]`, and the label of each prompt.

    `spans` `[B, num_labels, 2]` has the first token, and one past the last, of the window that gave each label its logit. It is None
    if each prompt is one window, or the head has none.
    """

    logits: torch.Tensor
    config: ProbeConfig
    spans: torch.Tensor | None = None

    @property
    def probabilities(self) -> torch.Tensor:
        """Softmax or sigmoid with the saved temperature. For a regression head the values."""
        if self.config.problem_type == "regression":
            return self.logits
        scaled = self.logits / self.config.temperature
        return scaled.sigmoid() if self.config.problem_type == "multi_label_classification" else scaled.softmax(dim=-1)

    @property
    def labels(self) -> list[Any]:
        """The label of each row with the saved threshold: a name, for a multi-label head a list of names, for a regression values."""
        probs, names = self.probabilities.cpu(), self.config.id2label
        if self.config.problem_type == "regression":
            return probs.tolist()
        if not bool(probs.isfinite().all()):
            raise ProbeError("the head gives no number for a row: its score would pass for harmless")
        if self.config.problem_type == "multi_label_classification":
            limits = torch.tensor([self.config.threshold_of(index) for index in names])
            return [[names[index] for index, on in enumerate(row) if on] for row in (probs >= limits).tolist()]
        return [names[index] for index in self.decided.tolist()]

    @property
    def decided(self) -> torch.Tensor:
        """The index of the label that a head of exclusive labels gives, `[B]`, with the saved threshold."""
        probs, flagged = self.probabilities.cpu(), self.config.flagged_index
        if flagged is None or self.config.threshold is None:
            return probs.argmax(dim=-1)
        return torch.where(probs[:, flagged] >= self.config.threshold, flagged, 1 - flagged)


class Rule(NamedTuple):
    """Halts the prompts to which a head gives a label, or those whose score reaches the threshold."""

    head: str
    config: ProbeConfig
    label: str
    threshold: float | None

    @classmethod
    def create_all(cls, halt_on: Any, heads: dict[str, ProbeHead]) -> list[Rule]:
        """Return the rules for the name of a head, several names, or a dict of names with `label` and `threshold`."""
        if callable(halt_on):
            raise needs_package("halt_on= with a function")
        named = [halt_on] if isinstance(halt_on, str) else halt_on
        if not isinstance(named, (dict, list, tuple, set)) or not named:
            raise ProbeError(f"halt_on={halt_on!r} must be a head's name, or a list or dict of names")
        named = named if isinstance(named, dict) else dict.fromkeys(named)
        rules = []
        for name, options in named.items():
            if name not in heads:
                raise ProbeError(f"halt_on: there is no head {name!r}; heads: {', '.join(heads)}")
            if not isinstance(options or {}, dict):
                raise ProbeError(f"halt_on: the options of {name!r} are {options!r}; they must be a dict")
            rules += cls._of_head(name, heads[name].config, **(options or {}))
        return rules

    @classmethod
    def _of_head(cls, name: str, config: ProbeConfig, label=None, threshold=None, **others: Any) -> list[Rule]:
        if others:
            raise needs_package(f"halt_on= with {min(others)}")
        known = list(config.id2label.values())
        is_regression = config.problem_type == "regression"
        flagged = known if is_regression else config.flagged or []
        labels = flagged if label is None else [label]
        if not labels or not set(labels) <= set(known) or (is_regression and len(labels) > 1):
            raise ProbeError(f"halt_on: {name!r} needs a label of {', '.join(known)}")
        if is_regression and threshold is None:
            raise ProbeError(f"halt_on: {name!r} gives values and needs a threshold")
        thresholds = config.thresholds or {} if labels == config.flagged else {}
        threshold = thresholds.get(threshold, threshold)
        if isinstance(threshold, str) or not (is_regression or 0 <= (threshold or 0) <= 1):
            allowed = f"a number from 0 to 1, or one of {list(thresholds)}"
            raise ProbeError(f"halt_on: {name!r} has no threshold {threshold!r}; allowed: {allowed}")
        return [cls(name, config, each, threshold) for each in labels]

    def halts(self, output: HeadOutput) -> list[Halt | None]:
        """Return the reason to halt each row, or None. A score that is not a number halts."""
        index = list(self.config.id2label.values()).index(self.label)
        scores = output.probabilities[:, index].cpu()
        threshold = self.config.threshold_of(index) if self.threshold is None else self.threshold
        hits = output.decided == index if threshold is None else scores >= threshold
        pairs = zip((hits | scores.isnan()).tolist(), scores.tolist(), strict=True)
        return [Halt(self.head, self.label, score, threshold) if hit else None for hit, score in pairs]


class _AllHalted(Exception):
    """Leaves the plain generate() if no prompt gets a reply."""


class PromptReader:
    """Reads the prompts of one call with its heads while the LM runs over them, in one pass or in chunks.

    It is a logits processor too. transformers calls it before each token, for the first time when the prompts have been read.

    Raises:
        ProbeError: ids and mask are not tensors of one shape, or a prompt has no token that a head reads.
    """

    def __init__(self, lm: nn.Module, heads: dict[str, ProbeHead], ids: torch.Tensor, mask: torch.Tensor | None):
        for tensor in (ids, ids if mask is None else mask):
            if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2 or tensor.shape != ids.shape or not len(ids):
                raise ProbeError("input_ids and attention_mask must be tensors of one shape, [batch, tokens]")
        self.lm, self.heads, self.ids = lm, heads, ids
        self.rules: list[Rule] = []
        self.halts: list[Halt | None] = [None] * len(ids)
        self.outputs: dict[str, HeadOutput] | None = None
        self._held: dict[int, torch.Tensor] = {}  # states of the running pass, by layer
        self._device: torch.device | None = None  # of the first state: an LM may be on several devices
        self.masks = {}
        self.segments = {}
        self._states = {}
        host = ids.cpu()
        host_mask = None if mask is None else mask.cpu()
        for name, head in heads.items():
            counted = token_mask(head.config, host, host_mask)
            check_rows(counted)
            self.masks[name] = tokens_read(head.config, counted)
            self.segments[name] = number_segments(head.config, counted)
            self._states[name] = head.states()
        self._seen = dict.fromkeys({layer for head in heads.values() for layer in head.config.layer_indices}, 0)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Read the hidden states inside the block: 0 goes into the first layer, i comes out of layer i, L out of the norm."""
        decoder, last, thread = self.lm.model, self.lm.config.num_hidden_layers, threading.get_ident()

        def take(layer: int, hidden: torch.Tensor) -> None:
            if threading.get_ident() == thread and self._seen[layer] < self.ids.shape[1]:
                self._take(layer, hidden)

        def before(_, args: tuple, kwargs: dict[str, Any]) -> None:
            take(0, args[0] if args else kwargs["hidden_states"])

        def after(layer: int):
            return lambda _, args, output: take(layer, output[0] if isinstance(output, tuple) else output)

        with ExitStack() as stack:
            for layer in self._seen:
                if layer == 0:
                    stack.enter_context(decoder.layers[0].register_forward_pre_hook(before, with_kwargs=True))
                else:
                    module = decoder.norm if layer == last else decoder.layers[layer - 1]
                    stack.enter_context(module.register_forward_hook(after(layer)))
            yield

    def _take(self, layer: int, hidden: torch.Tensor) -> None:
        repeats, rest = divmod(len(hidden), len(self.ids))  # beams and return sequences repeat each prompt
        width = hidden.shape[1]
        if rest or not repeats or width > self.ids.shape[1] - self._seen[layer]:
            raise needs_package("a decoding method that does not run over the prompt as it was given")
        self._device = self._device or hidden.device
        self._held[layer] = hidden[::repeats].to(self._device)
        if layer == max(self._seen) or sum(state.numel() for state in self._held.values()) > _MOST_HELD:
            self._read(width)

    def _read(self, width: int) -> None:
        """Read the states that are held: a few layers at once, for all heads."""
        start, held = self._seen[next(iter(self._held))], self._held
        for name, head in self.heads.items():
            if layers := [layer for layer in head.config.layer_indices if layer in held]:
                first = head.config.layer_indices.index(layers[0])
                x = torch.stack([held[layer] for layer in layers])
                mask = self.masks[name][:, start : start + width]
                places = mask.any(dim=0).nonzero().flatten().tolist() or [0]
                columns = slice(places[0], places[-1] + 1)
                segments = self._segments(name, start, columns, start + width, x.device)
                slots = slice(first, first + len(layers))
                head.read(self._states[name], slots, x[:, :, columns], mask[:, columns], segments)
        self._seen.update(dict.fromkeys(held, start + width))
        self._held = {}

    def _segments(self, name: str, start: int, columns: slice, stop: int, device: torch.device) -> Segments | None:
        """Return the segments of the tokens of a pass, which has read the prompts from `start` to `stop`."""
        if self.segments[name] is None:
            return None
        read = slice(start + columns.start, start + columns.stop)
        ends = stop == self.ids.shape[1]
        numbers, window = self.segments[name][:, :stop], self.heads[name].config.window
        return find_segments(numbers, window, read, start, ends, lambda tensor: tensor.to(device))

    def finish(self) -> dict[str, HeadOutput]:
        """Return the result of each head."""
        if self.outputs is None:
            if any(seen < self.ids.shape[1] for seen in self._seen.values()):
                raise ProbeError("the LM did not run over the whole prompt: no part is scored")
            scores = {name: head.score(self._states.pop(name)) for name, head in self.heads.items()}
            self.outputs = {
                name: HeadOutput(logits, self.heads[name].config, spans) for name, (logits, spans) in scores.items()
            }
        return self.outputs

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.outputs is None:
            for rule in self.rules:
                found = rule.halts(self.finish()[rule.head])
                self.halts = [old or new for old, new in zip(self.halts, found, strict=True)]
            if self.rules and None not in self.halts:
                raise _AllHalted
        if not any(self.halts):
            return scores
        rows = torch.tensor([halt is not None for halt in self.halts], device=scores.device)
        rows = rows.repeat_interleave(len(scores) // len(rows))[:, None]
        scores = scores.masked_fill(rows, torch.finfo(scores.dtype).min)
        scores[:, self.end, None] = scores[:, self.end, None].masked_fill(rows, 0.0)
        return scores

    end = 0


class ProbedGenerationMixin:
    """Heads for a causal LM class of transformers. `probes` are the heads by name; without any the model is the plain LM."""

    _causal_lm_class: type

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Outside the module tree: state_dict() and save_pretrained() see the LM alone.
        object.__setattr__(self, "probes", {})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args, probe: Any = None, **kwargs):
        """Load the LM as transformers does, with heads of its repository: a name, or several."""
        names = [probe] if isinstance(probe, str) else list(probe or ())
        hub = {name: kwargs[name] for name in _HUB if kwargs.get(name) is not None}
        if kwargs.pop("probe_strict", None):
            raise needs_package("probe_strict=")
        heads = {name: ProbeHead.load(pretrained_model_name_or_path, name, **hub) for name in names}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        lm = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, head in heads.items():
            sizes = (lm.config.hidden_size, lm.config.num_hidden_layers)
            if sizes != head.config.sizes:
                raise ProbeError(f"head {name!r} is for another backbone: hidden_size and num_hidden_layers {sizes}")
        lm.probes.update(heads)
        return loaded

    def __getattr__(self, name: str) -> Any:
        if name in _METHODS:
            raise needs_package(name)
        return super().__getattr__(name)

    @property
    def active_probes(self) -> list[str]:
        """Names of the heads."""
        return list(self.probes)

    def init_continuous_batching(self, *args, **kwargs):
        """Start continuous batching, without heads."""
        if self.probes:
            raise needs_package("continuous batching beside heads")
        return super().init_continuous_batching(*args, **kwargs)

    def _chosen(self, probes: Any) -> dict[str, ProbeHead]:
        names = [probes] if isinstance(probes, str) else list(self.probes if probes is None else probes)
        if unknown := [name for name in names if name not in self.probes]:
            raise ProbeError(f"there is no head {unknown[0]!r}; heads: {', '.join(self.probes)}")
        return {name: self.probes[name] for name in names}

    def _forward(self, inputs: dict[str, Any]):
        """Run the LM. A pass over whole prompts has `probe_logits` in its output."""
        past, plain = inputs.get("cache", inputs.get("past_key_values")), self._causal_lm_class.forward
        if not self.probes or getattr(_INSIDE, "generate", False) or (past is not None and past.get_seq_length()):
            return plain(self, **inputs)
        return self._forward_with_heads(plain, self._chosen(inputs.pop("probes", None)), inputs)

    @torch.compiler.disable
    def _forward_with_heads(self, plain: Callable, heads: dict[str, ProbeHead], inputs: dict[str, Any]):
        _refuse((*_PACKAGE_ONLY, "inputs_embeds"), inputs)
        reader = PromptReader(self, heads, inputs.get("input_ids"), inputs.get("attention_mask"))
        with reader.hooks():
            output = plain(self, **inputs)
        logits = {name: each.logits for name, each in reader.finish().items()}
        if isinstance(output, tuple):
            return (*output, logits)
        output["probe_logits"] = logits
        return output

    @torch.no_grad()
    def generate(
        self, inputs: torch.Tensor | None = None, generation_config=None, *, probes=None, halt_on=None, **kwargs
    ):
        """Generate as transformers does. The output has `probe_logits`, `probe_probabilities`, `probe_labels` by head.

        Args:
            probes: names of the heads of this call. Defaults to all.
            halt_on: a head, several, or a dict of heads with `label` and `threshold`: prompts that they flag get no reply.
                `probe_halts` then has a `Halt` or None for each prompt.
        """
        configs = (vars(config) for config in (self.generation_config, generation_config) if config is not None)
        settings = {name: value for each in (*configs, kwargs) for name, value in each.items() if value is not None}
        _refuse((*_PACKAGE_ONLY, *(_OTHER_PASSES if self.probes else ())), settings)
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        if not self.probes or settings.get("return_dict_in_generate") is False:
            if halt_on is not None:
                raise ProbeError("halt_on needs a head, probe=NAME in from_pretrained, and return_dict_in_generate")
            return super().generate(inputs, generation_config, **kwargs)
        ends, pad = (_ids(settings.get(name)) for name in ("eos_token_id", "pad_token_id"))
        mask = kwargs.get("attention_mask")
        if mask is None and pad and not set(pad) & set(ends):
            mask = inputs != pad[0]
        reader = PromptReader(self, self._chosen(probes), inputs, mask)
        reader.rules = [] if halt_on is None else Rule.create_all(halt_on, reader.heads)
        pad = (pad or ends or [0])[0]
        reader.end = (ends or [pad])[0]
        processors = LogitsProcessorList([*(kwargs.pop("logits_processor", None) or ()), reader])
        kwargs |= {"logits_processor": processors, "return_dict_in_generate": True}
        _INSIDE.generate = True
        try:
            with reader.hooks():
                output = super().generate(inputs, generation_config, **kwargs)
        except _AllHalted:
            if kwargs.get("streamer") is not None:
                kwargs["streamer"].end()
            copies = settings.get("num_return_sequences", 1)
            output = GenerateDecoderOnlyOutput(sequences=inputs.repeat_interleave(copies, dim=0))
        finally:
            _INSIDE.generate = False
        repeats = len(output.sequences) // len(inputs)
        for row in [row for row in range(len(output.sequences)) if reader.halts[row // repeats] is not None]:
            output.sequences[row, inputs.shape[1] :] = pad
        results = reader.finish()
        output["probe_logits"] = {name: each.logits for name, each in results.items()}
        output["probe_probabilities"] = {name: each.probabilities for name, each in results.items()}
        output["probe_labels"] = {name: each.labels for name, each in results.items()}
        if halt_on is not None:
            output["probe_halts"] = reader.halts
        if (tokenizer := kwargs.get("tokenizer")) is not None:
            output["texts"] = tokenizer.batch_decode(output.sequences[:, inputs.shape[1] :], skip_special_tokens=True)
        return output

    @torch.no_grad()
    def classify(self, input_ids: Any, attention_mask=None, probes=None, tokenizer=None) -> dict[str, HeadOutput]:
        """Score prompts, ids `[B, T]` or with `tokenizer=` a list of texts, without generating."""
        heads = self._chosen(probes)
        if not isinstance(input_ids, torch.Tensor):
            if tokenizer is None or not isinstance(input_ids, (str, Sequence)) or not input_ids:
                raise ProbeError("classify takes ids [batch, tokens], or texts with tokenizer=")
            return {name: self._classify_texts(name, input_ids, tokenizer) for name in heads}
        reader = PromptReader(self, heads, input_ids, attention_mask)
        with reader.hooks():
            positions = None if attention_mask is None else (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)
            self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)
        return reader.finish()

    def _classify_texts(self, name: str, texts: str | Sequence[str], tokenizer: Any) -> HeadOutput:
        """Score texts one by one, rendered as the head was trained."""
        config, logits = self.probes[name].config, []
        for text in [texts] if isinstance(texts, str) else texts:
            if not isinstance(text, str):
                raise needs_package("classify of a chat")
            if config.prompt_format == "raw":
                ids = tokenizer(text, return_tensors="pt")["input_ids"]
            else:
                system = [] if config.system_prompt is None else [{"role": "system", "content": config.system_prompt}]
                chat = [*system, {"role": "user", "content": text}]
                form = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
                ids = tokenizer.apply_chat_template(chat, **form)["input_ids"]
            if not config.window and config.max_length is not None and ids.shape[1] > config.max_length:
                raise needs_package(f"a text of {ids.shape[1]} tokens, more than max_length={config.max_length},")
            logits.append(self.classify(ids.to(self.device), probes=name)[name].logits)
        return HeadOutput(torch.cat(logits), config)


def _refuse(names: Sequence[str], values: dict[str, Any]) -> None:
    for name in names:
        if values.get(name) is not None and values[name] is not False:
            raise needs_package(f"{name}= with heads")


def _ids(value: int | list[int] | torch.Tensor | None) -> list[int]:
    return [] if value is None else torch.as_tensor(value).flatten().tolist()


def __getattr__(name: str) -> type:
    """Make `XForProbedGeneration` from `XForCausalLM` of transformers."""
    stem, made, rest = name.partition("ForProbedGeneration")
    if not made or rest:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    plain = getattr(transformers, f"{stem}ForCausalLM")
    names = tuple(inspect.signature(plain.forward).parameters)[1:]

    @functools.wraps(plain.forward)  # generate() reads from its signature what a model takes
    def forward(self, *args, **kwargs):
        return self._forward(dict(zip(names, args, strict=False)) | kwargs)

    doc = f"`{plain.__name__}` with probe heads."
    fields = {"forward": forward, "__module__": __name__, "__doc__": doc, "_causal_lm_class": plain}
    globals()[name] = type(name, (ProbedGenerationMixin, plain), fields)
    return globals()[name]
