"""One call of `generate()` with heads: what is read while the prompt is prefilled, and what comes out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import make_dataclass
from typing import Any

import torch
from torch import nn
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from .capture import Capture, Decoder
from .configuration import ProbeConfig
from .decision import DecidedMixin, ProbeOutput, labels, probabilities
from .errors import ProbeError
from .halting import Halt
from .probe import ProbeModel
from .reply import ReplySession
from .scope import token_mask


class PrefillSession:
    """Feeds the states of one batch of prompts to the heads while the LM runs over it, in one or more forward passes.

    Args:
        heads: the heads that read along, by name.
        masks: for each head the tokens that count, `[prompts, prompt_tokens]`.
        input_ids: the prompts, `[prompts, prompt_tokens]`; `None` where they are given as embeddings.
        past: leading prompt tokens that a cache holds already.
        output_attentions: keep token and layer weights.
        shape: `(prompts, prompt_tokens)`, where no head reads the prompts.

    Attributes:
        on_complete: called with the results, once, at the end of the pass that completes the prompt.
        reply: reads the passes after that; `None` where no head does.

    Raises:
        ProbeError: a prompt that cannot be scored; see `ProbeModel.init_state`.
    """

    def __init__(
        self,
        heads: dict[str, ProbeModel],
        masks: dict[str, torch.Tensor],
        input_ids: torch.Tensor | None = None,
        past: int = 0,
        output_attentions: bool = False,
        shape: tuple[int, int] = (0, 0),
    ):
        self.heads = heads
        self.input_ids = input_ids
        self.seen = past
        self.prompts, self.length = next(iter(masks.values())).shape if masks else shape
        self.states = {name: head.init_state(masks[name], past, output_attentions) for name, head in heads.items()}
        self.on_complete: Callable[[dict[str, ProbeOutput]], Any] | None = None
        self.reply: ReplySession | None = None

    @property
    def complete(self) -> bool:
        """Whether the LM has run over the whole prompt; later passes are plain ones, or those of `reply`."""
        return self.seen >= self.length

    @property
    def next_reader(self) -> PrefillSession | ReplySession | bool:
        """What reads the next pass; `False` where nothing does."""
        return (self.reply or False) if self.complete else self

    @contextmanager
    def reading(self, decoder: Decoder, inputs: dict[str, Any]):
        """Reads the states of one forward pass of the LM, which is about to run over `inputs`.

        Raises:
            ProbeError: the pass is not over the next tokens of the prompts.
        """
        ids = inputs.get("input_ids")
        rows, columns = (inputs["inputs_embeds"] if ids is None else ids).shape[:2]
        # rows: beams and return sequences repeat each prompt; columns: candidate tokens follow the prompt.
        repeats, rest = divmod(rows, self.prompts)
        width = min(columns, self.length - self.seen)
        expected = None if self.input_ids is None else self.input_ids[:, self.seen : self.seen + width]
        same = ids is None or expected is None or torch.equal(ids[:: repeats or 1, :width], expected.to(ids.device))
        if rest or not repeats or not same:
            raise ProbeError(
                "the decoding method does not run the LM over the prompt as it was given (a part of it, or other rows): "
                "a part of a prompt is not scored. set_active_probes([]) generates without heads"
            )
        wanted = {layer for head in self.heads.values() for layer in head.layer_indices}

        def on_state(layer: int, hidden: torch.Tensor) -> None:
            with torch.no_grad():  # the LM's own gradients, where it is being trained, are none of the heads' business
                for name, head in self.heads.items():
                    head.step(self.states[name], layer, hidden[::repeats, :width])

        with Capture(decoder, on_state, wanted):
            yield
        self.seen += width
        if self.complete and self.on_complete is not None:
            self.on_complete(self.results())

    def results(self) -> dict[str, ProbeOutput]:
        """`ProbeOutput` of each head.

        Raises:
            ProbeError: the LM has not run over the whole prompt.
        """
        with torch.no_grad():
            return {name: head.finish(self.states[name]) for name, head in self.heads.items()}


# The generate() call that this thread is in: (model, its assistant, session). Heads are decided once, by the outermost
# call of a model; calls that the decoding method makes for its own ends (assistants, early exits) run without heads.
_CURRENT: ContextVar[tuple[nn.Module, nn.Module | None, PrefillSession] | None] = ContextVar(
    "probe_session", default=None
)


@contextmanager
def open_session(model: nn.Module, assistant: nn.Module | None, session: PrefillSession):
    """Makes `session` the one that `session_of(model)` finds, in this thread and inside the block."""
    token = _CURRENT.set((model, assistant, session))
    try:
        yield session
    finally:
        _CURRENT.reset(token)


def session_of(model: nn.Module) -> PrefillSession | None:
    """The session of the `generate()` call that `model` is in, or `None`."""
    current = _CURRENT.get()
    return current[2] if current is not None and current[0] is model else None


def is_inner_call(model: nn.Module) -> bool:
    """Whether a `generate()` of `model` is made by another one, that of the model itself or that it assists."""
    current = _CURRENT.get()
    return current is not None and (current[0] is model or current[1] is model)


def prompt_masks(
    heads: dict[str, ProbeModel],
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    probe_mask: torch.Tensor | None,
    placeholder_ids: Sequence[int] = (),
) -> dict[str, torch.Tensor]:
    """For each head the tokens of the prompt that count, `[prompts, prompt_tokens]`.

    Heads are trained on texts: tokens with `placeholder_ids`, which stand for images or the like, only count where
    `probe_mask` says so. What the LM sees in an image reaches heads through the text tokens after it.

    Raises:
        ProbeError: no prompt, or the mask and the prompt do not fit each other.
    """
    source = input_ids if input_ids is not None else inputs_embeds
    if source is None or source.shape[1] == 0:
        raise ProbeError(
            "there is no prompt for the heads to read: pass input_ids or inputs_embeds, "
            "or set_active_probes([]) to generate without heads"
        )
    shape = source.shape[:2]
    for name, mask in (("attention_mask", attention_mask), ("probe_mask", probe_mask)):
        if mask is not None and mask.shape != shape:
            raise ProbeError(
                f"{name} has the shape {tuple(mask.shape)}, the prompt {tuple(shape)}: heads must see the whole prompt. "
                "With a cache, pass all input_ids of the conversation, not only the new ones"
            )
    if attention_mask is None:
        attention_mask = torch.ones(shape, dtype=torch.bool, device=source.device)
    if probe_mask is not None:
        chosen = probe_mask.to(attention_mask.device).bool() & attention_mask.bool()
        return dict.fromkeys(heads, chosen)
    masks = {name: token_mask(head.config, input_ids, attention_mask) for name, head in heads.items()}
    if placeholder_ids and input_ids is not None:
        text = ~torch.isin(input_ids, torch.tensor(placeholder_ids, device=input_ids.device))
        masks = {name: mask & text.to(mask.device) for name, mask in masks.items()}
    return masks


class ProbedOutputMixin(DecidedMixin):
    """Adds what the heads say to an output of the LM.

    `probe_logits` is `None` where no head ran. `probe_halts` has one entry a prompt, the `Halt` that kept it from a reply
    or `None`; it is `None` where nothing was to be halted. Where replies could be halted, it has one entry a row.

    `probe_token_logits` has the heads that read replies, and is `None` where there is none: `[rows, new_tokens - 1,
    num_labels]` a head, column t the score of all that counts up to the t-th token of the reply, from 0. The last token is
    read by nobody and has none. From the end of a reply on, and at its padding, there is NaN.
    """

    @property
    def probe_probabilities(self) -> dict[str, torch.Tensor] | None:
        """`[batch, num_labels]` a head, with its saved temperature."""
        if self.probe_logits is None:
            return None
        return {name: probabilities(logits, self._config_of(name)) for name, logits in self.probe_logits.items()}

    @property
    def probe_labels(self) -> dict[str, list[Any]] | None:
        """Label names a head and row, with its saved temperature and threshold."""
        probs = self.probe_probabilities
        return None if probs is None else {name: labels(value, self._config_of(name)) for name, value in probs.items()}

    @property
    def probe_token_probabilities(self) -> dict[str, torch.Tensor] | None:
        """As `probe_token_logits`, with the head's saved temperature."""
        if self.probe_token_logits is None:
            return None
        return {name: probabilities(logits, self._config_of(name)) for name, logits in self.probe_token_logits.items()}


@functools.cache
def probed_output_class(base: type[ModelOutput]) -> type[ModelOutput]:
    """`base` with `probe_logits`, a dict of `[batch, num_labels]` tensors by head name, and what `ProbedOutputMixin` adds."""
    tensors = "dict[str, torch.Tensor] | None"
    return make_dataclass(
        f"Probed{base.__name__}",
        [
            ("probe_logits", tensors, None),
            ("probe_halts", "list[Halt | None] | None", None),
            ("probe_token_logits", tensors, None),
        ],
        bases=(ProbedOutputMixin, base),
        namespace={"__module__": __name__, "__doc__": f"{base.__name__} with `probe_logits`: logits by head name."},
    )


ProbedCausalLMOutputWithPast = probed_output_class(CausalLMOutputWithPast)
ProbedGenerateDecoderOnlyOutput = probed_output_class(GenerateDecoderOnlyOutput)
ProbedGenerateBeamDecoderOnlyOutput = probed_output_class(GenerateBeamDecoderOnlyOutput)


def with_probe_logits(
    output: ModelOutput,
    probe_logits: dict[str, torch.Tensor] | None,
    configs: dict[str, ProbeConfig],
    halts: Sequence[Halt | None] | None = None,
    token_logits: dict[str, torch.Tensor] | None = None,
) -> ModelOutput:
    """A copy of an LM's output that carries the heads' logits, knows their labels, and says what was halted."""
    probed = probed_output_class(type(output))(
        **output, probe_logits=probe_logits, probe_halts=halts, probe_token_logits=token_logits
    )
    probed.__dict__["_probe_configs"] = configs
    return probed
