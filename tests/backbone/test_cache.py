"""Copies of an LM's cache."""

import pytest
import torch
from conftest import SIZES, make_prompts
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicLayer

from llama_probe.backbone.cache import copy_cache, repeat_cache
from llama_probe.backbone.capture import prefill


@torch.no_grad()
@pytest.mark.parametrize(
    "lm",
    [LlamaForCausalLM(LlamaConfig(**SIZES)), MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))],
    ids=["full", "sliding"],
)
def test_rows_share_the_memory_of_a_prefix_until_the_lm_adds_to_them(lm):
    start, prompts = [5, 6, 7, 8, 9], make_prompts()
    prefix = prefill(lm.eval(), start)
    memory = prefix.layers[0].keys.untyped_storage().nbytes()
    repeated = copy_cache(repeat_cache(prefix, 3))
    for part in (repeated.layers[-1].keys, repeated.layers[-1].values):
        assert len(part) == 3 and part.untyped_storage().nbytes() == memory
    expected = lm(torch.cat([torch.tensor([start]).expand(3, -1), prompts], dim=1)).logits[:, len(start) :]
    for _ in range(2):  # neither is changed
        torch.testing.assert_close(lm(prompts, cache=copy_cache(repeated)).logits, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(lm(prompts, cache=repeat_cache(prefix, 3)).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_layer_that_holds_nothing_stays_as_it_is():
    """Where layers share keys and values, not each has its own."""
    prefix = prefill(LlamaForCausalLM(LlamaConfig(**SIZES)).eval(), [5, 6, 7])
    prefix.layers.append(DynamicLayer())
    repeated = repeat_cache(prefix, 3)
    assert len(repeated.layers[0].keys) == 3 and not repeated.layers[-1].is_initialized
