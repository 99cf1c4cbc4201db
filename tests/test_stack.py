"""Heads side by side, and layers that wait for each other, give what each head gives alone of whole tensors."""

import pytest
import torch
from conftest import make_lm, make_probe, make_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from test_probe import KINDS, cases, states_for

from llama_probe import LlamaForProbedGeneration, generation, stack
from llama_probe.heads import attention
from llama_probe.stack import HeadStack, shape_of


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(1, 3), st.sampled_from([0.0, 0.6, 9.0]), st.booleans(), st.booleans())
def test_side_by_side_equals_alone(case, count, share, many, keep):
    """Also where layers wait for each other in groups, and attention runs block by block, as it does for many items."""
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
                for layer, hidden in enumerate(states):
                    side_by_side.step(state, layer, hidden[:, low:high])
                    side_by_side.settle(state)
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
        for layer, hidden in enumerate(states):
            side_by_side.step(state, layer, hidden)
            side_by_side.settle(state)
        for head, found in zip(heads, side_by_side.finish(state), strict=True):
            alone = head(hidden_states=states, attention_mask=mask, output_attentions=True)
            torch.testing.assert_close(found.token_weights, alone.token_weights, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found.layer_weights, alone.layer_weights, atol=1e-5, rtol=1e-5)


def test_who_goes_together():
    first = make_probe(0)
    assert shape_of(first) == shape_of(make_probe(1, num_labels=5))
    for changes in (
        {"probe_type": "gate"},
        {"num_attention_heads": 1},
        {"downcast": 2},
        {"pool": "max"},
        {"normalize": "rms"},
        {"layers": [1, 2]},
        {"token_scope": "all"},
        {"causal": True},
    ):
        assert shape_of(first) != shape_of(make_probe(1, **changes)), changes


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_heads_of_a_deep_model(chunk, dtype):
    """States wait for each other here; some heads read other tokens than the rest."""
    depth = 30
    assert int(generation._HELD_SHARE * (depth + 1)) > 0
    changes = {"num_hidden_layers": depth, "hidden_size": 64, "downcast": 16, "num_attention_heads": 1}
    heads = {f"{kind}-{i}": make_probe(i, probe_type=kind, **changes) for kind in KINDS for i in range(3)}
    heads |= {f"content-{i}": make_probe(i, token_scope="content", prefix_ids=[5, 6], **changes) for i in range(2)}
    lm = make_lm(num_hidden_layers=depth, hidden_size=64, initializer_range=0.05).to(dtype)
    prompts = make_prompts(2, 12)
    prompts[:, :2] = torch.tensor([5, 6])
    with torch.no_grad():
        states = lm(prompts, output_hidden_states=True).hidden_states
    content = torch.ones_like(prompts)
    content[:, :2] = 0
    model = LlamaForProbedGeneration.from_causal_lm(lm, heads)
    kwargs = {"max_new_tokens": 2, "eos_token_id": None, **({"prefill_chunk_size": chunk} if chunk else {})}
    found = model.generate(prompts, **kwargs).probe_logits
    assert list(found) == list(heads)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05  # chunks of a bf16 backbone have other states
    for name, head in heads.items():
        mask = content if name.startswith("content") else torch.ones_like(prompts)
        with torch.no_grad():
            expected = head(hidden_states=states, attention_mask=mask).logits
        torch.testing.assert_close(found[name], expected, atol=tolerance, rtol=tolerance)
