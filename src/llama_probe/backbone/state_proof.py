"""The proof, for a family of models that is not in the table, that what heads get are the LM's hidden states."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ProbeError
from .capture import Capture
from .decoder import find_decoder, without_peft


_PROOF_TOKENS = 8


def check_states(lm: nn.Module) -> None:
    """Proves, for a family that is not in the table, that what is captured are the LM's hidden states.

    The backbone runs once over a few tokens. Of a registered family only the shapes are checked, and that no layer changes a
    state in place that an earlier one gave: who reads it at once and who reads it later would see two. Models whose weights
    are offloaded are taken as they are.

    Raises:
        ProbeError: they are others than `output_hidden_states`, or do not stay as they are; the message says what to do.
    """
    decoder = find_decoder(lm)
    if decoder.origin == "table" or any(parameter.is_meta for parameter in decoder.model.parameters()):
        return
    states: dict[int, torch.Tensor] = {}
    first_seen: dict[int, torch.Tensor] = {}

    def on_state(layer: int, hidden: torch.Tensor) -> None:
        states[layer], first_seen[layer] = hidden, hidden.clone()

    input_ids = torch.arange(_PROOF_TOKENS, device=decoder.input_device)[None]
    layers = range(decoder.num_hidden_layers + 1)
    listing = {} if decoder.origin == "registered" else {"output_hidden_states": True, "return_dict": True}
    with torch.no_grad(), Capture(decoder, on_state, layers):
        output = decoder.model(input_ids=input_ids, use_cache=False, **listing)
    base = type(without_peft(lm))
    kind = f"{getattr(base, '_causal_lm_class', base).__name__} (model_type {decoder.model_type!r})"
    shape = (1, _PROOF_TOKENS, decoder.hidden_size)
    odd = [layer for layer in layers if layer not in states or states[layer].shape != shape]
    if odd:
        raise ProbeError(
            f"states {odd} of {kind}, of 0 to {layers[-1]}, are not of the shape [batch, tokens, {decoder.hidden_size}] "
            "where they were looked for: heads cannot read this family"
        )
    if changed := [
        layer
        for layer in layers
        if not torch.allclose(states[layer], first_seen[layer], rtol=0, atol=0, equal_nan=True)
    ]:
        raise ProbeError(
            f"states {changed} of {kind}, of 0 to {layers[-1]}, are changed in place by the layers that run after them, so that "
            "there are two of each, and which one heads would read depends on when they do: in the code of the model write "
            "x = x + y in place of x += y"
        )
    if not listing:
        return
    listed = getattr(output, "hidden_states", None) or ()
    wrong = [
        layer
        for layer in layers
        if len(listed) != len(layers)
        or states[layer].shape != listed[layer].shape
        or not torch.allclose(states[layer].float(), listed[layer].to(states[layer]).float(), equal_nan=True)
    ]
    if wrong:
        raise ProbeError(
            f"{kind} is of no known family, and what enters and leaves its layers is not what it lists "
            f"with output_hidden_states=True ({len(listed)} states; others: {wrong} of 0 to {layers[-1]}). Where that "
            f'is what heads shall read, say so before: llama_probe.register_family("{decoder.model_type}", ...)'
        )
