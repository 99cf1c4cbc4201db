"""Reads the hidden states of a language model's layers while it runs."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from transformers import Cache

from ..errors import ProbeError
from .cache import repeat_cache
from .decoder import Decoder, find_decoder


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
