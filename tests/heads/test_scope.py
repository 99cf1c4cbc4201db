"""token_scope: which tokens count."""

import pytest
import torch

from llama_probe import ProbeConfig
from llama_probe.heads.scope import turn_numbers


@pytest.mark.parametrize(
    "changes, ids, attention_mask, expected",
    [
        ({"token_scope": "prompt"}, [[7, 8, 9, 0]], [[1, 1, 1, 0]], [[1, 1, 1, 0]]),
        ({"token_scope": "prompt"}, [[7, 8, 9, 0]], None, [[1, 1, 1, 1]]),
        ({}, [[7, 8, 5, 7, 8]], None, [[0, 0, 1, 1, 1]]),
        ({"token_scope": "all"}, [[7, 8, 5, 7, 8]], None, [[0, 0, 1, 1, 1]]),
        # behind and before padding
        ({}, [[0, 7, 8, 5], [7, 8, 5, 0]], [[0, 1, 1, 1], [1, 1, 1, 0]], [[0, 0, 0, 1], [0, 0, 1, 0]]),
        # rows that begin otherwise are read whole
        ({}, [[7, 9, 5], [8, 7, 8], [0, 0, 7]], [[1, 1, 1], [1, 1, 1], [0, 0, 1]], [[1, 1, 1], [1, 1, 1], [0, 0, 1]]),
    ],
)
def test_tokens_that_count(changes, ids, attention_mask, expected):
    attention_mask = None if attention_mask is None else torch.tensor(attention_mask)
    config = ProbeConfig(**{"token_scope": "content", "prefix_ids": [7, 8], **changes})
    assert turn_numbers(config, torch.tensor(ids), attention_mask).int().tolist() == expected
