"""Passes over many prompts: each row once, within the budget, and what many begin with and nobody reads once."""

from unittest.mock import patch

import pytest
import torch
from conftest import LAYERS, VOCAB, make_lm, make_probe
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_probe.backbone import passes
from llama_probe.backbone.passes import length_batches, plan_passes, shared_start
from llama_probe.data.cached_states import PromptDataset, iterate_states


START = list(range(10, 30))
TOKENS = st.integers(3, VOCAB - 1)


@pytest.mark.parametrize(
    "prompts, unread, expected",
    [
        ([[*START, row] for row in range(5)], [20] * 5, START),
        ([[*START, row] for row in range(5)], [7] * 5, []),  # 28 tokens are not worth a pass
        ([[*START, row] for row in range(6)], [20, 20, 20, 20, 20, 7], START),  # 5 times 20 are more than 6 times 7
        ([[3, 4], *([*START, row] for row in range(5))], [1, *[20] * 5], START),
        ([*([*START[:19], 5, row] for row in range(5)), [*START, 1]], [20] * 6, START[:19]),
        ([[*START, 5]], [20], []),
        ([], [], []),
    ],
)
def test_what_is_worth_running_first(prompts, unread, expected):
    assert shared_start(prompts, unread) == expected


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(TOKENS, min_size=1, max_size=9), st.integers(0, 30)), min_size=1, max_size=12
    ),
    st.integers(1, 80),
)
def test_each_row_once_and_what_is_left_out_is_what_it_may_be(rows, batch_tokens):
    prompts = [[*(START if begins else []), *rest] for begins, rest, _ in rows]
    unread = [count for _, _, count in rows]
    with patch.object(passes, "BATCH_TOKENS", batch_tokens):
        plan = plan_passes(make_lm(), prompts, unread)
    assert sorted(row for each in plan for row in each.rows) == list(range(len(rows)))
    for each in plan:
        assert (each.prefix is None) == (each.skip == 0)
        widths = [len(prompts[row]) - each.skip for row in each.rows]
        assert min(widths) > 0 and (len(each.rows) == 1 or len(each.rows) * max(widths) <= batch_tokens)
        if each.skip:
            assert each.prefix.get_seq_length() == each.skip
            for row in each.rows:
                assert prompts[row][: each.skip] == START[: each.skip] and unread[row] >= each.skip


def test_the_largest_batch_comes_first():
    assert length_batches([3, 9, 4, 2], 12) == [[1], [2, 0, 3]]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.lists(TOKENS, min_size=2, max_size=9)), min_size=1, max_size=12),
    st.integers(0, 22),
    st.sampled_from([40, 400]),
)
def test_states_are_those_of_rows_run_whole_and_alone(rows, unread, batch_tokens):
    lm, head = make_lm(), make_probe()
    prompts = [[*(START if begins else []), *rest] for begins, rest in rows]
    masks = [[column >= min(unread, len(ids) - 1) for column in range(len(ids))] for ids in prompts]
    seen = set()
    dataset = PromptDataset(prompts, torch.zeros(len(rows)).numpy(), masks)
    with patch.object(passes, "BATCH_TOKENS", batch_tokens):
        batches = list(iterate_states(dataset, head.config, lm))
    for numbers, states, counted in batches:
        for row, found, mask in zip(numbers, states.transpose(0, 1), counted, strict=True):
            with torch.no_grad():
                expected = lm(torch.tensor([prompts[row]]), output_hidden_states=True).hidden_states
            expected = torch.cat(expected)[:, torch.tensor(masks[row])]  # [L+1, tokens that count, D]
            torch.testing.assert_close(found[:, mask], expected, atol=1e-5, rtol=1e-5)
            seen.add(row)
    assert seen == set(range(len(rows)))


def test_a_pass_over_a_data_set_runs_few_tokens(lm):
    prompts = [[*START, row] for row in range(3, 43)] + [[5, 6, 7]]
    masks = [[column == len(ids) - 1 for column in range(len(ids))] for ids in prompts]
    ran = []
    hook = lm.model.layers[LAYERS - 1].register_forward_hook(lambda module, args, out: ran.append(out[..., 0].numel()))
    list(iterate_states(PromptDataset(prompts, torch.zeros(41).numpy(), masks), make_probe().config, lm))
    hook.remove()
    assert sum(ran) == len(START) + 40 + 3
