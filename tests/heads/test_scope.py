"""token_scope: which tokens count."""

import pytest
import torch

from llama_probe import ProbeConfig, ProbeError
from llama_probe.heads.scope import check_rows, token_mask


def config(**changes):
    return ProbeConfig(probe_type="gate", **{"token_scope": "content", "prefix_ids": [7, 8], **changes})


def test_prompt_scope_is_the_attention_mask():
    ids = torch.tensor([[7, 8, 9, 0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    assert token_mask(config(token_scope="prompt"), ids, mask).tolist() == [[True, True, True, False]]
    assert token_mask(config(token_scope="prompt"), ids, None).all()
    assert token_mask(config(prefix_ids=[]), ids, mask).tolist() == [[True, True, True, False]]


def test_content_scope_leaves_the_prefix_out_on_either_padding():
    ids = torch.tensor([[7, 8, 5, 7, 8], [0, 0, 7, 8, 5], [7, 8, 5, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    expected = [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 1, 0, 0]]
    assert token_mask(config(), ids, mask).int().tolist() == expected


def test_a_prompt_that_begins_otherwise_is_read_whole():
    ids = torch.tensor([[7, 9, 5], [8, 7, 8], [0, 0, 7]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 1]])
    assert torch.equal(token_mask(config(), ids, mask), mask.bool())


def test_all_scope_is_that_of_content():
    ids = torch.tensor([[7, 8, 5, 7, 8]])
    assert token_mask(config(token_scope="all"), ids, None).int().tolist() == [[0, 0, 1, 1, 1]]


def test_refusals():
    with pytest.raises(ProbeError, match="probe_mask"):
        token_mask(config(token_scope="response"), torch.ones(1, 3).long(), None)
    with pytest.raises(ProbeError, match="probe_mask"):
        token_mask(config(), None, torch.ones(1, 3))
    with pytest.raises(ProbeError, match=r"must be \[batch, tokens\]"):
        token_mask(config(), torch.ones(1, 3).long(), torch.ones(1, 1, 3, 3))
    with pytest.raises(ProbeError, match="input_ids or attention_mask"):
        token_mask(config(), None, None)
    with pytest.raises(ProbeError, match=r"rows \[0\] hold no token"):
        check_rows(token_mask(config(), torch.tensor([[7, 8]]), None))
