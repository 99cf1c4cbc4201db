"""`mean_attention` beside a softmax by the book."""

import pytest
import torch

from llama_probe.heads import mean_attention as module


ITEMS = 60


def by_the_book(query, key, value, valid, scale):
    valid = torch.ones(len(query), ITEMS, dtype=torch.bool) if valid is None else valid
    scores = query.double() @ key.double().transpose(-1, -2) * scale  # [P, heads, N, N]
    scores = scores.masked_fill(~valid[:, None, None], float("-inf"))
    mixed = scores.softmax(dim=-1).nan_to_num(0.0) @ value.double()
    return (mixed * valid[:, None, :, None]).sum(dim=2) / valid.sum(dim=1).clamp_min(1)[:, None, None]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("numbers", [1, 7 * ITEMS, 10_000])
@pytest.mark.parametrize("size", [0.0, 1.0, 1000.0])
def test_it_is_the_mean_of_an_attention(size, numbers, masked, monkeypatch):
    """Also with scores too large for exp(), and in rows of which nothing or a single item counts."""
    monkeypatch.setattr(module, "_SCORES", numbers)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(5, 2, ITEMS, 3, generator=generator) for _ in range(3))
    valid = torch.rand(5, ITEMS, generator=generator) > 0.3 if masked else None
    if masked:
        valid[1], valid[2] = False, torch.arange(ITEMS) == 4
    found = module.mean_attention(size * query, key, value, valid, 0.5)
    torch.testing.assert_close(found.double(), by_the_book(size * query, key, value, valid, 0.5), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("largest", [-200.0, 120.0])
def test_one_query_of_another_size(largest):
    query, key = torch.ones(1, 1, ITEMS, 1), torch.ones(1, 1, ITEMS, 1)
    query[..., 5, 0], key[..., :3, 0] = largest, 1.01
    value = torch.randn(1, 1, ITEMS, 1)
    found = module.mean_attention(query, key, value, None, 1.0)
    torch.testing.assert_close(found.double(), by_the_book(query, key, value, None, 1.0), atol=1e-5, rtol=1e-4)
