"""Heads side by side, and layers that wait for each other, give what each head gives alone of whole tensors."""

import pytest
import torch
from conftest import HIDDEN, LAYERS, make_probe
from hypothesis import given, settings
from hypothesis import strategies as st
from test_probe import cases, states_for

from llama_probe.heads import attention
from llama_probe.serving import stack
from llama_probe.serving.stack import HeadStack


def take_in(side_by_side, state, states):
    """A chunk; the states of layers that are not read are passed over."""
    for layer, hidden in enumerate(states):
        side_by_side.step(state, layer, hidden)
        side_by_side.settle(state)


def let_wait(patch, share):
    for name in ("_WAITING_SHARE", "_FEW_WAITING_SHARE"):
        patch.setattr(stack, name, share)


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(1, 3), st.sampled_from([0.0, 0.6, 9.0]), st.booleans(), st.booleans())
def test_side_by_side_equals_alone(case, count, share, many, keep):
    """Also where layers wait for each other, and where attention runs block by block."""
    config, mask, cuts, seed = case
    heads = [make_probe(seed + number, **config) for number in range(count)]
    states = states_for(config, mask, seed)
    with pytest.MonkeyPatch.context() as patch:
        let_wait(patch, share)
        whole = [head(hidden_states=states, attention_mask=mask).logits.detach() for head in heads]
        if many:
            patch.setattr(stack, "_FEW", 0)
            patch.setattr(attention, "_MANY", 1)
            patch.setattr(attention, "_CACHED", 3 * mask.shape[1])
        side_by_side = HeadStack(heads)
        state = side_by_side.init_state(mask, keep=keep)
        with torch.no_grad():
            for low, high in zip([0, *cuts], cuts, strict=False):
                take_in(side_by_side, state, [hidden[:, low:high] for hidden in states])
            for number, output in enumerate(side_by_side.finish(state)):
                torch.testing.assert_close(output.logits, whole[number], atol=1e-5, rtol=1e-5)
            if keep:
                for number, head in enumerate(heads):
                    running = side_by_side.running(state, number)
                    summaries = head.token_stage.result(running, slice(None))
                    found = head.score_summaries(summaries).logits
                    torch.testing.assert_close(found, whole[number], atol=1e-5, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_weights_side_by_side(case):
    config, mask, _, seed = case
    heads = [make_probe(seed + number, **config) for number in range(2)]
    states = states_for(config, mask, seed)
    side_by_side = HeadStack(heads)
    state = side_by_side.init_state(mask, output_attentions=True)
    with torch.no_grad():
        take_in(side_by_side, state, states)
        for head, found in zip(heads, side_by_side.finish(state), strict=True):
            alone = head(hidden_states=states, attention_mask=mask, output_attentions=True)
            torch.testing.assert_close(found.token_weights, alone.token_weights, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found.layer_weights, alone.layer_weights, atol=1e-5, rtol=1e-5)


@settings(max_examples=150, deadline=None)
@given(
    cases(),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.integers(0, 6),
    st.sampled_from([0.0, 0.6, 9.0]),
    st.booleans(),
)
def test_states_in_half_precision(case, dtype, halves, share, many):
    """Close to what a head makes of them in fp32, and equal where maps are not rounded. Norms may compute in fp32: then the states
    from some layer on are of another dtype."""
    config, mask, cuts, seed = case
    heads = [make_probe(seed + number, **config) for number in range(2)]
    for parameter in (parameter for head in heads for parameter in head.token_stage.parameters()):
        parameter.data *= 0.3
    states = [hidden.to(dtype) for hidden in states_for(config, mask, seed)]
    states = [hidden if layer < halves else hidden.float() for layer, hidden in enumerate(states)]
    rounded = many and heads[0].token_stage.rank is not None
    side_by_side = HeadStack(heads)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        let_wait(patch, share)
        if many:
            patch.setattr(stack, "_FEW", 0)
        state = side_by_side.init_state(mask)
        for low, high in zip([0, *cuts], cuts, strict=False):
            take_in(side_by_side, state, [hidden[:, low:high] for hidden in states])
        for head, output in zip(heads, side_by_side.finish(state), strict=True):
            whole = head(hidden_states=[hidden.float() for hidden in states], attention_mask=mask).logits
            near = 0.03 if rounded else 1e-5
            torch.testing.assert_close(output.logits, whole, atol=near, rtol=near)


@pytest.mark.parametrize(
    "tokens, dtype, changes, asked, expected",
    [
        (129, torch.bfloat16, {}, {}, torch.bfloat16),
        (129, torch.float16, {}, {}, torch.float16),
        (129, torch.float32, {}, {}, torch.float32),
        (128, torch.bfloat16, {}, {}, torch.float32),
        (129, torch.bfloat16, {"normalize": "none"}, {}, torch.float32),
        (129, torch.bfloat16, {}, {"output_attentions": True}, torch.float32),
    ],
)
def test_maps_are_applied_in_the_dtype_of_the_lm(monkeypatch, tokens, dtype, changes, asked, expected):
    """Where that is most of the work, where it cannot overflow, and where nobody asks what was looked at."""
    seen, original = set(), HeadStack._wait

    def wait(self, state, slot, x, *args):
        seen.add(x.dtype)
        return original(self, state, slot, x, *args)

    monkeypatch.setattr(HeadStack, "_wait", wait)
    side_by_side = HeadStack([make_probe(**changes)])
    state = side_by_side.init_state(torch.ones(1, tokens), **asked)
    with torch.no_grad():
        take_in(side_by_side, state, torch.randn(LAYERS + 1, 1, tokens, HIDDEN).to(dtype))
    assert seen == {expected}
    assert side_by_side.finish(state)[0].logits.dtype == torch.float32


def test_layers_of_two_dtypes_do_not_wait_for_each_other(monkeypatch):
    monkeypatch.setattr(stack, "_WAITING_SHARE", 9.0)
    head = make_probe()
    states = [torch.randn(1, 130, HIDDEN) for _ in range(LAYERS + 1)]
    states[:2] = [hidden.bfloat16() for hidden in states[:2]]
    side_by_side = HeadStack([head])
    state = side_by_side.init_state(torch.ones(1, 130))
    with torch.no_grad():
        take_in(side_by_side, state, states)
        found, whole = (
            side_by_side.finish(state)[0].logits,
            head(hidden_states=[hidden.float() for hidden in states]).logits,
        )
    torch.testing.assert_close(found, whole, atol=0.03, rtol=0.03)
