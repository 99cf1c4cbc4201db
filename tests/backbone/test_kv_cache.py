"""Copies of an LM's KV cache."""

import pytest
import torch
from tiny_families import padded_prompts, tiny

from llama_probe.backbone.capture import prefill
from llama_probe.backbone.kv_cache import copy_cache, repeat_cache


START = [5, 6, 7, 8, 9]


@pytest.mark.parametrize("family", ["llama", "mistral"])  # whose layers see all tokens, or the last four
@torch.no_grad()
def test_rows_share_the_memory_of_a_prefix_until_the_lm_adds_to_them(family):
    lm, prompts = tiny(family), padded_prompts()["input_ids"]
    prefix = prefill(lm, START)
    memory = prefix.layers[0].keys.untyped_storage().nbytes()
    repeated = copy_cache(repeat_cache(prefix, 3))
    for part in (repeated.layers[-1].keys, repeated.layers[-1].values):
        assert len(part) == 3 and part.untyped_storage().nbytes() == memory
    expected = lm(torch.cat([torch.tensor([START]).expand(3, -1), prompts], dim=1)).logits[:, len(START) :]
    for _ in range(2):  # neither is changed
        for cache in (copy_cache(repeated), repeat_cache(prefix, 3)):
            torch.testing.assert_close(lm(prompts, cache=cache).logits, expected, atol=1e-4, rtol=1e-4)
