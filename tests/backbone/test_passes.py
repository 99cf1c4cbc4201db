"""Passes over many prompts: each row once, within the budget, and what many begin with and nobody reads once."""

from unittest.mock import patch

import pytest
import torch
from conftest import LAYERS, VOCAB, make_lm, make_probe
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_probe.backbone import passes
from llama_probe.data.batches import iterate_states
from llama_probe.data.prompts import PromptDataset


START = list(range(10, 30))
TOKENS = st.integers(3, VOCAB - 1)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.lists(TOKENS, min_size=1, max_size=9)), min_size=1, max_size=12),
    st.integers(0, 22),
    st.sampled_from([1, 40, 80, 400]),
)
def test_states_are_those_of_rows_run_whole_and_alone(rows, unread, batch_tokens):
    """Each row once, in passes within the budget."""
    lm, head, seen, sizes = make_lm(), make_probe(), [], []
    lm.model.layers[0].register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[:2]))
    prompts = [[*(START if begins else []), *rest] for begins, rest in rows]
    masks = [[column >= min(unread, len(ids) - 1) for column in range(len(ids))] for ids in prompts]
    dataset = PromptDataset(prompts, torch.zeros(len(rows)).numpy(), masks)
    with patch.object(passes, "BATCH_TOKENS", batch_tokens):
        batches = list(iterate_states(dataset, head.config, lm))
    for numbers, states, counted, _ in batches:
        for row, found, mask in zip(numbers, states.transpose(0, 1), counted, strict=True):
            with torch.no_grad():
                expected = lm(torch.tensor([prompts[row]]), output_hidden_states=True).hidden_states
            expected = torch.cat(expected)[:, torch.tensor(masks[row])]  # [L+1, tokens that count, D]
            # A row of one token alone is another product than one in a batch, which rounds otherwise.
            torch.testing.assert_close(found[:, mask], expected, atol=5e-5, rtol=1e-4)
            seen.append(row)
    assert sorted(seen) == list(range(len(rows)))
    assert all(count == 1 or count * width <= batch_tokens for count, width in sizes)


def test_a_long_start_runs_in_pieces(lm, monkeypatch):
    widths = []
    whole = passes.prefill(lm, START)
    monkeypatch.setattr(passes, "PASS_TOKENS", 8)
    lm.model.layers[0].register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    pieces = passes.prefill(lm, START)
    assert widths == [7, 7, 6] and pieces.get_seq_length() == len(START)
    for found, expected in zip(pieces.layers, whole.layers, strict=True):
        torch.testing.assert_close(found.keys, expected.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.values, expected.values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows, tokens", [(40, len(START) + 40 + 3), (4, 5 * (len(START) + 1))])
def test_a_pass_over_a_data_set_runs_few_tokens(lm, rows, tokens):
    """A start runs once if that saves more than a further pass costs. Four rows run whole, with the padding of a fifth."""
    prompts = [[*START, row] for row in range(3, 3 + rows)] + [[5, 6, 7]]
    masks = [[column == len(ids) - 1 for column in range(len(ids))] for ids in prompts]
    ran = []
    lm.model.layers[LAYERS - 1].register_forward_hook(lambda module, args, out: ran.append(out[..., 0].numel()))
    list(iterate_states(PromptDataset(prompts, torch.zeros(len(prompts)).numpy(), masks), make_probe().config, lm))
    assert sum(ran) == tokens
