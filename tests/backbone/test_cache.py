"""Copies of an LM's KV cache."""

import pytest
import torch
from conftest import SIZES, make_prompts
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicLayer

from llama_probe.backbone.cache import cached_tokens, copy_cache, given_cache, repeat_cache
from llama_probe.backbone.capture import prefill


START = [5, 6, 7, 8, 9]


@pytest.fixture(params=["full", "sliding"])
def lm(request):
    if request.param == "full":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).eval()


@torch.no_grad()
def test_rows_share_the_memory_of_a_prefix_until_the_lm_adds_to_them(lm):
    prompts, prefix = make_prompts(), prefill(lm, START)
    memory = prefix.layers[0].keys.untyped_storage().nbytes()
    repeated = copy_cache(repeat_cache(prefix, 3))
    for part in (repeated.layers[-1].keys, repeated.layers[-1].values):
        assert len(part) == 3 and part.untyped_storage().nbytes() == memory
    expected = lm(torch.cat([torch.tensor([START]).expand(3, -1), prompts], dim=1)).logits[:, len(START) :]
    for _ in range(2):  # neither is changed
        for cache in (copy_cache(repeated), repeat_cache(prefix, 3)):
            torch.testing.assert_close(lm(prompts, cache=cache).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_cache_with_gradients_is_copied_without(lm):
    output = lm(make_prompts(), use_cache=True)
    assert given_cache(output) is output.cache and cached_tokens(output) == 9 and cached_tokens({}) == 0
    keys, copied = output.cache.layers[0].keys, copy_cache(output.cache).layers[0].keys
    assert keys.requires_grad and not copied.requires_grad and torch.equal(keys, copied)


def test_an_empty_layer_stays_empty():
    """Models that share keys and values between layers have some."""
    prefix = prefill(LlamaForCausalLM(LlamaConfig(**SIZES)).eval(), START)
    prefix.layers.append(DynamicLayer())
    repeated = repeat_cache(prefix, 3)
    assert len(repeated.layers[0].keys) == 3 and not repeated.layers[-1].is_initialized
