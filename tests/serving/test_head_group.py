"""Any heads over one batch of prompts: which go together, and what each says."""

import pytest
import torch
from conftest import make_lm, make_probe, make_prompts
from test_probe import KINDS
from transformers import DynamicCache

from llama_probe import LlamaForProbedGeneration
from llama_probe.serving.head_group import shape_of


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
    """Layers wait for each other here; some heads read other tokens than the rest, or other layers."""
    depth = 30
    changes = {"num_hidden_layers": depth, "hidden_size": 64, "downcast": 16, "num_attention_heads": 1}
    heads = {f"{kind}-{i}": make_probe(i, probe_type=kind, **changes) for kind in KINDS for i in range(3)}
    heads |= {f"content-{i}": make_probe(i, token_scope="content", prefix_ids=[5, 6], **changes) for i in range(2)}
    heads |= {f"{kind}-third": make_probe(probe_type=kind, layers=[*range(1, depth, 3)], **changes) for kind in KINDS}
    lm = make_lm(num_hidden_layers=depth, hidden_size=64, initializer_range=0.05).to(dtype)
    prompts = make_prompts(2, 12)
    prompts[:, :2] = torch.tensor([5, 6])
    # Chunks of a bf16 backbone have other states than the whole: by how much depends on the processor.
    cache, width = DynamicCache(config=lm.config), chunk or prompts.shape[1]
    with torch.no_grad():
        parts = [
            lm(part, cache=cache, use_cache=True, output_hidden_states=True).hidden_states
            for part in prompts.split(width, dim=1)
        ]
    states = [torch.cat(layer, dim=1) for layer in zip(*parts, strict=True)]
    content = torch.ones_like(prompts)
    content[:, :2] = 0
    model = LlamaForProbedGeneration.from_causal_lm(lm, heads)
    kwargs = {"max_new_tokens": 2, "eos_token_id": None, **({"prefill_chunk_size": chunk} if chunk else {})}
    found = model.generate(prompts, **kwargs).probe_logits
    assert list(found) == list(heads)
    for name, head in heads.items():
        mask = content if name.startswith("content") else torch.ones_like(prompts)
        with torch.no_grad():
            expected = head(hidden_states=states, attention_mask=mask).logits
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-5)
