"""The loss of heads that judge windows: a label for each window where the place of a request is known."""

import math

import numpy as np
import pytest
import torch
from cases import MULTI
from conftest import make_probe

from llama_probe.heads.decision import ProbeOutput
from llama_probe.training.loss import OUTSIDE_WEIGHT, ProbeLoss, window_loss


GUARD = {"id2label": {0: "fine", 1: "awful"}, "flagged": ["awful"]}
# The log odds of the flagged label in each window of four rows: a request with a place, a request without one, a harmless text, and
# a short harmless text. The last window of the second row and the last three of the fourth are padding.
ODDS = torch.tensor([[3.0, -1.0, 2.0, 0.5], [1.0, -2.0, 0.0, 9.0], [-1.0, -3.0, 1.5, -2.0], [-0.5, 9.0, 9.0, 9.0]])
EXISTS = torch.tensor([[True] * 4, [True, True, True, False], [True] * 4, [True, False, False, False]])
HOLDS = torch.tensor([[False, True, True, False], *[[False] * 4] * 3])
LABELS = torch.tensor([1, 1, 0, 0])


def outputs_of(config, odds=ODDS, exists=EXISTS, holds=HOLDS, weights=None, touches=None):
    """An output with these log odds, `[rows, windows]` or `[members, rows, windows]`; of multi-label heads the logits themselves."""
    odds = odds if odds.dim() >= 3 else odds[None]
    output = ProbeOutput.from_logits(None, config)
    is_multi_label = config.problem_type == "multi_label_classification"
    output.segment_logits = odds if is_multi_label else torch.stack([torch.zeros_like(odds), odds], dim=-1)
    output.segment_mask, output.holds_request, output.row_weights = exists, holds, weights
    output.touches_request = holds if touches is None else touches
    return output


def loss_of(labels=LABELS, settings=None, weight=OUTSIDE_WEIGHT, changes=GUARD, **output):
    config = make_probe(**changes).config
    loss = ProbeLoss(config, **(settings or {}))
    return float(window_loss(loss, outputs_of(config, **output), labels, weight))


def positive(odds):
    return math.log1p(math.exp(-odds))


def negative(odds):
    return math.log1p(math.exp(odds))


def halves(odds):
    """Half of the mean of negative windows and half of the strongest."""
    losses = list(map(negative, odds))
    return (np.mean(losses) + max(losses)) / 2


# By row: the loss of the window with the row's flagged label, and that of the windows without one.
EXPECTED = [
    (positive(2.0), halves([3.0, 0.5])),
    (positive(1.0), 0.0),
    (0.0, halves([-1.0, -3.0, 1.5, -2.0])),
    (0.0, negative(-0.5)),
]


def weighted(row, weight):
    own, others = EXPECTED[row]
    return own + weight * others if LABELS[row] else others


@pytest.mark.parametrize("weight", [0.0, 0.3, 2.0])
def test_the_loss_is_what_it_says(weight):
    assert loss_of(weight=weight) == pytest.approx(sum(weighted(row, weight) for row in range(4)), rel=1e-5)
    for row in range(4):
        part = slice(row, row + 1)
        found = loss_of(LABELS[part], weight=weight, odds=ODDS[part], exists=EXISTS[part], holds=HOLDS[part])
        assert found == pytest.approx(weighted(row, weight), rel=1e-5)


def test_windows_that_have_a_part_of_the_request_and_do_not_hold_it_are_left_out():
    touches = HOLDS.clone()
    touches[0, 0] = True
    found = loss_of(LABELS[:1], odds=ODDS[:1], exists=EXISTS[:1], holds=HOLDS[:1], touches=touches[:1])
    assert found == pytest.approx(positive(2.0) + OUTSIDE_WEIGHT * negative(0.5), rel=1e-5)


def test_members_have_windows_of_their_own():
    moved = ODDS.roll(1, dims=1)
    holds, whole = HOLDS | True, torch.ones_like(EXISTS)
    alone = [loss_of(odds=odds, exists=whole, holds=holds) for odds in (ODDS, -ODDS)]
    assert loss_of(odds=torch.stack([ODDS, -ODDS]), exists=whole, holds=holds) == pytest.approx(np.mean(alone))
    assert loss_of(odds=moved, exists=whole, holds=holds) == pytest.approx(alone[0]), "the order does not matter"


def test_weights_of_rows():
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 2.0], [0.0, 0.0]])
    rows = [weighted(row, OUTSIDE_WEIGHT) for row in range(4)]
    both = torch.stack([ODDS, ODDS])
    expected = (rows[0] + 0.5 * rows[1] + 2 * rows[2]) / 2
    assert loss_of(odds=both, weights=weights) == pytest.approx(expected, rel=1e-5)


SETTINGS = {"class_weights": [0.5, 2.0], "label_smoothing_factor": 0.1, "focal_gamma": 2.0}


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
@pytest.mark.parametrize("settings", [{}, *({name: value} for name, value in SETTINGS.items()), SETTINGS])
def test_rows_of_one_window_have_the_loss_of_a_head_without_windows(problem_type, settings):
    config = make_probe(**GUARD, problem_type=problem_type).config
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 2)
    is_multi_label = problem_type == "multi_label_classification"
    labels = (
        torch.tensor([[0, 1], [1, 1], [0, 0], [1, math.nan], [0, math.nan]]) if is_multi_label else torch.arange(5) % 2
    )
    loss = ProbeLoss(config, **settings)
    output = ProbeOutput.from_logits(logits.mean(dim=0), config)
    output.member_logits, output.row_weights = logits, torch.rand(5, 3)
    expected = loss(output, labels)
    output.segment_logits, output.segment_mask = logits[:, :, None], torch.ones(5, 1, dtype=torch.bool)
    for holds in (False, True):
        output.holds_request = output.touches_request = torch.full((5, 1), holds)
        torch.testing.assert_close(loss(output, labels), expected)


def test_several_labels():
    """Each label has a strongest window of its own."""
    config = {"id2label": {0: "rude", 1: "sad"}, **MULTI}
    logits = torch.tensor([[[2.0, -1.0], [0.5, 3.0], [-2.0, 0.0]]])  # of three windows
    exists = torch.ones(1, 3, dtype=torch.bool)
    output = {"odds": logits[None], "exists": exists, "changes": config}
    nowhere, middle = torch.zeros_like(exists), torch.tensor([[False, True, False]])
    both = loss_of(torch.tensor([[1.0, 1.0]]), holds=nowhere, **output)
    assert both == pytest.approx((positive(2) + positive(3)) / 2)
    rude = torch.tensor([[1.0, 0.0]])
    inside = (positive(0.5) + negative(3.0)) / 2
    assert loss_of(rude, holds=middle, weight=0.0, **output) == pytest.approx(inside)
    outside = (halves([2.0, -2.0]) + halves([-1.0, 0.0])) / 2
    assert loss_of(rude, holds=middle, weight=1.0, **output) == pytest.approx(inside + outside)
    unknown = loss_of(torch.tensor([[0.0, math.nan]]), holds=nowhere, weight=1.0, **output)
    assert unknown == pytest.approx(halves([2.0, 0.5, -2.0]) / 2)


def test_padding_may_hold_anything():
    odds = ODDS.masked_fill(~EXISTS, math.nan).requires_grad_()
    config = make_probe(**GUARD).config
    window_loss(ProbeLoss(config), outputs_of(config, odds), LABELS).backward()
    assert odds.grad.isfinite().all() and (odds.grad[~EXISTS] == 0).all()
    assert (odds.grad[0] != 0).tolist() == [True, False, True, True], (
        "a window with the request that is not the strongest is free"
    )
