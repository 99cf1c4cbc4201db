"""token_scope: which tokens count, and the segments that they make."""

import pytest
import torch
from conftest import make_lm, make_probe, make_prompts, score_turns

from llama_probe import ProbeConfig
from llama_probe.heads.scope import token_mask
from llama_probe.heads.segments import number_segments


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
    assert token_mask(config, torch.tensor(ids), attention_mask).int().tolist() == expected


MARKERS = {"user": {"ids": [1], "skip": 0}, "assistant": {"ids": [2], "skip": 0}}


def test_segments_are_tokens_side_by_side_that_count():
    config = ProbeConfig(token_scope="user", turn_markers=MARKERS, flagged=["LABEL_1"])
    mask = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)
    assert number_segments(config, mask).tolist() == [[0, 1, 1, 0, 2], [0, 0, 1, 1, 1]]
    assert number_segments(config, mask[1:]) is None, "one segment is all"
    assert number_segments(config.replace(token_scope="turns"), mask) is None
    assert number_segments(config.replace(probe_type="last"), mask) is None


@pytest.mark.parametrize("probe_type", ["pooling", "gate", "multimax", "mha"])
def test_a_head_scores_its_strongest_segment(probe_type):
    head = make_probe(probe_type=probe_type, token_scope="user", turn_markers=MARKERS, flagged=["LABEL_1"])
    lm, ids = make_lm(vocab_size=100), make_prompts(1, 12) + 3
    ids[0, [0, 8]], ids[0, 5] = 1, 2
    mask = token_mask(head.config, ids, None)
    with torch.no_grad():
        states = lm(ids, output_hidden_states=True).hidden_states
        head.set_backbone(lm)
        torch.testing.assert_close(head(ids).logits, score_turns(head, states, mask), atol=1e-5, rtol=1e-5)
