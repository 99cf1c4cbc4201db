"""Heads side by side, and layers that wait for each other, give what each head gives alone of whole tensors."""

import pytest
import torch
from conftest import make_probe
from hypothesis import given, settings
from hypothesis import strategies as st
from test_probe import cases, states_for

from llama_probe import stack
from llama_probe.heads import attention
from llama_probe.stack import HeadStack


def take_in(side_by_side, state, states, at_once):
    """So many layers at a time; the states of those that are not read are passed over."""
    layers = list(side_by_side.layer_indices)
    for first in range(0, len(layers), at_once):
        some = layers[first : first + at_once]
        side_by_side.step(state, some, torch.stack([states[layer] for layer in some]))
        side_by_side.settle(state)


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(1, 3), st.integers(1, 4), st.sampled_from([0.0, 0.6, 9.0]), st.booleans(), st.booleans())
def test_side_by_side_equals_alone(case, count, at_once, share, many, keep):
    """Also where several layers come at once, or wait for each other, and where attention runs block by block."""
    config, mask, cuts, seed = case
    heads = [make_probe(seed + number, **config) for number in range(count)]
    states = states_for(config, mask, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "_WAITING_SHARE", share)
        whole = [head(hidden_states=states, attention_mask=mask).logits.detach() for head in heads]
        if many:
            patch.setattr(stack, "_MANY", 1)
            patch.setattr(attention, "_MANY", 1)
            patch.setattr(attention, "_CACHED", 3 * mask.shape[1])
        side_by_side = HeadStack(heads)
        state = side_by_side.init_state(mask, keep=keep)
        with torch.no_grad():
            for low, high in zip([0, *cuts], cuts, strict=False):
                take_in(side_by_side, state, [hidden[:, low:high] for hidden in states], at_once)
            for number, output in enumerate(side_by_side.finish(state)):
                torch.testing.assert_close(output.logits, whole[number], atol=1e-5, rtol=1e-5)
            if keep:
                for number, head in enumerate(heads):
                    running = side_by_side.running(state, number)
                    summaries = head.token_stage.result(running, slice(None))
                    found = head.score_summaries(summaries).logits
                    torch.testing.assert_close(found, whole[number], atol=1e-5, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(cases(), st.integers(1, 4))
def test_weights_side_by_side(case, at_once):
    config, mask, _, seed = case
    heads = [make_probe(seed + number, **config) for number in range(2)]
    states = states_for(config, mask, seed)
    side_by_side = HeadStack(heads)
    state = side_by_side.init_state(mask, output_attentions=True)
    with torch.no_grad():
        take_in(side_by_side, state, states, at_once)
        for head, found in zip(heads, side_by_side.finish(state), strict=True):
            alone = head(hidden_states=states, attention_mask=mask, output_attentions=True)
            torch.testing.assert_close(found.token_weights, alone.token_weights, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found.layer_weights, alone.layer_weights, atol=1e-5, rtol=1e-5)
