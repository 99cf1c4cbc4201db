"""Captures the hidden states of an LM's layers while it runs. Only this file registers hooks on the LM."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Generator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import torch
import transformers
from torch import nn

from ..errors import ProbeError
from .decoder import Decoder, find_decoder, without_peft
from .kv_cache import repeat_cache


OnState = Callable[[int, torch.Tensor], None]
Tensors = tuple[torch.Tensor, ...]

# Tokens of the forward pass of `check_states`.
_PROOF_TOKENS = 8


class _Enough(Exception):
    """Ends a pass whose last wanted layer has run."""


@contextmanager
def capturing(decoder: Decoder, on_state: OnState, layers: Collection[int], whole: bool = True) -> Generator[None]:
    """Call a function with each hidden state when it appears, inside the block.

    Hidden state 0 is the input of the first layer (right for `inputs_embeds` and for models that scale their embeddings or
    add positions to them), hidden state i the output of layer i, and hidden state L the output of the final norm: equal to
    `output_hidden_states`. The hooks exist only inside the block, and only for the thread that opened it, so that two
    threads can run one model.

    Args:
        on_state: called as `on_state(layer, hidden)` with `hidden` of shape `[B, n, D]`, which it may keep.
        whole: if False, the output of the pass is not wanted: the pass and the block end after the last of `layers`.
    """
    thread = threading.get_ident()
    last = decoder.num_hidden_layers
    # With several processes the pass runs to its end, because FSDP gathers and frees the weights of each layer.
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    final = None if whole or not alone else max(layers, default=None)

    def hear(layer: int, hidden: torch.Tensor) -> None:
        if threading.get_ident() != thread:
            return
        on_state(layer, hidden)
        if layer == final and not torch.compiler.is_compiling():
            raise _Enough

    with suppress(_Enough), ExitStack() as hooks:
        for layer in sorted(set(layers)):
            if layer == 0:
                hook = decoder.layers[0].register_forward_pre_hook(partial(_before, hear), with_kwargs=True)
            else:
                # A user's hook on the next layer may change the state in place: then on_state gets a copy.
                copied = layer < last and bool(decoder.layers[layer]._forward_pre_hooks)
                module = decoder.norm if layer == last else decoder.layers[layer - 1]
                hook = module.register_forward_hook(partial(_after, hear, layer, copied))
            hooks.enter_context(hook)
        yield


# Another thread may run the layer after torch has registered the hook and before it has set its with_kwargs.
def _before(hear: OnState, _: nn.Module, args: Tensors, kwargs: dict[str, torch.Tensor] | None = None) -> None:
    if args:
        hear(0, args[0])
    elif kwargs:
        hear(0, kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values())))


def _after(
    hear: OnState, layer: int, copied: bool, _: nn.Module, args: Tensors, output: torch.Tensor | Tensors
) -> None:
    hidden = output[0] if isinstance(output, tuple) else output
    hear(layer, hidden.clone() if copied else hidden)


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
        attention_mask (`[B, T]`, *optional*): 1 for tokens, 0 for padding, on any device. Not needed for padding on the right: no
            token sees the padding after it, and attention without a mask is faster.
        prefix: a KV cache from `passes.prefill`, of tokens that come before every row. Not together with `attention_mask`.

    Returns:
        One tensor `[B, T, D]` for each of `layers`, in their order, in the backbone's dtype and on the device of its last layer.
    """
    decoder = find_decoder(lm)
    device = decoder.input_device
    input_ids = input_ids.to(device)
    attention_mask = None if attention_mask is None else attention_mask.to(device)
    cache = None if prefix is None else repeat_cache(prefix, len(input_ids))
    states: dict[int, torch.Tensor] = {}
    with torch.no_grad(), capturing(decoder, states.__setitem__, layers, whole=False):
        decoder.run(input_ids=input_ids, attention_mask=attention_mask, cache=cache, use_cache=cache is not None)
    check_seen(layers, states)
    return [states[layer].to(decoder.device) for layer in layers]


def check_states(lm: nn.Module) -> None:
    """Prove, for a family that is not in the table, that the captured states are the LM's hidden states.

    The backbone runs once over a few tokens. For a registered family, only the shapes are checked, and that no layer changes
    an earlier hidden state in place. Models with offloaded weights are not checked.
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
        pair = states.get(layer)
        if pair is None or pair[0].shape != (1, _PROOF_TOKENS, decoder.hidden_size):
            problem = f"is not [batch, tokens, {decoder.hidden_size}]"
        elif not torch.allclose(*pair, rtol=0, atol=0, equal_nan=True):
            problem = "is changed in place by a later layer; write x = x + y for x += y in the model's code"
        elif is_listed and not (len(listed) == len(layers) and _close(listed[layer], pair[0])):
            problem = f"is not in output_hidden_states; register_family({decoder.model_type!r}, ...) accepts it"
        else:
            continue
        raise ProbeError(f"hidden state {layer} of {type(without_peft(lm)).__name__} ({decoder.model_type}) {problem}")


def _close(listed: torch.Tensor, state: torch.Tensor) -> bool:
    return listed.shape == state.shape and torch.allclose(state.float(), listed.to(state).float(), equal_nan=True)
