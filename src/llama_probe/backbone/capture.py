"""The only code that touches a language model's internals: taps the states of its layers while it runs.

Where these are is said in `llama_probe.backbone.families`; its output embeddings are the business of `llama_probe.backbone.next_token`, its cache
that of `llama_probe.backbone.cache`.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from transformers import Cache

from ..errors import ProbeError
from ..heads.configuration import ProbeConfig
from .cache import repeat_cache
from .families import find_parts


# Names under which the configs of wrappers keep the ids of tokens that stand for a part of an image, a film or a sound.
_PLACEHOLDERS = tuple(f"{kind}_token_{what}" for kind in ("image", "video", "audio") for what in ("id", "index"))


@dataclass(frozen=True)
class Decoder:
    """The parts of a causal LM that heads read.

    Attributes:
        model: the decoder without its LM head.
        embeddings: its input embeddings.
        layers: the decoder layers, in order.
        norm: the norm after the last layer.
        hidden_size: size of a state.
        name_or_path, model_type: of the backbone's config.
        origin: who said where these are: `"table"`, `"registered"` or `"search"`; see `state_proof`.
        wrapper: what `model` is a part of, where that takes images or the like and puts them between the embeddings.
        placeholder_ids: ids of the tokens that stand for these in a prompt.
    """

    model: nn.Module
    embeddings: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    hidden_size: int
    name_or_path: str | None
    model_type: str | None
    origin: str = "table"
    wrapper: nn.Module | None = None
    placeholder_ids: tuple[int, ...] = ()

    @property
    def num_hidden_layers(self) -> int:
        """Number of decoder layers L; there are L+1 states."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Where the last state appears, and so where heads belong. Right for offloaded weights as well."""
        hook = getattr(self.norm, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        if device is None:
            # OLMo's norm has no parameters
            parameters = (p for module in (self.norm, self.layers[-1]) for p in module.parameters())
            device = next((p.device for p in parameters), torch.device("cpu"))
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def input_device(self) -> torch.device:
        """Where token ids belong."""
        device = next(self.embeddings.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def cache_name(self) -> str:
        """What the decoder calls its cache, as an argument and in its output: older versions of transformers otherwise."""
        return "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"

    def run(self, **inputs: Any) -> Any:
        """Runs the backbone without its LM head.

        Positions are counted as `generate()` counts them, from the first token that is not padding, where none are given:
        models with learned positions (GPT-2) would else see other prompts behind left padding.

        Args:
            inputs: of the decoder, or of the wrapper around it (`pixel_values`); what is `None` is left out.
        """
        inputs = {name: value for name, value in inputs.items() if value is not None}
        names = inspect.signature(self.model.forward).parameters
        if self.wrapper is not None and not inputs.keys() <= names.keys():
            return self._run_wrapper(inputs)
        mask = inputs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and "position_ids" in names and "position_ids" not in inputs:
            counted = mask.bool()
            if bool((counted[:, 1:] & ~counted[:, :-1]).any()):
                width = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"].shape[1]
                positions = (counted.long().cumsum(dim=1) - 1).masked_fill(~counted, 0)  # [B, past + T]
                inputs["position_ids"] = positions[:, -width:]
        return self.model(**inputs)

    def whole(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a pass of the LM, so that each layer runs over all tokens.

        A decoder that takes `logits_to_keep` itself (Gemma 4 with shared keys and values) may leave out the others from some
        layer on, where that is a number; where it names the same tokens one by one, it does not.
        """
        keep = inputs.get("logits_to_keep")
        if (
            not isinstance(keep, int)
            or keep <= 0
            or "logits_to_keep" not in inspect.signature(self.model.forward).parameters
        ):
            return inputs
        tokens = inputs.get("input_ids")
        tokens = inputs["inputs_embeds"] if tokens is None else tokens
        return {**inputs, "logits_to_keep": torch.arange(-min(keep, tokens.shape[1]), 0, device=tokens.device)}

    def _run_wrapper(self, inputs: dict[str, Any]) -> Any:
        inner = self.wrapper.base_model
        if inner is not self.wrapper:
            return inner(**inputs)
        # There is none without the LM head (Llama 4). The plain class's forward: heads that are attached do not run twice.
        plain = getattr(type(self.wrapper), "_causal_lm_class", type(self.wrapper))
        keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(plain.forward).parameters else {}
        return plain.forward(self.wrapper, **inputs, **keep)

    def match(self, config: ProbeConfig) -> ProbeConfig:
        """`config` with the backbone's sizes and name where it has none; `fingerprint.describe` adds the rest.

        Raises:
            ProbeError: it was made for another hidden size or number of layers.
        """
        for name in ("hidden_size", "num_hidden_layers"):
            wanted, found = getattr(config, name), getattr(self, name)
            if wanted is not None and wanted != found:
                made_for = f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else ""
                raise ProbeError(
                    f"{name}={wanted} in the head's config, but this backbone has {found}: "
                    f"the head was made for another model{made_for}"
                )
        return config.replace(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            base_model_name_or_path=config.base_model_name_or_path or self.name_or_path,
            base_model_type=config.base_model_type or self.model_type,
        )


def without_peft(lm: nn.Module) -> nn.Module:
    """The causal LM inside a PEFT model, with its adapters in it; any other comes back as it is."""
    return lm.get_base_model() if hasattr(lm, "peft_config") and hasattr(lm, "get_base_model") else lm


def is_tensor_parallel(lm: nn.Module | None) -> bool:
    """Whether each of several processes has a part of every layer (`tp_plan`), so that all must run it on the same rows."""
    return lm is not None and (getattr(without_peft(lm), "_tp_size", None) or 1) > 1


def find_decoder(lm: nn.Module) -> Decoder:
    """Finds the decoder of a causal LM, also inside a PEFT model.

    Raises:
        ProbeError: it is none, or its parts are not found; see `find_parts`.
    """
    base = without_peft(lm)
    text_config = base.config.get_text_config(decoder=True)
    parts = find_parts(base, text_config.num_hidden_layers)
    ids = map(vars(base.config).get, _PLACEHOLDERS)
    return Decoder(
        model=parts.model,
        embeddings=parts.embeddings,
        layers=parts.layers,
        norm=parts.norm,
        hidden_size=text_config.hidden_size,
        name_or_path=getattr(base.config, "_name_or_path", None) or None,
        model_type=base.config.model_type,
        origin=parts.origin,
        wrapper=None if parts.model in (base, base.base_model) else base,
        placeholder_ids=tuple(value for value in ids if isinstance(value, int)),
    )


class Capture:
    """Hands each state to a callback as it appears, and keeps none.

    State 0 is what enters the first layer (right for `inputs_embeds` and for models that scale or add positions to
    their embeddings), state i the output of layer i, and state L the output of the final norm: equal to
    `output_hidden_states`. The hooks exist only inside the `with` block, and only listen to the thread that opened it,
    so that two threads can run one model.

    What is handed over stays as it is. A layer may be the user's to hook, and hooks that steer it change in place what enters
    it, which is the state before: then that is a copy.

    Args:
        decoder: from `find_decoder`.
        on_state: called as `on_state(layer, hidden)` with `hidden` of shape `[rows, tokens, hidden_size]`.
        layers: the state indices wanted.
    """

    def __init__(self, decoder: Decoder, on_state: Callable[[int, torch.Tensor], None], layers: Collection[int]):
        self.decoder = decoder
        self.on_state = on_state
        self.layers = frozenset(layers)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._thread: int | None = None

    def __enter__(self) -> Capture:
        self._thread = threading.get_ident()
        last = self.decoder.num_hidden_layers
        try:
            for layer in sorted(self.layers):
                if layer == 0:
                    module, register = self.decoder.layers[0], "pre"
                elif layer == last:
                    module, register = self.decoder.norm, "post"
                else:
                    module, register = self.decoder.layers[layer - 1], "post"
                hooked = layer < last and bool(self.decoder.layers[layer]._forward_pre_hooks)
                self._handles.append(self._listen(module, register, layer, hooked))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _listen(self, module: nn.Module, where: str, layer: int, copied: bool):
        if where == "pre":
            # Torch notes a hook first and its with_kwargs a moment later: another thread that runs the module in between calls
            # it without them.
            def before(_, args, kwargs=None):
                if threading.get_ident() == self._thread:
                    self.on_state(layer, _first_input(args, kwargs))

            return module.register_forward_pre_hook(before, with_kwargs=True)

        def after(_, args, output):
            if threading.get_ident() == self._thread:
                hidden = output[0] if isinstance(output, tuple) else output
                self.on_state(layer, hidden.clone() if copied else hidden)

        return module.register_forward_hook(after)


def _first_input(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()))


class StateReader(Protocol):
    """What is handed states."""

    def on_state(self, layer: int, hidden: torch.Tensor) -> None:
        """Takes a state, `[rows, tokens, hidden_size]`."""


class _Listening(threading.local):
    """Who gets the states of the pass that this thread is in, where `torch.compile` traces that."""

    def __init__(self):
        self.reader: StateReader | None = None


_LISTENING = _Listening()


@torch.compiler.assume_constant_result
def stay_in_layers(lm: nn.Module) -> bool:
    """For `handing_states_to`: puts hooks into the decoder of `lm` that stay, once. They cannot come and go in what is compiled.

    Called while a pass is traced, and not when the graph runs.

    Returns:
        Whether they get the states of all tokens, which not every decoder runs all layers over; see `Decoder.whole`.
    """
    decoder = find_decoder(lm)
    if "logits_to_keep" in inspect.signature(decoder.model.forward).parameters:
        return False
    first = decoder.layers[0]
    if not any(getattr(hook, "func", None) is _hand_over_input for hook in first._forward_pre_hooks.values()):
        first.register_forward_pre_hook(partial(_hand_over_input, 0), with_kwargs=True)
        for layer, module in enumerate((*decoder.layers[:-1], decoder.norm), start=1):
            module.register_forward_hook(partial(_hand_over_output, layer))
    return True


@contextmanager
def handing_states_to(reader: StateReader):
    """Inside the block, in this thread, `reader` gets the states of a model with `stay_in_layers`, as a `Capture` would hand them."""
    _LISTENING.reader = reader
    try:
        yield
    finally:
        _LISTENING.reader = None


def _hand_over_input(layer: int, _, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
    # Without keywords it is called where torch has not noted yet that it takes them; see `Capture`.
    if _LISTENING.reader is not None:
        _LISTENING.reader.on_state(layer, _first_input(args, kwargs))


def _hand_over_output(layer: int, _, args: tuple, output: Any) -> None:
    if _LISTENING.reader is not None:
        _LISTENING.reader.on_state(layer, output[0] if isinstance(output, tuple) else output)


def check_seen(wanted: Collection[int], seen: Collection[int]) -> None:
    """Raises `ProbeError` where the LM has run, and not all states that are wanted have come by."""
    if missing := sorted(set(wanted) - set(seen)):
        raise ProbeError(
            f"the LM ran, and {len(missing)} of the {len(wanted)} states that are read did not come by, the first of them "
            f"{missing[0]}. A decoder that torch.compile has compiled notices no hooks that come later: compile its layers one "
            "by one (for layer in model.model.layers: layer.compile()), or set "
            "torch._dynamo.config.skip_nnmodule_hook_guards = False before it runs for the first time"
        )


def collect_hidden_states(
    lm: nn.Module,
    layers: Collection[int],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    prefix: Cache | None = None,
) -> list[torch.Tensor]:
    """Runs the backbone without its LM head, without gradients, and returns the states asked for, in that order.

    Args:
        lm: a causal LM, or a PEFT model around one.
        layers: state indices.
        input_ids (`[batch, tokens]`), attention_mask (`[batch, tokens]`, *optional*): moved to the backbone's device.
        prefix: from `prefill`; the tokens that it holds then come before every row, and their states are not returned.

    Returns:
        One tensor `[batch, tokens, hidden_size]` a layer, in the backbone's dtype.
    """
    decoder = find_decoder(lm)
    device = decoder.input_device
    input_ids = input_ids.to(device)
    attention_mask = None if attention_mask is None else attention_mask.to(device)
    cached = {"use_cache": False}
    if prefix is not None:
        rows, width = len(input_ids), prefix.get_seq_length()
        cached = {"use_cache": True, decoder.cache_name: repeat_cache(prefix, rows)}
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask.new_ones(rows, width), attention_mask], dim=1)
    states: dict[int, torch.Tensor] = {}
    with torch.no_grad(), Capture(decoder, states.__setitem__, layers):
        decoder.run(input_ids=input_ids, attention_mask=attention_mask, **cached)
    check_seen(layers, states)
    return [states[layer] for layer in layers]


def prefill(lm: nn.Module, ids: Sequence[int]) -> Cache | None:
    """Runs the backbone over tokens that many prompts begin with, and returns its cache, for one row.

    `None` where the cache holds states of linear attention, which transformers does not repeat for several rows: prompts
    are then run whole.
    """
    decoder = find_decoder(lm)
    input_ids = torch.tensor([list(ids)], device=decoder.input_device)
    with torch.no_grad():
        cache = decoder.model(input_ids=input_ids, use_cache=True)[decoder.cache_name]
    return None if any(hasattr(layer, "recurrent_states") for layer in cache.layers) else cache
