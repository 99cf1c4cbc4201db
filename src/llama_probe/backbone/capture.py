"""Captures the hidden states of an LM's layers while it runs. Only this file registers hooks on the LM."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import ProbeError
from .cache import repeat_cache
from .decoder import Decoder, find_decoder, without_peft


# Tokens of the forward pass of `check_states`.
_PROOF_TOKENS = 8


class _Enough(Exception):
    """Ends a pass whose last wanted layer has run."""


@contextmanager
def capturing(
    decoder: Decoder, on_state: Callable[[int, torch.Tensor], None], layers: Collection[int]
) -> Iterator[None]:
    """Call a function with each hidden state when it appears, inside the block.

    Hidden state 0 is the input of the first layer (right for `inputs_embeds` and for models that scale their embeddings or
    add positions to them), hidden state i the output of layer i, and hidden state L the output of the final norm: equal to
    `output_hidden_states`. The hooks exist only inside the block, and only for the thread that opened it, so that two
    threads can run one model.

    Args:
        on_state: called as `on_state(layer, hidden)` with `hidden` of shape `[B, n, D]`, which the caller may keep.
        layers: indices of the hidden states.
    """
    thread = threading.get_ident()
    with ExitStack() as hooks:
        for hook in _hooks(decoder, layers, lambda: on_state if threading.get_ident() == thread else None):
            hooks.enter_context(hook)
        yield


def _hooks(decoder: Decoder, layers: Collection[int], listener: Callable[[], Any]) -> Iterator[RemovableHandle]:
    """Register the hooks of some layers one by one. `listener` returns the `on_state` to call, or None."""
    last = decoder.num_hidden_layers
    for layer in sorted(set(layers)):
        if layer == 0:
            yield decoder.layers[0].register_forward_pre_hook(partial(_before, listener), with_kwargs=True)
            continue
        # A user's hook on the next layer may change the state in place: then on_state gets a copy.
        copied = layer < last and bool(decoder.layers[layer]._forward_pre_hooks)
        module = decoder.norm if layer == last else decoder.layers[layer - 1]
        yield module.register_forward_hook(partial(_after, listener, layer, copied))


# Another thread may run the layer when torch has noted the hook, but not yet its with_kwargs.
def _before(listener: Callable[[], Any], _, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
    if (on_state := listener()) is None:
        return
    if args:
        on_state(0, args[0])
    else:
        on_state(0, kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values())))


def _after(listener: Callable[[], Any], layer: int, copied: bool, _, args: tuple, output: Any) -> None:
    if (on_state := listener()) is not None:
        hidden = output[0] if isinstance(output, tuple) else output
        on_state(layer, hidden.clone() if copied else hidden)


# The `on_state` of the forward pass that this thread runs, if permanent hooks feed it.
_LISTENING = threading.local()


def _listening() -> Callable[[int, torch.Tensor], None] | None:
    return getattr(_LISTENING, "on_state", None)


def stay_in_layers(lm: nn.Module) -> bool:
    """Register permanent hooks for `handing_states_to` on an LM, once. A compiled forward pass cannot add or remove hooks.

    This is called while a pass is traced, not when the graph runs.

    Returns:
        False if the decoder may run layers over some tokens only; see `Decoder.whole`.
    """
    decoder = find_decoder(lm)
    if "logits_to_keep" in inspect.signature(decoder.model.forward).parameters:
        return False
    found = decoder.layers[0]._forward_pre_hooks.values()
    if not any(isinstance(hook, partial) and hook.args == (_listening,) for hook in found):
        list(_hooks(decoder, range(decoder.num_hidden_layers + 1), _listening))
    return True


@contextmanager
def handing_states_to(on_state: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Hand the states of an LM with permanent hooks to `on_state` inside the block, in this thread, as `capturing` does."""
    _LISTENING.on_state = on_state
    try:
        yield
    finally:
        _LISTENING.on_state = None


def check_seen(wanted: Collection[int], seen: Collection[int]) -> None:
    """Raise `ProbeError` if the LM has run and did not give all wanted layers."""
    if missing := sorted(set(wanted) - set(seen)):
        hint = "if it is compiled, set torch._dynamo.config.skip_nnmodule_hook_guards = False before its first run"
        raise ProbeError(f"the LM ran without giving hidden states {missing}; {hint}")


def collect_hidden_states(
    lm: nn.Module,
    layers: Collection[int],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    prefix: transformers.Cache | None = None,
) -> list[torch.Tensor]:
    """Run the backbone without its LM head and without gradients, up to the last of some layers, and return hidden states.

    Args:
        input_ids (`[B, T]`): token ids, on any device.
        attention_mask (`[B, T]`, *optional*): 1 for tokens, 0 for padding, on any device. Rows that are padded on the right do
            not need it: no token sees the padding behind it, and attention without a mask is faster.
        prefix: a KV cache from `prefill`, of tokens that come before every row. Not together with `attention_mask`.

    Returns:
        One tensor `[B, T, D]` for each of `layers`, in their order and in the backbone's dtype.
    """
    decoder = find_decoder(lm)
    device = decoder.input_device
    input_ids = input_ids.to(device)
    attention_mask = None if attention_mask is None else attention_mask.to(device)
    cache = None if prefix is None else repeat_cache(prefix, len(input_ids))
    states: dict[int, torch.Tensor] = {}
    wanted = set(layers)
    # A compiled pass cannot end early, and one of several processes must not: FSDP gathers and frees each layer's weights.
    whole = torch.distributed.is_available() and torch.distributed.is_initialized()

    def on_state(layer: int, hidden: torch.Tensor) -> None:
        states[layer] = hidden
        if len(states) == len(wanted) and not (whole or torch.compiler.is_compiling()):
            raise _Enough

    with torch.no_grad(), suppress(_Enough), capturing(decoder, on_state, wanted):
        decoder.run(input_ids=input_ids, attention_mask=attention_mask, cache=cache, use_cache=cache is not None)
    check_seen(layers, states)
    return [states[layer] for layer in layers]


def prefill(lm: nn.Module, ids: Sequence[int]) -> transformers.Cache | None:
    """Run the backbone over the first tokens of many prompts, and return its KV cache for one row.

    Returns:
        The cache, or None if it holds states of linear attention, which transformers cannot repeat for several rows.
    """
    decoder = find_decoder(lm)
    input_ids = torch.tensor([list(ids)], device=decoder.input_device)
    with torch.no_grad():
        cache = decoder.model(input_ids=input_ids, use_cache=True)[decoder.cache_name]
    return None if any(hasattr(layer, "recurrent_states") for layer in cache.layers) else cache


def check_states(lm: nn.Module) -> None:
    """Prove, for a family that is not in the table, that the captured states are the LM's hidden states.

    The backbone runs once over a few tokens. For a registered family, only the shapes are checked, and that no layer changes
    an earlier hidden state in place. Models with offloaded weights are not checked.

    Raises:
        ProbeError: a state is missing, has another shape, is changed in place, or differs from `output_hidden_states`.
    """
    decoder = find_decoder(lm)
    if decoder.origin == "table" or any(parameter.is_meta for parameter in decoder.model.parameters()):
        return
    layers = range(decoder.num_hidden_layers + 1)
    is_listed = decoder.origin != "registered"
    listing = {"output_hidden_states": True, "return_dict": True} if is_listed else {}
    states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of each layer, and a copy

    def on_state(layer: int, hidden: torch.Tensor) -> None:
        states[layer] = hidden, hidden.clone()

    ids = torch.arange(_PROOF_TOKENS, device=decoder.input_device)[None]
    with torch.no_grad(), capturing(decoder, on_state, layers):
        output = decoder.model(input_ids=ids, use_cache=False, **listing)
    listed = getattr(output, "hidden_states", None) or ()
    for layer in layers:
        state, copy = states.get(layer, (None, None))
        if state is None or state.shape != (1, _PROOF_TOKENS, decoder.hidden_size):
            problem = f"is not [batch, tokens, {decoder.hidden_size}]"
        elif not torch.allclose(state, copy, rtol=0, atol=0, equal_nan=True):
            problem = "is changed in place by a later layer; write x = x + y for x += y in the model's code"
        elif is_listed and not (len(listed) == len(layers) and _close(listed[layer], state)):
            problem = (
                f"is not in output_hidden_states; llama_probe.register_family({decoder.model_type!r}, ...) accepts it"
            )
        else:
            continue
        raise ProbeError(f"hidden state {layer} of {type(without_peft(lm)).__name__} ({decoder.model_type}) {problem}")


def _close(listed: torch.Tensor, state: torch.Tensor) -> bool:
    return listed.shape == state.shape and torch.allclose(state.float(), listed.to(state).float(), equal_nan=True)
