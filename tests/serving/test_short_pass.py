"""Heads over short prompts in one pass give what they give of whole tensors, and other passes are not taken for one."""

import pytest
import torch
from conftest import HIDDEN, LAYERS, make_lm, make_probe, make_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from test_probe import KINDS, cases, states_for
from test_stack import let_wait

from llama_probe import LlamaForProbedGeneration
from llama_probe.serving.head_group import HeadGroup
from llama_probe.serving.short_pass import ShortPass


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(1, 3), st.sampled_from([0.0, 0.6, 9.0]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_it_equals_whole_tensors(case, count, share, dtype):
    """Also where layers wait for each other, and beside a head that reads fewer tokens."""
    config, mask, _, seed = case
    heads = {str(number): make_probe(seed + number, **config) for number in range(count)}
    heads["fewer"] = make_probe(seed, **config)
    fewer = mask & (mask.cumsum(1) == 1)  # the first token that counts, alone
    states = [hidden.to(dtype) for hidden in states_for(config, mask, seed)]
    with pytest.MonkeyPatch.context() as patch:
        let_wait(patch, share)
        group = HeadGroup(heads, dict.fromkeys(heads, mask) | {"fewer": fewer})
        reader = group.reader(*mask.shape)
        assert isinstance(reader, ShortPass)
        for layer in group.layers:
            reader.read(layer, states[layer])
    for name, output in group.results().items():
        with torch.no_grad():
            whole = heads[name](
                hidden_states=[hidden.float() for hidden in states],
                attention_mask=fewer if name == "fewer" else mask,
            )
        torch.testing.assert_close(output.logits, whole.logits, atol=1e-5, rtol=1e-5)


def group_of(rows=2, tokens=9, past=0, **asked):
    heads = {kind: make_probe(probe_type=kind) for kind in KINDS}
    return HeadGroup(heads, dict.fromkeys(heads, torch.ones(rows, tokens)), past, **asked)


def test_which_passes_are_one():
    assert isinstance(group_of().reader(2, 9), ShortPass)
    assert isinstance(group_of(4, 32).reader(4, 32), ShortPass)
    for group, columns in (
        (group_of(), 5),  # a chunk
        (group_of(tokens=65), 65),  # 130 tokens
        (group_of(keep=True), 9),
        (group_of(output_attentions=True), 9),
    ):
        assert group.reader(2, columns) is group


def test_what_follows_a_chunk_is_none():
    group = group_of()
    for layer in group.layers:
        group.read(layer, torch.randn(2, 5, HIDDEN))
    assert group.reader(2, 4) is group


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_heads_stay_in_fp32(kind):
    """Whether it is around the pass, or the LM's own."""
    head, states = make_probe(probe_type=kind), torch.randn(LAYERS + 1, 2, 9, HIDDEN)
    group = HeadGroup({"a": head}, {"a": torch.ones(2, 9)})
    reader = group.reader(2, 9)
    assert isinstance(reader, ShortPass)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for layer in group.layers:
            reader.read(layer, states[layer])
        found = group.results()["a"].logits
    with torch.no_grad():
        torch.testing.assert_close(found, head(hidden_states=list(states)).logits, atol=1e-5, rtol=1e-5)


def test_without_a_head_there_is_none():
    group = HeadGroup({}, {})
    assert group.reader(2, 9) is group


def test_a_layer_that_did_not_come_by_is_noticed():
    group = group_of()
    reader = group.reader(2, 9)
    for layer in range(LAYERS):
        reader.read(layer, torch.randn(2, 9, HIDDEN))
    with pytest.raises(Exception, match=f"layer {LAYERS} has seen 0 of 9"):
        group.results()


def test_the_lm_learns_beside_it(prompts):
    """No gradients flow into heads, and the LM's own are as ever."""
    lm = make_lm()
    lm(prompts, labels=prompts).loss.backward()
    expected = lm.model.layers[0].mlp.up_proj.weight.grad.clone()
    lm.zero_grad()
    model = LlamaForProbedGeneration.from_causal_lm(lm, {kind: make_probe(probe_type=kind) for kind in KINDS})
    out = model(make_prompts(), labels=prompts)
    out.loss.backward()
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, expected)
    assert not any(logits.requires_grad for logits in out.probe_logits.values())
    assert all(parameter.grad is None for parameter in model.probes.parameters())
