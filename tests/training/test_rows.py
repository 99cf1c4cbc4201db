"""Rows that are cut short, that occur again, and that count for less."""

import numpy as np
import torch
from conftest import HIDDEN, LAYERS
from torch.utils.data import StackDataset

from llama_probe import ProbeConfig, ProbeModel
from llama_probe.data.batches import collate
from llama_probe.data.prompts import PromptDataset
from llama_probe.training.loss import ProbeLoss
from llama_probe.training.rows import TrainingRows


def test_replies_are_cut_and_prompts_are_not():
    ids, masks = [[1, 2, 3, 4, 5], [6, 7, 8]], [[False, False, True, True, True], [False, True, True]]
    rows = TrainingRows(PromptDataset(ids, np.array([0, 1]), masks, reply_lengths=[3, 2]), replies="cut")
    torch.manual_seed(0)
    seen = [rows[row] for row in (0, 1) * 60]
    for row, (least, most) in enumerate([(3, 5), (2, 3)]):
        lengths = [len(item["input_ids"]) for item in seen[row::2]]
        assert set(lengths) == set(range(least, most + 1)) and 20 < lengths.count(most) < 60
    assert all(len(item["probe_mask"]) == len(item["input_ids"]) and any(item["probe_mask"]) for item in seen)
    assert len(rows) == 2 and ids[0] == [1, 2, 3, 4, 5], "the rows themselves stay whole"


OWN, EXTRA = np.arange(24) % 2, np.arange(16) % 2


def state_rows(labels, seed=0):
    states = torch.randn(len(labels), LAYERS + 1, 4, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return StackDataset(input_ids=[[1, 2, 3, 4]] * len(labels), hidden_states=states, labels=labels)


def mixed(weights):
    return TrainingRows(state_rows(OWN) + state_rows(EXTRA, 1), row_weights=[None] * len(OWN) + [weights] * len(EXTRA))


def test_rows_without_a_weight_count_for_one():
    rows = mixed([0.0, 0.25])
    batch = collate([rows[0], rows[24], rows[1]])
    assert batch["row_weights"].tolist() == [[1, 1], [0, 0.25], [1, 1]]
    assert "row_weights" not in collate([rows[0], rows[1]])
    one = mixed([0.5])
    assert collate([rows[24], one[24]])["row_weights"].tolist() == [[0, 0.25], [0.5, 0.5]], "of two sources"


def test_members_take_turns():
    """With the weights 0 and 2 the members 0, 2, 4 learn from the other rows alone."""
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
    head = ProbeConfig(probe_type="multimax", dropout=0.0, options={"num_maxima": 2, "num_members": 5}, **sizes)
    torch.manual_seed(0)
    probe, loss = ProbeModel(head).train(), ProbeLoss(head)

    def gradient(rows) -> torch.Tensor:
        """Return that of the classifier's weights, `[members, ...]`, summed over the rows and not averaged."""
        probe.zero_grad()
        batch = collate([rows[row] for row in range(len(rows))])
        labels = batch.pop("labels")
        loss(probe(**batch), labels, num_items_in_batch=1).backward()
        return probe.classifier.weight.grad.unflatten(1, (5, -1)).transpose(0, 1).clone()

    both, own, extra = gradient(mixed([0.0, 2.0])), gradient(state_rows(OWN)), gradient(state_rows(EXTRA, seed=1))
    torch.testing.assert_close(both[::2], own[::2])
    torch.testing.assert_close(both[1::2], own[1::2] + 2 * extra[1::2])
