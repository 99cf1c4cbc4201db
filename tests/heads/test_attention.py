"""Attention block by block, as the mean over many items asks for it."""

import pytest
import torch

from llama_probe.heads import attention


ITEMS = 60


def softmax(query, key, valid):
    """What each item receives, by the book."""
    scores = query.double() @ key.double()  # [P, N, N]
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None], float("-inf"))
    given = scores.softmax(dim=-1).nan_to_num(0.0)
    if valid is None:
        return given.mean(dim=1)
    return (given * valid[:, :, None]).sum(dim=1) / valid.sum(dim=1, keepdim=True).clamp_min(1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("numbers", [1, 7 * ITEMS, 10_000])
@pytest.mark.parametrize("size", [0.0, 1.0, 30.0, 1000.0])
def test_it_is_a_softmax(size, numbers, masked):
    """Also of scores whose exponentials are no numbers, and in rows of which nothing or a single item counts."""
    generator = torch.Generator().manual_seed(0)
    query = size * torch.randn(5, ITEMS, 3, generator=generator)
    key = torch.randn(5, 3, ITEMS, generator=generator)
    valid = torch.rand(5, ITEMS, generator=generator) > 0.3 if masked else None
    if masked:
        valid[1], valid[2] = False, torch.arange(ITEMS) == 4
    found = attention._received_attention(query, key, valid, 0.5, numbers)
    torch.testing.assert_close(found.double(), softmax(query / 2, key, valid), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_exponentials_that_are_numbers_of_few_digits(masked):
    """Many of them make up a sum that is one."""
    items = 2000
    query = torch.ones(1, items, 1)
    key = torch.linspace(-104, -102, items)[None, None]
    valid = torch.arange(items)[None] % 3 > 0 if masked else None
    found = attention._received_attention(query, key, valid, 1.0, 10 * items)
    torch.testing.assert_close(found.double(), softmax(query, key, valid), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("largest", [-200.0, 120.0])
def test_one_query_among_many_is_enough(largest, monkeypatch):
    """All scores of a single query too small, or too large, to take the exponential of."""
    query, key = torch.ones(1, ITEMS, 1), torch.ones(1, 1, ITEMS)
    query[0, 5] = largest
    key[0, 0, :3] = 1.01
    careful = []
    below = attention._exp_below_largest
    monkeypatch.setattr(attention, "_exp_below_largest", lambda *parts: careful.append(1) or below(*parts))
    found = attention._received_attention(query, key, None, 1.0, 10 * ITEMS)
    assert careful
    torch.testing.assert_close(found.double(), softmax(query, key, None), atol=1e-6, rtol=1e-4)
